"""Examples to micro-batches, with random access: `step(epoch, index)` depends on its arguments and nothing else.

    B  rows of a micro-batch     T  tokens of its longest row

A resumed run asks for the next index and gets what the uninterrupted run would have got. The rows of an optimizer step
depend on micro_batch_size x accumulation only, so 1 x 8 and 8 x 1 see the same rows.

Unpacked, rows of similar length share a step: an epoch is shuffled, sorted by length inside windows of 50 steps, cut
into steps, and the steps are shuffled. Packed, the rows are put into bins of `max_length` tokens once (best fit,
longest first); an epoch shuffles the bins. Positions start at 0 in each row of a bin, and no row sees another.

Where sources have weights, or rows of earlier runs are replayed, an epoch takes so many rows of each (data/mix.py), or
so many bins, which then hold rows of one source alone. All epochs have the same number of steps.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dynlora_cli.data.descriptions import described
from dynlora_cli.data.examples import IGNORED, Example, Judge
from dynlora_cli.data.mix import Span, drawn, each_once, evenly, passes
from dynlora_cli.data.rows.plan import Bin, Bins, Numbers, Plan, Turn, shuffled, sort_within
from dynlora_cli.data.rows.sequences import lengths_of

_T = TypeVar("_T")
_WINDOW = 50  # rows are sorted by length within so many steps


@dataclass(slots=True)
class Batch:
    """One micro-batch.

    Args:
        inputs: for `model(**inputs)`: input_ids [B, T] and attention_mask, [B, T], or [B, 1, T, T] when packed, with
            position_ids [B, T]; token_type_ids [B, T] where the examples have them.
        labels: [B, T], aligned with the logits: `labels[:, t]` is the target of `logits[:, t]`, -100 where there is
            none. Of a decoder as wide as its longest text. For a classifier [B].
        rows: `Example.row` of each example in it.
        tokens: tokens that are not padding.
        supervised: targets.
        places: of the targets in the flattened labels, [N]; made here on the CPU: on a GPU, Python would have to
            wait to learn how many there are.
        confidence: `Example.confidence` of each of `rows`; by default 1.
        spans: packed, where each of `rows` stands: its line, its first token and the one after it.
        columns: lines of `inputs` that stand together: of all rows the first, then of all rows the second, and so on.
            By default one for each row.
        widths: tokens of the longest line of each column.
        at_once: a judge gives all lines to the model together, and once.
        judge, extra: as of `Example`, for rows whose loss is no cross-entropy.
        line_keys: what each line is known by, where the judge remembers lines.
        examples: what it was made of, one for each line where it is not packed; as they are described in this pass.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    rows: list[int]
    tokens: int
    supervised: int
    places: Tensor | None = None
    confidence: Sequence[float] = ()
    spans: Sequence[tuple[int, int, int]] = ()
    columns: Sequence[int] = ()
    widths: Sequence[int] = ()
    at_once: bool = False
    judge: Judge | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    line_keys: Sequence[bytes] = ()
    examples: Sequence[Example] = ()

    def __post_init__(self) -> None:
        if self.places is None:
            self.places = (self.labels.flatten() != IGNORED).nonzero()[:, 0]
        if not self.confidence:
            self.confidence = [1.0] * len(self.rows)
        if not self.columns:
            self.columns = [len(self.inputs["input_ids"])]
        if not self.widths:
            self.widths = [self.inputs["input_ids"].shape[1]] * len(self.columns)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def in_one(self) -> Batch:
        """The same batch, whose lines a model reads all at once: for whoever looks at what its layers are given."""
        return replace(self, at_once=True)

    def pinned(self) -> Batch:
        """The same batch in pinned memory, from which a GPU copies while Python goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs, extra = ({name: change(value) for name, value in part.items()} for part in (self.inputs, self.extra))
        assert self.places is not None
        return replace(self, inputs=inputs, labels=change(self.labels), places=change(self.places), extra=extra)


@dataclass(frozen=True, slots=True)
class _Pool:
    """So many bins, and how many of them an epoch takes."""

    bins: int
    draws: int
    replayed: bool


class Batches:
    """The micro-batches of every step of every epoch.

    Args:
        examples: all of one task.
        micro_batch_size: rows (bins, when packed) of one forward pass.
        accumulation: micro-batches of one optimizer step, over all ranks.
        seed: of the order.
        max_length: capacity of a bin; no example may be longer.
        pad_id: token for padding, on the right, which carries no label and is masked.
        packing: put several examples in one row, where they are of a kind that packs.
        shuffle: False keeps the order of the examples, for evaluation and where a recipe asks for it. Replayed ones
            are then spread evenly between the others.
        spans: how many of the examples an epoch takes, source by source; none: all of them once.
        shards: number of ranks; a step's micro-batches are dealt to them in turn. A rank for which none is left gets
            one without targets and without rows, so that all ranks make the same number of forward passes.
        shard: this rank.
        mask_dtype: of the packed attention mask, as `packed_mask_dtype` gives it for a model.
        pin: the batches lie in pinned memory; for a GPU.
        even: make batches of few different widths, so that a captured or compiled shape is met again: `max_length`
            when packed, otherwise the longest row rounded up by at most an eighth.

    Raises:
        ValueError: an example longer than `max_length`, no examples, or packing of examples that do not pack.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        micro_batch_size: int,
        accumulation: int = 1,
        seed: int = 0,
        max_length: int,
        pad_id: int,
        packing: bool = False,
        shuffle: bool = True,
        spans: Sequence[Span] = (),
        shards: int = 1,
        shard: int = 0,
        mask_dtype: torch.dtype = torch.bool,
        pin: bool = False,
        even: bool = False,
    ) -> None:
        self.examples, self.pad_id, self.seed, self.packing, self.shuffle = examples, pad_id, seed, packing, shuffle
        self.micro_batch_size, self.step_size = micro_batch_size, micro_batch_size * accumulation
        self.shards, self.shard, self.mask_dtype, self.pin = shards, shard, mask_dtype, pin
        self.max_length, self.even = max_length, even
        self._prepared: dict[tuple[int, int], list[Batch]] = {}
        self.lengths = lengths_of(examples)
        if not len(examples) or self.lengths.max() > max_length:
            raise ValueError(f"an example is longer than max_length {max_length}" if len(examples) else "no examples")
        if packing and not examples[0].packs:
            raise ValueError("packing serves causal language models only")
        self._pools, self._bins = self._pooled(spans)
        self.rows_per_epoch = sum(span.draws for span in spans) or len(examples)
        self.steps_per_epoch = -(-sum(pool.draws for pool in self._pools) // self.step_size)
        self._plan = lru_cache(maxsize=2)(self._make_plan)  # an epoch's order is made once, not at every step

    @classmethod
    def in_order(cls, examples: Sequence[Example], *, micro_batch_size: int, max_length: int, pad_id: int) -> Batches:
        """For evaluation: each step is one micro-batch, the examples in their order."""
        return cls(examples, micro_batch_size=micro_batch_size, max_length=max_length, pad_id=pad_id, shuffle=False)

    def step(self, epoch: int, index: int) -> list[Batch]:
        """The micro-batches of one optimizer step on this rank.

        Args:
            epoch: counted from 0.
            index: of the step in its epoch, from 0 to `steps_per_epoch` - 1; the last step may have fewer rows.
        """
        return self._prepared.pop((epoch, index), None) or self._step(epoch, index)

    def epochs_after(self, step: int) -> float | None:
        """Passes over the rows after so many steps."""
        return step / self.steps_per_epoch

    def shown(self, steps: int) -> list[Example]:
        """The examples of the first so many steps, of all ranks, each once."""
        indices: set[int] = set()
        for step in range(steps):
            if len(indices) == len(self.examples):
                break
            epoch, index = divmod(step, self.steps_per_epoch)
            indices.update(itertools.chain.from_iterable(item for item, _ in self._plan(epoch)[index]))
        return [self.examples[index] for index in sorted(indices)]

    def prepare(self, epoch: int, index: int) -> None:
        """Make the step that will be asked for next; to be called while a GPU is at work on this one."""
        self._prepared = {(epoch, index): self._step(epoch, index)}

    def _step(self, epoch: int, index: int) -> list[Batch]:
        turns = self._plan(epoch)[index]
        cuts = [turns[at : at + self.micro_batch_size] for at in range(0, len(turns), self.micro_batch_size)]
        own = [self._batch(cut) for cut in cuts[self.shard :: self.shards]]
        if len(own) < -(-len(cuts) // self.shards):
            own.append(self._without_targets(cuts[-1]))
        return [batch.pinned() for batch in own] if self.pin else own

    def _make_plan(self, epoch: int) -> Plan:
        """What comes up in every step of an epoch."""
        turns, passed = self._drawn(epoch)
        size, steps = self.step_size, np.arange(self.steps_per_epoch, dtype=np.int32)
        if self.shuffle:
            # Text seeds are hashed by the standard library with SHA-512: the same order on every machine.
            chance = random.Random(f"{self.seed} {epoch}")
            order = shuffled(len(turns), chance).copy()
            if not self.packing:
                sort_within(order, self.lengths[self._bins.members[turns]], _WINDOW * size)
            turns, passed, steps = turns[order], passed[order], shuffled(len(steps), chance)
        return Plan(self._bins, turns, passed, steps, size)

    def _drawn(self, epoch: int) -> tuple[Numbers, Numbers]:
        """Numbers of the bins of an epoch, source by source, and passes; where the order stays, replayed ones between.

        Rows are replayed at the end of all, so they are the last pools.
        """
        parts, counts, start = [], [0], 0
        for number, pool in enumerate(self._pools):
            seed = f"{self.seed} walk {number}" if self.shuffle else None
            bins = drawn(pool.bins, pool.draws, epoch, seed) + np.int32(start)
            parts.append((bins, passes(pool.bins, pool.draws, epoch)))
            start += pool.bins
            if pool.replayed:
                counts.append(pool.draws)
            else:
                counts[0] += pool.draws
        if len(parts) == 1:
            return parts[0]
        order = evenly(counts)
        turns, passed = (np.concatenate(column) for column in zip(*parts, strict=True))
        return turns[order], passed[order]

    def _pooled(self, spans: Sequence[Span]) -> tuple[list[_Pool], Bins]:
        """How many bins each source has and an epoch takes; and the bins."""
        if each_once(spans):
            # Packed, rows of all sources then stand together.
            bins = self._binned(0, len(self.examples))
            return [_Pool(len(bins), len(bins), False)], bins
        pools, parts, start = [], [], 0
        for span in spans:
            bins = self._binned(start, start + span.rows)
            pools.append(_Pool(len(bins), max(1, round(len(bins) * span.draws / span.rows)), span.replayed))
            parts.append(bins)
            start += span.rows
        return pools, Bins.joined(parts)

    def _binned(self, start: int, stop: int) -> Bins:
        """Some examples in bins. Packed, longest first, and of equal ones in an order of the seed."""
        if not self.packing:
            return Bins.of_one(start, stop)
        order = shuffled(stop - start, random.Random(f"{self.seed} bins")) if self.shuffle else np.arange(stop - start)
        rows = (order + start).astype(np.int32)
        rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
        return Bins.packed(rows, self.lengths[rows], self.max_length)

    def _length(self, item: Bin) -> int:
        return sum(int(self.lengths[index]) for index in item)

    def _batch(self, turns: list[Turn]) -> Batch:
        bins = [item for item, _ in turns]
        passed = [number for item, number in turns for _ in item]
        rows = (self.examples[index] for item in bins for index in item)
        examples = [row.in_pass(self.seed, number) for row, number in zip(rows, passed, strict=True)]
        kind, width = examples[0], self._width(max(self._length(item) for item in bins))
        placed = [self._placed(item) for item in bins]
        columns = [] if self.packing else _columns([example.lines for example in examples])
        ids = torch.full((sum(map(len, columns)) or len(bins), width), self.pad_id)
        if self.packing:
            inputs = {"input_ids": ids, **self._packed(bins, width)}
            texts = [(line, start, each.input_ids) for line, there in enumerate(placed) for start, each in there]
        else:
            inputs = {"input_ids": ids, **self._padded(columns, examples, width)}
            texts = [(line, 0, text) for line, text in enumerate(itertools.chain(*columns))]
        for line, start, text in texts:
            ids[line, start : start + len(text)] = _tensor(text)
        labels = torch.from_numpy(kind.targets(placed, width, self._width))
        return Batch(
            inputs,
            labels,
            rows=[example.row for example in examples],
            tokens=sum(example.tokens for example in examples),
            supervised=len(examples) if kind.one_target else int((labels != IGNORED).sum()),
            confidence=[example.confidence for example in examples],
            spans=self._spans(placed) if self.packing else (),
            columns=[len(column) for column in columns],
            widths=[self._width(max(map(len, column))) for column in columns],
            judge=kind.judge,
            extra=kind.extra(examples),
            line_keys=list(itertools.chain(*_columns([example.line_keys() for example in examples]))),
            examples=[described(row, self.seed, number) for row, number in zip(examples, passed, strict=True)],
        )

    def _width(self, longest: int) -> int:
        if not self.even:
            return longest
        step = max(8, 1 << max(0, longest.bit_length() - 4))  # an eighth of the power of two below
        return self.max_length if self.packing else min(self.max_length, -(-longest // step) * step)

    def _placed(self, item: Bin) -> list[tuple[int, Example]]:
        """The examples of a bin with their first position in it."""
        placed, start = [], 0
        for index in item:
            placed.append((start, self.examples[index]))
            start += int(self.lengths[index])
        return placed

    @staticmethod
    def _spans(placed: list[list[tuple[int, Example]]]) -> list[tuple[int, int, int]]:
        there = ((line, *item) for line, items in enumerate(placed) for item in items)
        return [(line, start, start + len(example.input_ids)) for line, start, example in there]

    @staticmethod
    def _padded(columns: list[list[Sequence[int]]], examples: list[Example], width: int) -> dict[str, Tensor]:
        lengths = torch.tensor([len(text) for column in columns for text in column])
        inputs = {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}
        kinds = [example.token_types for example in examples]
        if any(kind is not None for kind in kinds):
            inputs["token_type_ids"] = torch.tensor(
                [[*(kind or ()), *[0] * (width - len(kind or ()))] for kind in kinds]
            )
        return inputs

    def _packed(self, bins: list[Bin], width: int) -> dict[str, Tensor]:
        """Positions that restart in each row, and a mask that is causal inside a row and closed between rows."""
        positions = torch.zeros(len(bins), width, dtype=torch.long)
        mask = torch.zeros(len(bins), 1, width, width, dtype=torch.bool)
        mask.diagonal(dim1=-2, dim2=-1).fill_(True)  # padding, too: softmax over no open position is NaN
        triangle = torch.ones(width, width, dtype=torch.bool).tril()
        for line, item in enumerate(bins):
            for start, example in self._placed(item):
                length = len(example.input_ids)
                own = slice(start, start + length)
                positions[line, own] = torch.arange(length)
                mask[line, 0, own, own] = triangle[:length, :length]
        if self.mask_dtype != torch.bool:
            closed = torch.finfo(self.mask_dtype).min
            mask = torch.zeros(mask.shape, dtype=self.mask_dtype).masked_fill(~mask, closed)
        return {"position_ids": positions, "attention_mask": mask}

    def _without_targets(self, turns: list[Turn]) -> Batch:
        batch, none = self._batch(turns[:1]), torch.empty(0, dtype=torch.long)
        labels = torch.full_like(batch.labels, IGNORED)
        return replace(batch, labels=labels, rows=[], tokens=0, supervised=0, places=none, confidence=(), spans=())


def _columns(lines: Sequence[Sequence[_T]]) -> list[list[_T]]:
    """Of the lines of every example: the first ones, the second ones of those that have two, and so on."""
    most = max(map(len, lines))
    return [[texts[number] for texts in lines if len(texts) > number] for number in range(most)]


def _tensor(tokens: Any) -> Tensor:
    """A tensor that shares an `array`'s memory: torch.tensor would read it number by number."""
    return torch.from_numpy(np.asarray(tokens, dtype=np.int32))
