"""A model that has a chunk of a document in its prompt, and writes questions about it, or answers them.

It is the base, with the adapter that the run goes on from where there is one (`adapter.from`).

The prompt of an answer is what the teacher of context distillation will see (data/grounded.py): the chunk and the
question as `train.context_layout` puts them together, in the model's chat template where it has one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli.adapters.attach import attached
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.chat.ways import Ways
from dynlora_cli.data.grounded import in_layout, refuse_layout
from dynlora_cli.data.load import load_data
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.decoding.write import Listener, Row, Written, own_ends, write
from dynlora_cli.documents import requests
from dynlora_cli.documents.chunks import CHUNK, Chunk, cut
from dynlora_cli.documents.requests import STOP, read_request
from dynlora_cli.errors import DynloraError, Interrupted, UsageError
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.generation.voice import Voice, voice_of
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.find import refuse_no_writer
from dynlora_cli.models.load import Base, load_base, precision_of
from dynlora_cli.tasks import task as tasks
from dynlora_cli.training.origin import fitting_origin

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.recipe import Recipe

BATCH = 8  # answers that are written together
REQUEST_TOKENS = 64  # of the longest request that is taken
TEMPERATURE, TOP_P = 0.8, 0.95  # of questions; answers are greedy
LEAST_CHUNK = 16  # tokens
JOINTS = 8  # tokens by which texts may be more when they are put together
_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f][\"'\u201d)]*(?=\s|$)")
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Reader:
    """A model's tokenizer and the form in which it is asked: what is known before its weights are loaded.

    Attributes:
        recipe: of the run that is to be.
        files: of the base model.

    Raises:
        UsageError: of `train.context_layout`, that it has no place for a chunk or a question; of the model, that it
            does not write.
    """

    recipe: Recipe
    files: BaseFiles

    def __post_init__(self) -> None:
        refuse_layout(self.layout)
        refuse_no_writer(self.files.folder)

    @property
    def layout(self) -> str:
        """How a chunk and a question stand in one prompt."""
        objective: Any = self.recipe.train
        return str(objective.context_layout)

    def with_context(self, chunk: str, request: str) -> str:
        """What the teacher reads: a chunk, and what is asked about it."""
        return in_layout(self.layout, chunk, request)

    def ids(self, voice: Voice, chunk: str, request: str) -> tuple[int, ...]:
        """The tokens of that, up to where the answer begins."""
        text = self.with_context(chunk, request)
        if not voice.chat:
            return voice.prompt_ids(text)
        return voice.chat_ids([{"role": "user", "content": text}], None)[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.files.tokenizer

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def marks(self, text: str) -> list[str]:
        """The model's special tokens that stand in a text, such as the end of a turn."""
        own = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        return sorted(mark for mark in own if mark in text)

    def voice(self, ends: set[int]) -> Voice:
        """How the model is asked, as the rows of the run will be written.

        Args:
            ends: tokens at which the model itself stops.
        """
        dataset = self.recipe.dataset
        found = voice_of("base", None, self.tokenizer, self.recipe.model, ends)
        ways = Ways(dataset.chat_template_kwargs, dataset.system, dataset.reasoning)
        chat = found.chat and dataset.chat is not False
        return replace(found, ways=ways, chat=chat, separator="" if chat else dataset.separator)

    @cached_property
    def chat(self) -> bool:
        """Whether it can be asked: it has a chat template, and the recipe does not leave it out."""
        return self.voice(set()).chat

    def request_tokens(self, given: Sequence[str] = ()) -> int:
        """Tokens that a request may have: of those that a person gives the longest.

        Args:
            given: requests of a person; none: the model writes them.
        """
        if given:
            return max(map(self.count, given))
        context = self.files.context_length
        return REQUEST_TOKENS if context is None else min(REQUEST_TOKENS, max(LEAST_CHUNK, context // 8))

    def chunk_tokens(self, wanted: int | None, request: int, answer: int) -> int:
        """Tokens that a chunk may have.

        Args:
            wanted: as a person says; None: 512, or what the model's context leaves.
            request, answer: tokens that these may have.

        Raises:
            UsageError: that leaves no room for requests and answers.
        """
        context = self.files.context_length
        if context is None:
            return wanted or CHUNK
        form = len(self.ids(self.voice(set()), ".", ".")) + JOINTS
        room = context - form - request - answer
        if (wanted or LEAST_CHUNK) > room:
            said = f"--chunk-tokens {wanted}" if wanted else f"answers of {answer} tokens"
            shorter = (
                "allow shorter ones: --answer-tokens 32" if answer > request else "leave the longest out of --data"
            )
            hint = f"--chunk-tokens {room} is the most" if room >= LEAST_CHUNK else shorter
            raise UsageError(
                f"{said}: {self.recipe.model.name_or_path} has a context of {context:,} tokens, in which {request} are "
                f"for a question and {answer} for its answer: that leaves {max(0, room)}",
                hint,
            )
        return min(wanted or CHUNK, room)

    def refuse_cut(self, request: int, answer: int) -> None:
        """Check that a row has room for an answer that the model writes: training reads no more than `max_length`.

        Args:
            request, answer: tokens that these may have.

        Raises:
            UsageError: the answer would be cut.
        """
        longest = self.recipe.dataset.max_length
        needed = len(self.ids(self.voice(set()), "", ".")) + JOINTS + request + answer
        if needed > longest:
            shorter = longest - (needed - answer)
            fewer = f", or allow shorter answers: --answer-tokens {shorter}" if shorter > 0 else ""
            raise UsageError(
                f"dataset.max_length {longest}: a question of {request} tokens and its answer of {answer} may have "
                f"{needed:,} in all, and what is beyond would not be learned",
                f"allow more: --set dataset.max_length={needed}{fewer}",
            )


class Writer:
    """The model, in memory.

    Args:
        reader: its tokenizer and form.
        request_tokens, answer_tokens: that a request and an answer may have.
        stopped: asked after each token whether to give up.

    Raises:
        UsageError: of `adapter.from`, that no run on this base can go on from it.
    """

    def __init__(
        self, reader: Reader, request_tokens: int, answer_tokens: int, stopped: Stopped = lambda: False
    ) -> None:
        self.reader, self.stopped = reader, stopped
        self.request_tokens, self.answer_tokens = request_tokens, answer_tokens
        recipe, files = reader.recipe, reader.files
        files.refuse_code()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.base: Base = load_base(recipe.model, files, files.tokenizer, device=device, labels=None, seed=recipe.seed)
        self._on = ExitStack()
        if recipe.adapter.origin:  # what the run begins with, and so its teacher, which has looked before it trains
            adapter = fitting_origin(recipe, self.base, [])  # its notes are the run's, which reads it again
            self._on.enter_context(attached(self.base.model, adapter))
        self.base.model.requires_grad_(False)
        self.base.model.eval()
        self.voice = reader.voice(own_ends(self.base.model, files.tokenizer))

    def ask(self, chunk: Chunk, begin: int, many: int) -> list[tuple[str, str]]:
        """Requests about a chunk, as the model writes them, each with its kind.

        Every part of the chunk is asked about in one way after the other, and then again, drawn at random.

        Args:
            chunk: of the document.
            begin: tries at this chunk before.
            many: tries now; of those that fail there is no request.
        """
        tries = requests.tries(chunk.text)
        rows, told = [], []
        for number in range(begin, begin + many):
            way, part = tries[number % len(tries)]
            part = self._fitting(chunk.title, part, way)
            if not part:
                continue
            drawn: dict[str, Any] = {}
            if number >= len(tries):
                seed = _seed(self.reader.recipe.seed, chunk.text, number)
                drawn = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "seed": seed}
            sampling = Sampling(max_new_tokens=self.request_tokens, stop_strings=(STOP,), **drawn)
            ids = self.voice.text_ids(requests.prompt(chunk.title, part, way))
            rows.append(Row(self.voice.tokenizer, ids, sampling, self.voice.ends, continues=True))
            told.append(way)
        texts = [
            read_request(one.text, way, chunk.title, chunk.text)
            for way, one in zip(told, self._write(rows), strict=True)
        ]
        return [(way.kind, text) for way, text in zip(told, texts, strict=True) if text]

    def _fitting(self, title: str, part: str, way: requests.Way) -> str:
        """So much of a part as the model's context holds behind the examples; empty where that is next to nothing."""
        context = self.reader.files.context_length
        if context is None:
            return part
        form = len(self.voice.text_ids(requests.prompt(title, ".", way)))
        room = context - form - self.request_tokens - JOINTS
        return cut(part, self.reader.count, room)[0] if room >= LEAST_CHUNK else ""

    def answer(self, chunk: Chunk, prompts: Sequence[str]) -> list[str]:
        """Answers by the chunk; empty where the model has none."""
        sampling, voice = Sampling(max_new_tokens=self.answer_tokens), self.voice
        ids = [self.reader.ids(voice, chunk.text, prompt) for prompt in prompts]
        rows = [Row(voice.tokenizer, one, sampling, voice.ends, continues=not voice.chat) for one in ids]
        return [_whole(written) for written in self._write(rows)]

    def loss(self, rows: Path) -> float | None:
        """Mean loss of the answers in a file of prompts with their chunks and completions, in nats per token.

        The rows are written as those of the run are, so that it compares with the run's held-out loss.
        """
        recipe, files = self.reader.recipe, self.reader.files
        source = {"path": str(rows), "format": "completion"}
        dataset = type(recipe.dataset).model_validate(
            {**recipe.dataset.model_dump(), "train": [source], "val": [], "val_size": 0, "max_length": 1 << 20}
        )
        data = load_data(
            dataset,
            files.tokenizer,
            task=tasks.of(recipe.model),
            seed=recipe.seed,
            max_length=files.context_length,
            table=files.table_rows,
            to_measure=True,
        )
        pad, device = int(files.tokenizer.pad_token_id), self.base.model.device
        longest = max(example.tokens for example in data.train)
        batches = Batches.in_order(data.train, micro_batch_size=BATCH, max_length=longest, pad_id=pad)
        on_device = (batch.to(device) for at in range(batches.steps_per_epoch) for batch in batches.step(0, at))
        return held_out(self.base.model, on_device, autocast=precision_of(self.base))["loss"]

    def heed(self) -> None:
        """Stop here if somebody asked for it.

        Raises:
            Interrupted: somebody did.
        """
        if self.stopped():
            raise Interrupted("interrupted while the rows were written; those that are done are kept", "add --resume")

    def _write(self, rows: Sequence[Row]) -> list[Written]:
        """What the model writes.

        Raises:
            Interrupted: somebody asked to stop. DynloraError: the logits became NaN.
        """
        pad = self.base.tokenizer.pad_token_id
        with precision_of(self.base)():
            written = write(
                self.base.model,
                rows,
                pad_id=0 if pad is None else int(pad),
                context=self.reader.files.context_length,
                listener=Listener(cancelled=lambda _: self.stopped()),
                shares=True,
            )
        self.heed()
        if any(one.finish_reason == "failed" for one in written):
            raise DynloraError("the model's logits became NaN while it wrote", "try --set model.dtype=float32")
        return written


def _seed(seed: int, *parts: object) -> int:
    """A seed of its own for each text that is drawn, the same each time."""
    return int.from_bytes(hashlib.sha256(repr((seed, *parts)).encode("utf-8", "replace")).digest()[:7], "big")


def _whole(written: Written) -> str:
    """An answer: up to where it begins to repeat itself, and without a sentence for which there was no room."""
    text, said, start = written.text.strip(), set[str](), 0
    for match in _SENTENCE_END.finditer(text):
        sentence = requests.same(text[start : match.end()])
        if sentence in said:
            return text[:start].strip()
        said.add(sentence)
        start = match.end()
    return text[:start].strip() if written.finish_reason == "length" and start else text
