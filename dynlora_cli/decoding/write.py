"""Tokens that a model writes: several prompts at once, each as if it were alone.

The loop and its caches are transformers' `generate`. What is special of a row hangs on it from outside: how its tokens
are chosen (decoding/draw.py), at which of them it ends, and whether somebody still waits for it.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from dynlora_cli.decoding.draw import Draw
from dynlora_cli.decoding.pieces import Pieces
from dynlora_cli.decoding.sampling import Sampling
from dynlora_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reason = Literal["stop", "length", "cancelled"]
OnPiece = Callable[[int, str], None]
Cancelled = Callable[[int], bool]


@dataclass(frozen=True)
class Written:
    """One answer.

    Attributes:
        ids: its tokens, without the one that ended it.
        text: of these, without special tokens, up to a stop string.
        finish_reason: an end or a stop string came, no room was left, or nobody waits any more.
        prompt_tokens: how long the prompt was.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: Reason
    prompt_tokens: int


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    ends: Sequence[Collection[int]],
    *,
    context: int | None,
    continues: Sequence[bool] = (),
    on_piece: OnPiece | None = None,
    cancelled: Cancelled | None = None,
) -> list[Written]:
    """Write an answer to each prompt.

    Args:
        model: in evaluation mode, with whatever is attached to it.
        tokenizer: of the answers, with a pad token.
        prompts: token ids, none of them empty.
        samplings: one for each prompt.
        ends: for each prompt the tokens that end its answer.
        context: tokens that prompt and answer may have together (of an encoder-decoder: each); None where nobody knows.
        continues: for each prompt whether the answer goes on in the middle of its text, so that a space between the two
            is part of the answer; by default no.
        on_piece: takes the number of a prompt and a piece of text, as it comes. The pieces of a prompt are its text.
        cancelled: asked after each token whether a prompt's answer is still wanted.

    Returns:
        The answers in the order of the prompts. Each is what it would be alone, as far as the model's own rounding
        allows: padding and batch size change sums in their last bits.

    Raises:
        UsageError: a prompt leaves no room in the context.
        MeasureError: the model's logits are NaN.
    """
    two = bool(model.config.is_encoder_decoder)
    rows = [
        _Row(
            number,
            tuple(prompt),
            samplings[number],
            frozenset(ends[number]),
            _room(prompt, samplings[number], context, two),
        )
        for number, prompt in enumerate(prompts)
    ]
    for row in rows:
        goes_on = bool(continues) and continues[row.number] and not two
        row.pieces = Pieces(tokenizer, row.sampling.stop_strings, row.prompt if goes_on else ())
    pad = tokenizer.pad_token_id
    for batch in _batches(rows, None if two else context):
        _write_batch(model, batch, 0 if pad is None else int(pad), on_piece, cancelled)
    return [row.written() for row in rows]


def own_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Where a base model itself stops: the tokenizer's end of text, and what its generation config adds."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    return {int(end) for end in found if end is not None}


@dataclass(eq=False)
class _Row:
    """A prompt, and its answer as far as it goes."""

    number: int
    prompt: tuple[int, ...]
    sampling: Sampling
    ends: frozenset[int]
    room: int
    ids: list[int] = field(default_factory=list)
    reason: Reason | None = None
    pieces: Pieces = field(init=False)

    def take(self, token: int, on_piece: OnPiece | None, cancelled: Cancelled | None) -> None:
        """The next token."""
        if token in self.ends:
            self._end("stop", on_piece)
            return
        self.ids.append(token)
        self._show(self.pieces.push(token), on_piece)
        if self.pieces.stopped:
            self._end("stop", on_piece)
        elif len(self.ids) >= self.room:
            self._end("length", on_piece)
        elif cancelled is not None and cancelled(self.number):
            self._end("cancelled", on_piece)

    def written(self) -> Written:
        assert self.reason is not None
        return Written(tuple(self.ids), self.pieces.text, self.reason, len(self.prompt))

    def _end(self, reason: Reason, on_piece: OnPiece | None) -> None:
        self._show(self.pieces.finish(), on_piece)
        # What was held back at the last token may be a stop string after all.
        self.reason = "stop" if self.pieces.stopped else reason

    def _show(self, piece: str, on_piece: OnPiece | None) -> None:
        if piece and on_piece is not None:
            on_piece(self.number, piece)


class _Rows(StoppingCriteria):
    """Hands each row its new token, and says which rows have come to their end."""

    def __init__(self, rows: Sequence[_Row], on_piece: OnPiece | None, cancelled: Cancelled | None) -> None:
        self.rows, self.on_piece, self.cancelled = rows, on_piece, cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_others: Any) -> Any:  # noqa: ARG002 - transformers' signature
        """[B], boolean"""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if row.reason is None:
                row.take(token, self.on_piece, self.cancelled)
        return torch.tensor([row.reason is not None for row in self.rows], device=input_ids.device)


def _room(prompt: Sequence[int], sampling: Sampling, context: int | None, two: bool) -> int:
    """Tokens that an answer may have.

    Raises:
        UsageError: none.
    """
    if not prompt:
        raise UsageError("a prompt without a single token cannot be answered", "write something")
    left = sampling.max_new_tokens if context is None else context - (0 if two else len(prompt))
    if left < 1 or (two and context is not None and len(prompt) > context):
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, and the model's context {context:,}"
            + ("" if two else ": no room is left for an answer"),
            "shorten it",
        )
    return min(left, sampling.max_new_tokens)


def _batches(rows: Sequence[_Row], context: int | None) -> Iterator[list[_Row]]:
    """Rows that are written together.

    A row whose answer has ended stays in its batch until the last one has, and must not leave the context meanwhile:
    some models have no positions there. So one that would is written in a later batch.
    """
    waiting = list(rows)
    while waiting:
        longest = max(row.room for row in waiting)
        now = [row for row in waiting if context is None or len(row.prompt) + longest <= context]
        yield now
        waiting = [row for row in waiting if row not in now]


def _write_batch(
    model: PreTrainedModel, rows: Sequence[_Row], pad: int, on_piece: OnPiece | None, cancelled: Cancelled | None
) -> None:
    two = bool(model.config.is_encoder_decoder)
    width = max(len(row.prompt) for row in rows)
    ids_BT = torch.full((len(rows), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for line, row in enumerate(rows):
        length = len(row.prompt)
        place = slice(0, length) if two else slice(width - length, width)
        ids_BT[line, place] = torch.tensor(row.prompt)
        mask_BT[line, place] = 1
    starts = [0 if two else width - len(row.prompt) for row in rows]  # a decoder's tokens have no padding
    draw: Any = LogitsProcessorList([Draw([row.sampling for row in rows], starts)])
    generate: Any = model.generate
    with _without_own_wishes(model):
        generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max(row.room for row in rows),
                do_sample=False,
                use_cache=True,
                pad_token_id=pad,
                decoder_start_token_id=_start(model),
            ),
            logits_processor=draw,
            stopping_criteria=StoppingCriteriaList([_Rows(rows, on_piece, cancelled)]),
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
