"""What a teacher reads before the first step (tasks/distillation.py), in batches of texts of about one length.

Rows about one context begin alike: where the model's cache can be shared (decoding/prefix.py), what all texts of a
batch begin with is read once for all of them, and then the rest of each. A document of 1,000 tokens with 100 questions
of 50 is so 6,000 tokens to read and not 105,000.

Dimensions: B texts of a batch, T tokens, N targets, V vocabulary.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dynlora_cli.data.batches import Batches
from dynlora_cli.data.examples import IGNORED, OneText
from dynlora_cli.decoding import prefix
from dynlora_cli.tasks.loss import evaluating, logits_at_targets

if TYPE_CHECKING:
    from transformers import Cache

    from dynlora_cli.data.batches import Batch
    from dynlora_cli.training.run import Run

TOKENS = 8192  # of a batch that the teacher reads, padding and all; what is read once counts for each of its texts


class Group(NamedTuple):
    """Texts that are read together.

    Attributes:
        same: tokens that all begin with, which are read once.
        lessons: the texts.
    """

    same: int
    lessons: list[OneText]


class Reading(NamedTuple):
    """A batch that the teacher reads: its texts, tokens of the longest, and how many of these are read before."""

    texts: int
    tokens: int
    same: int


def own_lessons(run: Run, lessons: Sequence[OneText]) -> Iterator[Batch]:
    """This process's batches, on its device; as many in every process.

    Args:
        run: of which the model, as it is while this is read, is the teacher.
        lessons: of all processes.
    """
    groups = grouped(lessons, share=_shares(run, lessons))
    first, every = run.accelerator.process_index, run.accelerator.num_processes
    each = -(-len(groups) // every)
    read: tuple[list[int], Cache] | None = None  # a beginning, and what the model keeps of it
    for number in range(first * each, (first + 1) * each):
        group = groups[min(number, len(groups) - 1)]
        begin = list(group.lessons[0].input_ids[: group.same])
        if begin and (read is None or read[0] != begin):
            read = begin, _read(run, begin)
        yield _batch(run, group, read[1] if begin and read else None)


def _shares(run: Run, lessons: Sequence[OneText]) -> bool:
    """Whether the model says of a text the same where its beginning is read before; all processes ask together.

    What is left of rounding is far less than what the beginning changes.
    """
    could = prefix.can_share(run.model) and not (run.recipe.train.compile or run.recipe.train.shard_base)
    groups = [group for group in grouped(lessons, share=True) if group.same] if could else []
    if not groups:
        return False
    one = Group(groups[0].same, groups[0].lessons[:1])
    try:
        behind = _said(run, _batch(run, one, _read(run, list(one.lessons[0].input_ids[: one.same]))))
        whole, without = _said(run, _batch(run, Group(0, one.lessons))), _said(run, _batch(run, one))
        off, matters = (float((other - whole).abs().max()) for other in (behind, without))
        same = off <= 0.001 or off <= min(0.05, 0.25 * matters)
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a model that keeps something else
        same = False
    (votes,) = run.total(float(same))
    return votes == run.accelerator.num_processes


def _said(run: Run, batch: Batch) -> Tensor:
    """Probabilities at the targets of a batch. [N, V]"""
    with evaluating(run.model), run.accelerator.autocast():
        return logits_at_targets(run.model, batch)[0].softmax(-1)


def _read(run: Run, begin: list[int]) -> Cache:
    with evaluating(run.model), run.accelerator.autocast():
        return prefix.read(run.model, begin, 1)


def _batch(run: Run, group: Group, kept: Cache | None = None) -> Batch:
    """The texts of a group without their beginning, or behind it, where it is given what the model keeps of that."""
    rest = [OneText(text.input_ids[group.same :], text.labels[group.same :], text.row) for text in group.lessons]
    longest, pad = max(len(text.input_ids) for text in rest), int(run.base.tokenizer.pad_token_id)
    batches = Batches.in_order(rest, micro_batch_size=len(rest), max_length=longest, pad_id=pad)
    batch = batches.step(0, 0)[0].to(run.accelerator.device)
    if kept is None:
        return batch
    cache, mask_BT = copy.deepcopy(kept), batch.inputs["attention_mask"]
    cache.batch_repeat_interleave(len(mask_BT))
    mask_BT = torch.cat([mask_BT.new_ones(len(mask_BT), group.same), mask_BT], 1)
    inputs = {**batch.inputs, "attention_mask": mask_BT, "past_key_values": cache, "use_cache": True}
    return replace(batch, inputs=inputs)  # type: ignore[arg-type]


def grouped(lessons: Sequence[OneText], *, share: bool) -> list[Group]:
    """Texts in groups that fit into a batch, the shortest first in each."""
    shelves = _shelves(lessons) if share else [Group(0, list(lessons))]
    groups: list[Group] = []
    for same, texts in shelves:
        groups.append(Group(same, []))
        for text in sorted(texts, key=lambda text: len(text.input_ids)):
            held = groups[-1].lessons
            # The first text goes alone: by it, a model shows whether its head can be left out (kernels).
            if held and (len(groups) == 1 or (len(held) + 1) * len(text.input_ids) > TOKENS):
                groups.append(Group(same, []))
            groups[-1].lessons.append(text)
    return groups


def largest_reading(lessons: Sequence[OneText], *, share: bool) -> Reading:
    """The largest batch that a teacher reads.

    Args:
        lessons: all of them.
        share: what texts begin with may be read once for all.
    """
    readings = [
        Reading(len(texts), max(len(text.input_ids) for text in texts), same)
        for same, texts in grouped(lessons, share=share)
    ]
    return max(readings, key=lambda reading: reading.texts * reading.tokens)


def _shelves(lessons: Sequence[OneText]) -> list[Group]:
    """Texts with a long common beginning together, at least half of each; those that have none in one group."""
    found: list[Group] = []
    alone: list[OneText] = []
    for text in sorted(lessons, key=lambda text: array("i", text.input_ids).tolist()):
        last = found[-1] if found else Group(0, [])
        same = _alike(last.lessons[0].input_ids[: last.same], text) if last.lessons else 0
        if same >= prefix.LEAST and 2 * same >= len(text.input_ids):
            last.lessons.append(text)
            found[-1] = Group(same, last.lessons)
        else:
            found.append(Group(_before_answer(text), [text]))
    kept = [group for group in found if len(group.lessons) > 1]
    alone = [text for group in found if len(group.lessons) == 1 for text in group.lessons]
    return [*kept, *([Group(0, alone)] if alone else [])]


def _alike(begin: Sequence[int], text: OneText) -> int:
    """Tokens that a text and the beginning of others have in common, before its answer."""
    pairs = zip(begin, text.input_ids[: _before_answer(text)], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _before_answer(text: OneText) -> int:
    """Tokens before the one from which the first target is told."""
    return next(place for place, label in enumerate(text.labels) if label != IGNORED) - 1
