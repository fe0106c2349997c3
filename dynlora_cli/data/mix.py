"""Which rows come up in an epoch: so many of each source, and of earlier runs.

A source of n rows and weight w gives round(w n) rows to every epoch, so all epochs have as many steps. The rows are
walked on and on in one fixed order: with weight 0.5 the second epoch goes on where the first one ended, and with
weight 2 an epoch has every row twice.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dynlora_cli.data.splits import Kept
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.config.sections import TrainSource

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Span:
    """Examples that stand beside each other and come up equally often: those of one source, or of one earlier run.

    Args:
        name: of the source, for people.
        rows: how many they are; the spans of a run cover all of its examples, in order.
        draws: how many of them an epoch takes.
        replayed: they are of an earlier run, and come up between the others.
    """

    name: str
    rows: int
    draws: int
    replayed: bool = False


def drawn(items: Sequence[_T], draws: int, epoch: int, seed: str | None) -> list[_T]:
    """Those of an epoch, which begin where the epoch before ended.

    Args:
        items: all of them.
        draws: of an epoch.
        epoch: counted from 0.
        seed: of the order in which they are walked; None: as they stand.
    """
    if draws == len(items):
        return list(items)
    walk = list(items)
    if seed is not None:
        random.Random(seed).shuffle(walk)
    return [walk[at % len(walk)] for at in range(epoch * draws, (epoch + 1) * draws)]


def passes(rows: int, draws: int, epoch: int) -> list[int]:
    """Of each of those that `drawn` gives of so many rows: how often it has come up before."""
    return [at // rows for at in range(epoch * draws, (epoch + 1) * draws)]


def evenly(parts: Sequence[Sequence[_T]]) -> list[_T]:
    """Several sequences as one, in which each is spread from the beginning to the end and keeps its order."""
    placed = [((at + 0.5) / len(part), item) for part in parts for at, item in enumerate(part)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def chosen(rows: list[Kept], most: int, seed: int) -> list[Kept]:
    """At most so many rows, in their order: whole prompts by a hash of the seed and the prompt.

    A prompt with more rows than are still wanted is passed over; if some are wanted after the last, it gives a part.
    """
    groups = Counter(row.prompt for row in rows)
    order = sorted(groups, key=lambda prompt: hashlib.sha256(b"rows %d:" % seed + prompt).digest())
    left, taken = most, dict[bytes, int]()
    for prompt in order:
        if groups[prompt] <= left:
            taken[prompt] = groups[prompt]
            left -= groups[prompt]
    for prompt in order if left else ():
        if prompt not in taken:
            taken[prompt] = min(left, groups[prompt])
            left -= taken[prompt]
    kept = []
    for row in rows:
        if taken.get(row.prompt, 0):
            taken[row.prompt] -= 1
            kept.append(row)
    return kept


def spans_of(rows: Sequence[Kept], sources: Sequence[TrainSource]) -> list[Span]:
    """The training rows by source; rows of one source stand beside each other."""
    counts = Counter(row.source for row in rows)
    return [
        Span(source.path, counts[at], max(1, round(source.weight * counts[at])))
        for at, source in enumerate(sources)
        if counts[at]
    ]


def each_once(spans: Sequence[Span]) -> bool:
    """Whether an epoch has every row once."""
    return all(span.draws == span.rows and not span.replayed for span in spans)


def mix_on_record(spans: Sequence[Span]) -> list[dict[str, Any]]:
    """What an epoch is made of, as data."""
    return [
        {"source": span.name, "rows": span.rows, "draws": span.draws} | ({"replayed": True} if span.replayed else {})
        for span in spans
    ]


def mix_notes(spans: Sequence[Span]) -> list[str]:
    """What an epoch is made of, where it has not every row once: `an epoch has 30 rows: 20 of a.jsonl (...`."""
    if each_once(spans):
        return []
    parts = [f"{span.draws:,} of {span.name} ({_how_often(span)})" for span in spans]
    return [f"an epoch has {counted(sum(span.draws for span in spans), 'row')}: {', '.join(parts)}"]


def _how_often(span: Span) -> str:
    rows = counted(span.rows, "row")
    if span.draws == span.rows:
        return f"{rows}, each once"
    times = span.draws / span.rows
    return f"{rows}, each {f'{times:,.0f}' if times >= 100 else f'{times:.3g}'} times"
