"""What the frozen base thinks of a document: the inputs of its blocks, which a hypernetwork reads.

    N  chunks of all documents          B  documents
    L  blocks that are looked at        T  tokens of the longest chunk
    D  width of the base's hidden states

A long document is cut into chunks, and each is read alone. So what is read does not depend on what stands beside it in
a batch, to the last bit: a run that goes on, and an adapter written later, see the same numbers. The base is frozen, so
each distinct chunk is read once and kept, until `LIMIT` bytes are kept; whatever comes after that is read each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynlora_cli.data.grounded import GroundedEncoder, GroundedText
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.hypernets.layer import WrittenLinear, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dynlora_cli.data.examples import Example
    from dynlora_cli.hypernets.hypernet import Place

Ids = TypeVar("Ids", Sequence[int], NDArray[np.int32])
CHUNK = "chunk"  # the variant's key that says how many tokens of a document are read at once
LIMIT = 10**9  # bytes of activations that are kept


class Activations(NamedTuple):
    """Chunks of documents, as the base's blocks were given them.

    Attributes:
        inputs_NLTD: the inputs of the blocks, fp32, padded on the right.
        mask_NT: true at tokens, false at padding.
        chunks: how many of the chunks belong to each document, in their order.
    """

    inputs_NLTD: Tensor
    mask_NT: Tensor
    chunks: tuple[int, ...]


def cut(ids: Ids, most: int) -> list[Ids]:
    """A document as chunks: as few as possible, of about the same length, in their order.

    Args:
        ids: its tokens; a document without any has no chunks.
        most: tokens of a chunk, at most.
    """
    count = -(-len(ids) // most)
    ends = (len(ids) * number // count for number in range(count + 1) if count)
    return [ids[start:end] for start, end in pairwise(ends)]


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A document as the context of a row is."""
    return list(GroundedEncoder(tokenizer, "auto", 1).context(text))


def opening_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before every text of a model."""
    return GroundedEncoder(tokenizer, "auto", 1).opening


def block_names(places: Iterable[Place]) -> list[str]:
    """The blocks that places lie in, by their depth: `model.layers.3` for `model.layers.3.mlp.down_proj`.

    Raises:
        UsageError: a place lies in no block.
    """
    found = dict[int, str]()
    for place in places:
        head, inside, _ = f".{place.name}".partition(f".{place.depth}.")
        if not inside:
            raise UsageError(
                f"adapter.target_modules: {place.name} lies in none of the base's blocks, whose inputs are read",
                "leave it out, or write `target_modules: [down_proj]`",
            )
        found[place.depth] = f"{head}.{place.depth}".removeprefix(".")
    return [found[depth] for depth in sorted(found)]


class Reader:
    """Reads documents with the frozen base.

    Args:
        model: the base; layers that a network's components are put on answer alone while it reads.
        names: of the blocks to look at, see `block_names`.
        width: of the base's hidden states.
        most: tokens of a chunk, at most.
        opening: tokens that stand before every text for this base, and so before every chunk; they are looked at, too.
        limit: bytes of activations that are kept.

    Attributes:
        kept: bytes that are kept now.
        again: chunks that were read and not kept, as there was no room.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        width: int,
        most: int,
        opening: Sequence[int] = (),
        limit: int = LIMIT,
    ) -> None:
        self.model, self.width, self.most, self.limit = model, width, most, limit
        self.opening = tuple(opening)
        self.blocks = [model.get_submodule(name) for name in names]
        self.kept = self.again = 0
        self._known: dict[bytes, Tensor] = {}

    def read(self, documents: Sequence[Sequence[int]]) -> Activations:
        """What the blocks are given for some documents.

        Args:
            documents: the tokens of each.
        """
        chunks = [cut(ids, self.most) for ids in documents]
        read = [self._one(chunk) for cuts in chunks for chunk in cuts]
        longest = max(map(len, read), default=0)
        inputs_NLTD = torch.zeros(len(read), len(self.blocks), longest, self.width, device=self.model.device)
        mask_NT = torch.zeros(len(read), longest, dtype=torch.bool, device=self.model.device)
        for number, inputs_TLD in enumerate(read):
            inputs_NLTD[number, :, : len(inputs_TLD)] = inputs_TLD.transpose(0, 1)
            mask_NT[number, : len(inputs_TLD)] = True
        return Activations(inputs_NLTD, mask_NT, tuple(map(len, chunks)))

    def room(self, tokens: int) -> int:
        """Bytes that a document of so many tokens takes where it is kept."""
        tokens += len(self.opening) * -(-tokens // self.most)
        return tokens * len(self.blocks) * self.width * self.model.dtype.itemsize

    def _one(self, chunk: Sequence[int]) -> Tensor:
        """The inputs of the blocks for one chunk. [T, L, D]"""
        ids = np.asarray([*self.opening, *chunk], dtype=np.int64)
        known = self._known.get(ids.tobytes())
        if known is None:
            known = self._look(torch.from_numpy(ids))
            size = known.numel() * known.element_size()
            if self.kept + size <= self.limit:
                self._known[ids.tobytes()] = known
                self.kept += size
            else:
                self.again += 1
        return known

    @torch.no_grad()
    def _look(self, ids_T: Tensor) -> Tensor:
        model, training = self.model, self.model.training
        body = getattr(model, model.base_model_prefix, model)  # without the head, whose answer nobody asks for
        ids = ids_T[None].to(model.device)
        model.eval()
        try:
            written = (module for module in model.modules() if isinstance(module, WrittenLinear))
            with silent(written), _inputs(self.blocks) as seen:
                body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            model.train(training)
        return torch.stack([seen[block][0] for block in self.blocks], 1)


def reader_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, places: Sequence[Place], most: int, context: int | None
) -> Reader:
    """What reads documents for a network that writes for these places.

    Args:
        model, tokenizer: of the base.
        places: that are written for.
        most: tokens of a chunk, at most.
        context: tokens that the base can read; None: nobody says.

    Raises:
        UsageError: a place lies in no block.
    """
    opening, width = opening_of(tokenizer), int(model.config.get_text_config().hidden_size)
    most = most if context is None else min(most, context - len(opening))
    try:
        return Reader(model, block_names(places), width, most, opening, LIMIT)
    except AttributeError as error:  # places that somebody else's file names
        raise UsageError(
            f"the base has no such block: {error}", "name the base that the network was trained on"
        ) from None


class Documents:
    """The contexts of rows, as what a network writes from; see hypernets/conditions.py.

    Args:
        reader: reads them.
        tokenizer: of the base.

    Attributes:
        width: of the base's hidden states.
    """

    def __init__(self, reader: Reader, tokenizer: PreTrainedTokenizerBase) -> None:
        self.reader, self.tokenizer, self.width = reader, tokenizer, reader.width

    def key(self, example: Example) -> bytes:
        assert isinstance(example, GroundedText)
        return self.key_of(example.context_ids)

    @staticmethod
    def key_of(ids: Sequence[int]) -> bytes:
        """What a document of these tokens is known by."""
        return np.asarray(ids, dtype=np.int32).tobytes()

    def of(self, keys: Sequence[bytes]) -> Activations:
        return self.reader.read([np.frombuffer(key, dtype=np.int32).tolist() for key in keys])

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the base is all that it takes."""
        return {}

    def of_text(self, text: str) -> bytes:
        """What a document is known by.

        Raises:
            DataError: it has no tokens.
        """
        ids = tokens_of(self.tokenizer, text)
        if not ids:
            raise DataError("--document: there is no text to read", "name a file that says something")
        return self.key_of(ids)

    def chunks(self, key: bytes) -> int:
        """Chunks that a document is cut into."""
        return len(cut(np.frombuffer(key, dtype=np.int32), self.reader.most))


@contextmanager
def _inputs(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The hidden states that blocks are given inside the `with` block."""
    seen: dict[nn.Module, Tensor] = {}

    def note(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen[block] = (given[0] if given else named["hidden_states"]).detach()

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
