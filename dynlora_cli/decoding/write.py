"""Tokens that a model writes: several prompts at once, each as if it were alone.

The loop and its caches are transformers' `generate`. What is special of a row hangs on it from outside: how its tokens
are chosen (decoding/draw.py), at which of them it ends, and whether somebody still waits for it.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dynlora_cli.decoding import prefix
from dynlora_cli.decoding.draw import Draw
from dynlora_cli.decoding.pieces import Pieces
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reason = Literal["stop", "length", "cancelled", "failed", "paused"]


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        ids: its tokens, without the one that ended it.
        text: of these, without special tokens, up to a stop string.
        finish_reason: stop: an end or a stop string came; length: no room was left; cancelled: nobody waits any more;
            failed: the model's logits became NaN; paused: it is to go on later.
        prompt_tokens: how long the prompt was.
        row: of an answer that is to go on: give it to `write` again.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Reason
    prompt_tokens: int
    row: Row | None = None


@dataclass(frozen=True)
class Listener:
    """Who hears of answers while they are written. Rows have the numbers of their places in the call.

    Attributes:
        piece: takes a row and a piece of its text, as it comes; the pieces of a row are its text.
        done: takes a row and its whole answer, at once when that has ended.
        cancelled: asked after each token whether a row's answer has become unwanted.
        paused: asked after each token of the batch whether to stop here and go on later.
    """

    piece: Callable[[int, str], None] | None = None
    done: Callable[[int, Written], None] | None = None
    cancelled: Callable[[int], bool] | None = None
    paused: Callable[[], bool] | None = None


class Row:
    """A prompt, and its answer as far as it goes.

    Args:
        tokenizer: of the answer.
        prompt: token ids.
        sampling: how the answer is written.
        ends: tokens at which it ends.
        continues: it goes on in the middle of the prompt's text, so that a space between the two is part of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        sampling: Sampling,
        ends: Collection[int],
        *,
        continues: bool = False,
    ) -> None:
        self.prompt, self.sampling, self.ends = list(prompt), sampling, frozenset(ends)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._chance: Tensor | None = None
        self.pieces = Pieces(tokenizer, sampling.stop_strings, self.prompt if continues else ())
        self.ids: list[int] = []
        self.reason: Reason | None = None

    def written(self) -> Written:
        """The answer so far."""
        unfinished = self.reason is None
        return Written(
            tuple(self.ids),
            self.pieces.text,
            self.reason or "paused",
            len(self.prompt),
            self if unfinished else None,
        )

    def chance(self) -> Tensor:
        """The random number for the next token, the same until that has come."""
        if self._chance is None:
            self._chance = torch.rand((), generator=self._generator, dtype=torch.float64)
        return self._chance

    def take(self, token: int, room: int) -> str:
        """The next token; gives the piece of text that it brings.

        Args:
            room: tokens that the answer may have.
        """
        self._chance = None
        if token in self.ends:
            return self.end("stop")
        self.ids.append(token)
        piece = self.pieces.push(token)
        if self.pieces.stopped:
            return piece + self.end("stop")
        return piece + self.end("length") if len(self.ids) >= room else piece

    def end(self, reason: Reason) -> str:
        """No more tokens; gives the text that was held back."""
        piece = self.pieces.finish()
        self.reason = "stop" if self.pieces.stopped else reason  # what was held back may end in a stop string after all
        return piece


@torch.no_grad()
def write(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    pad_id: int,
    context: int | None,
    listener: Listener = Listener(),
    speaking: Callable[[Sequence[int]], AbstractContextManager[Any]] = nullcontext,
    shares: bool = False,
) -> list[Written]:
    """Write an answer to each prompt, or go on with one.

    Args:
        model: in evaluation mode, with whatever is attached to it.
        rows: each a prompt, and perhaps the beginning of its answer.
        pad_id: any token id of the model.
        context: tokens that prompt and answer may have together (of an encoder-decoder: each); None where nobody knows.
        listener: hears of the answers while they are written. Encoder-decoders do not pause.
        speaking: the model as it is to be for some rows, which it takes the numbers of: they are written together.
        shares: what all prompts begin with is read once, if the model can do that. For a model that is the same for all
            rows, and rows without a repetition penalty.

    Returns:
        The answers in the order of the rows. Each is what it would be alone, as far as the model's own rounding allows:
        padding and batch size change sums in their last bits.

    Raises:
        UsageError: a prompt is empty, or leaves no room in the context.
    """
    two = bool(model.config.is_encoder_decoder)
    rooms = [_room(row, context, two) for row in rows]
    shares = shares and prefix.can_share(model)
    if two:  # its answer could not go on: what it has written is no part of its prompt
        listener = replace(listener, paused=None)
    for batch, steps in _batches(rows, rooms, None if two else context):
        texts = [rows[number].prompt if two else rows[number].prompt + rows[number].ids for number in batch]
        width = max(map(len, texts))
        starts = [0 if two else width - len(text) for text in texts]  # what a decoder has written has no padding
        watch = _Watch(rows, rooms, batch, starts, listener)
        same = prefix.shared(texts) if shares else 0
        with speaking(batch):
            _write_batch(model, texts, steps, pad_id, watch, same)
        if watch.has_paused:
            break
    return [row.written() for row in rows]


def own_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Where a base model itself stops: the tokenizer's end of text, and what its generation config adds."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    return {int(end) for end in found if end is not None}


class _Watch(StoppingCriteria):
    """Hands each row its new token, tells the listener, and says which rows have come to their end.

    Args:
        rows, rooms: of the whole call.
        batch: numbers of those that are written now, in the order of the batch.
        starts: where the own tokens of each of those begin, behind its padding.

    Attributes:
        draw: chooses the tokens.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        rooms: Sequence[int],
        batch: Sequence[int],
        starts: Sequence[int],
        listener: Listener,
    ) -> None:
        self.rows, self.rooms, self.batch, self.starts, self.listener = rows, rooms, batch, starts, listener
        self.has_paused = False
        rows_now = [rows[number] for number in batch]
        self.draw = Draw([row.sampling for row in rows_now], starts, [row.chance for row in rows_now])

    def __call__(self, input_ids: Tensor, scores: Any, **_others: Any) -> Any:  # noqa: ARG002 - transformers' signature
        """[B], boolean"""
        if not self.has_paused:  # on some devices one more step has begun by then
            for line, (number, token) in enumerate(zip(self.batch, input_ids[:, -1].tolist(), strict=True)):
                if self.rows[number].reason is None:
                    self._take(number, None if line in self.draw.failed else token)
            paused = self.listener.paused
            self.has_paused = paused is not None and any(self._is_open) and paused()
        ended = [self.has_paused or not is_open for is_open in self._is_open]
        return torch.tensor(ended, device=input_ids.device)

    @property
    def _is_open(self) -> list[bool]:
        return [self.rows[number].reason is None for number in self.batch]

    def _take(self, number: int, token: int | None) -> None:
        """A row's next token; None: there is none, for its logits are NaN."""
        row, listener = self.rows[number], self.listener
        piece = row.end("failed") if token is None else row.take(token, self.rooms[number])
        if row.reason is None and listener.cancelled is not None and listener.cancelled(number):
            piece += row.end("cancelled")
        if piece and listener.piece is not None:
            listener.piece(number, piece)
        if row.reason is not None and listener.done is not None:
            listener.done(number, row.written())


def _room(row: Row, context: int | None, two: bool) -> int:
    """Tokens that an answer may have.

    Raises:
        UsageError: none.
    """
    prompt, wanted = len(row.prompt), row.sampling.max_new_tokens
    if not prompt:
        raise UsageError("a prompt without a single token cannot be answered", "write something")
    if context is None:
        return wanted
    if two:
        if prompt > context:
            raise UsageError(f"the prompt has {prompt:,} tokens, and the model's context {context:,}", "shorten it")
        return min(context, wanted)
    refuse_full(prompt, context)
    return min(context - prompt, wanted)


def refuse_full(prompt: int, context: int) -> None:
    """Check that a decoder's prompt leaves room for an answer.

    Args:
        prompt: its tokens.
        context: tokens that prompt and answer may have together.

    Raises:
        UsageError: it leaves none.
    """
    if prompt >= context:
        raise UsageError(
            f"the prompt has {prompt:,} tokens, and the model's context {context:,}: no room is left for an answer",
            "shorten it",
        )


def _batches(rows: Sequence[Row], rooms: Sequence[int], context: int | None) -> Iterator[tuple[list[int], int]]:
    """Numbers of the rows that are written now, and for how many tokens: all that are open, in each batch.

    A row whose answer has ended stays in its batch to the batch's end, and must not leave the context meanwhile: some
    models have no positions there. So a batch ends where its longest row would, and the others go on in the next.
    """
    while waiting := [number for number, row in enumerate(rows) if row.reason is None]:
        steps = max(rooms[number] - len(rows[number].ids) for number in waiting)
        used = max(len(rows[number].prompt) + len(rows[number].ids) for number in waiting)
        yield waiting, steps if context is None else min(steps, context - used)


def _write_batch(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], steps: int, pad_id: int, watch: _Watch, same: int
) -> None:
    """Texts of one batch, gone on with. A decoder is padded on the left, an encoder on the right.

    The first `same` tokens, which all texts have, are read once; the padding stands behind them.
    """
    ids_BT = torch.full((len(texts), max(map(len, texts))), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for line, (text, start) in enumerate(zip(texts, watch.starts, strict=True)):
        place = slice(start + same, start + len(text))
        ids_BT[line, place] = torch.tensor(text[same:])
        mask_BT[line, place] = 1
    begun: dict[str, Any] = {}
    if same:
        ids_BT[:, :same], mask_BT[:, :same] = torch.tensor(texts[0][:same]), 1
        begun["past_key_values"] = prefix.read(model, texts[0][:same], len(texts))
    generate: Any = model.generate
    with _without_own_wishes(model):
        generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            **begun,
            generation_config=GenerationConfig(
                max_new_tokens=steps,
                do_sample=False,
                use_cache=True,
                pad_token_id=pad_id,
                decoder_start_token_id=_start(model),
            ),
            logits_processor=LogitsProcessorList([watch.draw]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )


def _start(model: PreTrainedModel) -> int | None:
    """The token that a decoder begins with."""
    if not model.config.is_encoder_decoder:
        return None
    start = getattr(model.config, "decoder_start_token_id", None)
    return getattr(model.generation_config, "decoder_start_token_id", None) if start is None else start


@contextmanager
def _without_own_wishes(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's own generation config: `generate` would take from it what ours leaves open (forced tokens)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
