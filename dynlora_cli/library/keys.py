"""The keys of an update: vectors of what its rows ask and of what its documents say, with their texts.

Dimensions: N keys, D numbers of a vector, Q requests, E updates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN
from dynlora_cli.files.strict_json import BadJsonError, loads
from dynlora_cli.files.whole import sha256_of, sync
from dynlora_cli.library.forms import Part
from dynlora_cli.library.library import Entry
from dynlora_cli.library.space import Space
from dynlora_cli.retrieval.encoders import BASE
from dynlora_cli.text import to_type

MOST_KEYS = 4096
BLOCK = 1024  # keys compared at a time; they stay on the disk
LONGEST_LINE = 1 << 20  # characters

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Key:
    """A text that finds an update.

    Attributes:
        text: of a request, or a passage of a document.
        source: where it comes from: `row 12`, `guide.md, passage 3`.
    """

    text: str
    source: str


@dataclass(frozen=True)
class Keys:
    """The keys of one update, memory-mapped.

    Attributes:
        entry: whose they are.
        vectors: [N, D] fp32, rows of length 1.
    """

    entry: Entry
    vectors: Vectors

    @classmethod
    def of(cls, entry: Entry, dimension: int | None = None) -> Keys:
        """Open the keys of an update.

        Args:
            entry: of a library.
            dimension: D that they must have; None: any.

        Raises:
            UsageError: the file is missing, or not what library.json says.
        """
        path = entry.paths.vectors
        try:
            vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}", _way_out(entry)) from None
        wanted = (entry.keys, dimension or vectors.shape[-1]) if vectors.ndim else None
        if vectors.dtype != np.float32 or vectors.shape != wanted:
            raise UsageError(f"{path} is damaged: it holds {vectors.dtype} {vectors.shape}", _way_out(entry))
        return cls(entry, vectors)

    @cached_property
    def texts(self) -> list[str]:
        """The text of every key, in the order of the vectors."""
        return [key.text for key in self._keys]

    @cached_property
    def sources(self) -> list[str]:
        """Where each key comes from."""
        return [key.source for key in self._keys]

    @cached_property
    def _keys(self) -> list[Key]:
        return read_lines(self.entry, self.entry.paths.texts, self.entry.keys)


def read_lines(entry: Entry, path: Path, count: int) -> list[Key]:
    """The texts of an update's file, one a line.

    Raises:
        UsageError: it is not what library.json says.
    """
    keys = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in islice(iter(lambda: file.readline(LONGEST_LINE), ""), count + 1):
                row = loads(line)
                keys.append(Key(_text(row, "text"), _text(row, "source")))
    except (OSError, UnicodeError, BadJsonError) as error:
        raise UsageError(f"{path} cannot be read: {error}", _way_out(entry)) from None
    if len(keys) != count:
        raise UsageError(f"{path} is damaged: it has not the {count} lines of {entry.name}", _way_out(entry))
    return keys


def _text(row: object, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise BadJsonError(f"a line without a text under {key!r}")
    return value


def _way_out(entry: Entry) -> str:
    return f"{COPY_AGAIN}, or: {to_type('library', 'remove', entry.root, entry.name)}"


# -- finding ---------------------------------------------------------------------------------------------------------


def space_of(encoder: str, keys: Sequence[Keys]) -> Space:
    """Where keys are compared: the base's own vectors are evened out over the keys of some updates.

    Args:
        encoder: its name.
        keys: of the updates that say what all have in common: those that the calibration has seen, so that one that is
            added later changes no score of theirs.
    """
    vectors = [of.vectors for of in keys if len(of.vectors)]
    return Space.of(vectors) if encoder == BASE else Space.plain(vectors[0].shape[1])


def nearest(query_QD: Vectors, keys: Sequence[Keys], space: Space | None = None) -> tuple[Vectors, NDArray[np.int64]]:
    """Of every update the key that is nearest to each request.

    Args:
        query_QD: of the requests, by the encoder that made the keys.
        keys: of the updates.
        space: where they are compared; None: as they are.

    Returns:
        [Q, E] cosines, -1 for an update without keys, and [Q, E] numbers of keys, -1 likewise.
    """
    space = space or Space.plain(query_QD.shape[1])
    score_QE = np.full((len(query_QD), len(keys)), -1.0, dtype=np.float32)
    index_QE = np.full(score_QE.shape, -1, dtype=np.int64)
    asked = space.requests(query_QD)
    for column, of in enumerate(keys):
        for start in range(0, len(of.vectors), BLOCK):
            cosine_QN = asked.cosines(np.asarray(of.vectors[start : start + BLOCK]))
            best_Q = cosine_QN.argmax(axis=1)
            value_Q = cosine_QN[np.arange(len(best_Q)), best_Q]
            better_Q = value_Q > score_QE[:, column]
            score_QE[better_Q, column] = value_Q[better_Q]
            index_QE[better_Q, column] = start + best_Q[better_Q]
    return score_QE, index_QE


# -- making ----------------------------------------------------------------------------------------------------------


def choose(keys: Iterable[Key], most: int = MOST_KEYS) -> tuple[list[Key], int]:
    """Each text once, and at most so many of them: those whose hashes come first, in the order in which they came.

    Returns:
        The keys, and how many different texts there were.
    """
    first: dict[str, Key] = {}
    for key in keys:
        if text := key.text.strip():
            first.setdefault(text, Key(text, key.source))
    order = sorted(first, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    chosen = set(order[:most])
    return [key for text, key in first.items() if text in chosen], len(first)


def write_vectors(path: Path, vectors_ND: Vectors) -> Part:
    """Write keys/NAME.npy."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(vectors_ND, dtype=np.float32))
    return finished(path, len(vectors_ND))


def write_texts(path: Path, keys: Sequence[Key]) -> Part:
    """Write keys/NAME.jsonl."""
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps({"text": key.text, "source": key.source}, ensure_ascii=False) for key in keys)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return finished(path, len(keys))


def finished(path: Path, count: int) -> Part:
    """A file that is complete, once it is on the disk."""
    sync(path)
    sync(path.parent)
    return Part(count=count, sha256=sha256_of(path))
