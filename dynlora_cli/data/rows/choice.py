"""Which rows are held out, or taken at all: whole prompts in the order of a hash, whatever the order of the rows."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.rows.kept import PROMPT, KeptRows, Places, Prompts

_BLOCK = 1 << 16  # rows looked at in one go


def split(rows: KeptRows, share: float, seed: int, notes: list[str]) -> tuple[KeptRows, KeptRows]:
    """Training and held-out rows.

    Rows of one prompt stay together. Prompts are taken in the order of a hash of seed and prompt, so the choice does
    not depend on the order of the rows; a prompt with more rows than are still wanted is passed over.

    Args:
        rows: all of them.
        share: of the rows to hold out; above 0 at least one prompt is, if there are two.
        seed: of the hash.
        notes: told if nothing can be held out.
    """
    what = f"split {share!r} {seed}"
    held = rows.remembered(what, lambda: _held_out(rows.prompts, share, seed)) if share > 0 else np.zeros(0, np.int64)
    if share > 0 and not len(held):
        notes.append("no rows held out: all have the same prompt; name a file in dataset.val to measure held-out loss")
    rest = np.ones(len(rows), bool)
    rest[held] = False
    return rows.picked(np.flatnonzero(rest), f"{what} rest"), rows.picked(held, what)


def chosen(rows: KeptRows, most: int, seed: int) -> KeptRows:
    """At most so many rows, in their order: whole prompts by a hash of the seed and the prompt.

    A prompt with more rows than are still wanted is passed over; if some are wanted after the last, it gives a part.
    """
    what = f"rows {most} {seed}"
    return rows.picked(rows.remembered(what, lambda: _some(rows.prompts, most, seed)), what)


def shared(prompts: Prompts, trained: Prompts) -> int:
    """How many rows have a prompt that others have, too."""
    known, numbers = np.unique(prompts, return_inverse=True)
    if not len(known):
        return 0
    there = np.zeros(len(known), bool)
    for start in range(0, len(trained), _BLOCK):
        block = trained[start : start + _BLOCK]
        places = np.minimum(np.searchsorted(known, block), len(known) - 1)
        there[places[known[places] == block]] = True
    return int(there[numbers].sum())


def _held_out(prompts: Prompts, share: float, seed: int) -> Places:
    order, starts, sizes = _by_hash(prompts, b"%d:" % seed)
    groups, _ = _fitting(sizes, round(share * len(prompts)))
    if not len(groups) and len(sizes) > 1:
        groups = np.array([sizes.argmin()])
    return _rows_of(order, starts, groups, sizes[groups])


def _some(prompts: Prompts, most: int, seed: int) -> Places:
    order, starts, sizes = _by_hash(prompts, b"rows %d:" % seed)
    groups, left = _fitting(sizes, most)
    counts, others = sizes[groups], np.ones(len(sizes), bool)
    others[groups] = False
    if left and others.any():  # each of these has more rows than that
        groups, counts = np.append(groups, others.argmax()), np.append(counts, left)
    return _rows_of(order, starts, groups, counts)


def _fitting(sizes: Places, wanted: int) -> tuple[Places, int]:
    """The groups that fit one after the other, and how many rows are still wanted then."""
    taken = array("q")
    for group, size in enumerate(sizes.tolist()):
        if not wanted:
            break
        if size <= wanted:
            taken.append(group)
            wanted -= size
    return np.array(taken, np.int64), wanted


def _rows_of(order: Places, starts: Places, groups: Places, counts: Places) -> Places:
    """The first so many rows of some groups, ascending."""
    before = np.cumsum(counts) - counts
    places = np.arange(counts.sum()) + np.repeat(starts[groups] - before, counts)
    return np.sort(order[places])


def _by_hash(prompts: Prompts, prefix: bytes) -> tuple[Places, Places, Places]:
    """Rows in the order of the hash of a prefix and their prompts, [R]; where each prompt begins there, and its rows.

    Of the hash 16 bytes are compared, which no two prompts share.
    """
    begun, digests = hashlib.sha256(prefix), bytearray()
    for start in range(0, len(prompts), _BLOCK):
        block = prompts[start : start + _BLOCK].astype(PROMPT).tobytes()
        for at in range(0, len(block), 16):
            digest = begun.copy()
            digest.update(block[at : at + 16])
            digests += digest.digest()[:16]
    halves: NDArray[np.uint64] = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    halves = halves[order]
    changes = (halves[1:] != halves[:-1]).any(1)
    starts = np.flatnonzero(np.concatenate([[True], changes])) if len(order) else np.zeros(0, np.int64)
    return order, starts, np.diff(starts, append=len(order))
