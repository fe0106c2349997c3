"""What comes up in the steps of an epoch, as numbers in arrays: a run may have millions of rows.

    Bins    rows that share a line of a batch
    Plan    the bins of every step of one epoch

Everything drawn is drawn by `random.Random`, whose order is the same on every machine and for every kind of list.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int32]
Bin = tuple[int, ...]  # indices of the examples that share one row of a batch
Turn = tuple[Bin, int]  # a bin that comes up, and how often it has before: the pass that its rows are in


@dataclass(frozen=True, slots=True)
class Bins:
    """Bins of examples. B bins of R rows in all.

    Args:
        members: indices of the examples, bin after bin. [R]
        ends: where each bin ends among them, [B]; None: each has one.
    """

    members: Numbers
    ends: Numbers | None = None

    def __len__(self) -> int:
        return len(self.members if self.ends is None else self.ends)

    def __getitem__(self, at: int) -> Bin:
        if self.ends is None:
            return (int(self.members[at]),)
        return tuple(self.members[self.ends[at - 1] if at else 0 : self.ends[at]].tolist())

    @classmethod
    def of_one(cls, start: int, stop: int) -> Bins:
        """Each of some examples in a bin of its own."""
        return cls(np.arange(start, stop, dtype=np.int32))

    @classmethod
    def packed(cls, rows: Numbers, lengths: Numbers, capacity: int) -> Bins:
        """Best fit: each row in turn goes where it leaves the least room, the first such bin of several.

        Args:
            rows: indices of the examples, in the order in which they are put into bins. [R]
            lengths: tokens of each. [R]
            capacity: tokens of a bin.
        """
        where, count = array("i", bytes(4 * len(rows))), 0
        open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the tokens that are left in them: heaps
        there = 0  # a bit for each of these heaps that holds any
        for at, length in enumerate(array("i", lengths.astype(np.int32).tobytes())):
            fitting = there >> length
            if fitting:
                left = length + (fitting & -fitting).bit_length() - 1
                number = heappop(open_bins[left])
                if not open_bins[left]:
                    there ^= 1 << left
            else:
                left, number, count = capacity, count, count + 1
            left -= length
            heappush(open_bins[left], number)
            there |= 1 << left
            where[at] = number
        bins = np.frombuffer(where, np.int32)
        ends = np.cumsum(np.bincount(bins, minlength=count)).astype(np.int32)
        return cls(rows[np.argsort(bins, kind="stable")], ends)

    @classmethod
    def joined(cls, parts: list[Bins]) -> Bins:
        """Several as one."""
        if len(parts) == 1:
            return parts[0]
        members, ends, before = np.concatenate([part.members for part in parts]), list[Numbers](), 0
        for part in parts:
            if part.ends is not None:
                ends.append(part.ends + np.int32(before))
            before += len(part.members)
        return cls(members, np.concatenate(ends) if ends else None)


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of an epoch. T bins come up in S steps.

    Args:
        bins: of all of them.
        turns: numbers of the bins, in the order of the steps before those are shuffled. [T]
        passes: how often each has come up before. [T]
        steps: which part of `turns` each step has. [S]
        size: bins of a step; the last part of `turns` may have fewer.
    """

    bins: Bins
    turns: Numbers
    passes: Numbers
    steps: Numbers
    size: int

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[Turn]:
        start = int(self.steps[index]) * self.size
        part = slice(start, start + self.size)
        numbers, passes = self.turns[part].tolist(), self.passes[part].tolist()
        return [(self.bins[number], before) for number, before in zip(numbers, passes, strict=True)]


def shuffled(count: int, chance: random.Random) -> Numbers:
    """The numbers below `count` as `chance.shuffle` leaves them."""
    numbers = array("i", np.arange(count, dtype=np.int32).tobytes())
    chance.shuffle(numbers)
    return np.frombuffer(numbers, np.int32)


def sort_within(turns: Numbers, values: Numbers, window: int) -> None:
    """Sort numbers in place by the value of each, within so many at a time; equal ones stay as they stand.

    Args:
        turns: the numbers. [T]
        values: of all numbers.
        window: so many.
    """
    for start in range(0, len(turns), window):
        part = turns[start : start + window]
        turns[start : start + window] = part[np.argsort(values[part], kind="stable")]
