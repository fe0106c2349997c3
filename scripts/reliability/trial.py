"""What a kind of trial is, and what comes of one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Lost(Exception):  # noqa: N818 - the tool's fault, not ours
    """dynlora broke a promise; the text says which, and what was done to it."""


class Impossible(Exception):  # noqa: N818 - nobody's fault
    """This machine cannot do what the trial needs; the text says what."""


class ProvesNothing(Exception):  # noqa: N818 - nobody's fault
    """Nothing befell the trial: the kill came after the end, or nothing was changed; the text says what."""


class Trial(NamedTuple):
    """One attempt.

    Attributes:
        work: a folder of its own, empty.
        made: what `prepare` of its kind left, read and never changed; all kinds share it.
        number: counted from 0 within a kind and a seed.
        chance: of this kind, seed and number alone, so that any trial can be repeated by itself.
        seed: of the whole run.
    """

    work: Path
    made: Path
    number: int
    chance: random.Random
    seed: int


@dataclass(frozen=True)
class Kind:
    """A kind of trial.

    Attributes:
        name: as the command line takes it.
        what: a sentence for the page.
        tried: how many in the long form.
        bounded: how many in the form for CI.
        batch: how many make a line of the record.
        seconds: that one trial may take before it counts as hung.
        prepare: makes what all trials of the kind read, unless another kind has made it already.
        run: makes one attempt, and says in a few words how it was survived.

    `run` raises `Lost`; any other exception is lost as well, unless it is `ProvesNothing` or `Impossible`.
    """

    name: str
    what: str
    tried: int
    bounded: int
    batch: int
    seconds: float
    prepare: Callable[[Path], None]
    run: Callable[[Trial], str]


def chance_of(kind: str, seed: int, number: int) -> random.Random:
    """What decides about one trial."""
    return random.Random(f"{kind} {seed} {number}")


def pick(kind: str, seed: int, number: int, choices: int) -> int:
    """One of so many choices: all of them once in an order that the seed decides, then again in the same order."""
    order = list(range(choices))
    random.Random(f"{kind} {seed}").shuffle(order)
    return order[number % choices]
