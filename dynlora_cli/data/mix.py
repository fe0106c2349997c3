"""Which rows come up in an epoch: so many of each source, and of earlier runs.

A source of n rows and weight w gives round(w n) rows to every epoch, so all epochs have as many steps. The rows are
walked on and on in one fixed order: with weight 0.5 the second epoch goes on where the first one ended, and with
weight 2 an epoch has every row twice.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.rows.plan import shuffled
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.config.sections import TrainSource


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


def drawn(rows: int, draws: int, epoch: int, seed: str | None) -> NDArray[np.int32]:
    """Numbers of those that an epoch takes, which begin where the epoch before ended. [draws]

    Args:
        rows: how many there are.
        draws: of an epoch.
        epoch: counted from 0.
        seed: of the order in which they are walked; None: as they stand.
    """
    if draws == rows:
        return np.arange(rows, dtype=np.int32)
    walk = np.arange(rows, dtype=np.int32) if seed is None else shuffled(rows, random.Random(seed))
    return walk[np.arange(epoch * draws, (epoch + 1) * draws) % rows]


def passes(rows: int, draws: int, epoch: int) -> NDArray[np.int32]:
    """Of each of those that `drawn` gives of so many rows: how often it has come up before. [draws]"""
    return (np.arange(epoch * draws, (epoch + 1) * draws) // rows).astype(np.int32)


def evenly(counts: Sequence[int]) -> NDArray[np.int64]:
    """The order in which several parts, one behind the other, are spread evenly: each keeps its own. [sum of counts]

    Args:
        counts: how many each part has.
    """
    if sum(count > 0 for count in counts) < 2:
        return np.arange(sum(counts))
    return np.argsort(np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count]), kind="stable")


def spans_of(numbers: NDArray[np.integer[Any]], sources: Sequence[TrainSource]) -> list[Span]:
    """The training rows by source, of which each row has the number; rows of one source stand beside each other."""
    counts = np.bincount(numbers, minlength=len(sources)).tolist()
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
