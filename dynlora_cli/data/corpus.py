"""Passages to retrieve from: a file of rows with a column `text`, text files cut in pieces, or a folder of both.

`written_with` is how they stand in a prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dynlora_cli.data.forms import BadRowError, as_text, optional_text, refuse_half_characters, text_of
from dynlora_cli.data.row_files import READERS, TEXT_SUFFIXES, kind_of, read_rows, refuse_unknown_kind
from dynlora_cli.data.rows.pieces import Row
from dynlora_cli.errors import DataError, UsageError

PIECE = 120  # words of a passage that is cut out of a text file


@dataclass(frozen=True, slots=True)
class Passage:
    """A text to be found.

    Args:
        id: by which rows name it.
        title: may be empty.
        text: of the passage.
    """

    id: str
    title: str
    text: str

    @property
    def indexed(self) -> str:
        """What a retriever reads."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Corpus:
    """All passages, in the order of their files."""

    path: str
    passages: list[Passage]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Of each passage by its id."""
        return {passage.id: number for number, passage in enumerate(self.passages)}

    @cached_property
    def sha256(self) -> str:
        """Over ids, titles and texts."""
        content = [[passage.id, passage.title, passage.text] for passage in self.passages]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def files_of(path: str) -> list[Path]:
    """The files of a corpus.

    Raises:
        UsageError, DataError: there is nothing that can be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise UsageError(f"dataset.retrieve.corpus: there is no {path}", "name a file or a folder of passages")
    if not place.is_dir():
        refuse_unknown_kind(place)
        return [place]
    found = sorted(file for file in place.rglob("*") if file.is_file() and kind_of(file) in READERS)
    shown = [file for file in found if not any(part.startswith(".") for part in file.relative_to(place).parts)]
    if not shown:
        raise DataError(f"dataset.retrieve.corpus: no passages in the folder {path}", f"expected: {sorted(READERS)}")
    return shown


def read_corpus(path: str, notes: list[str]) -> Corpus:
    """Read all passages.

    Args:
        path: of a file or a folder.
        notes: what was found out about files is added here.

    Raises:
        UsageError, DataError: a file that cannot be read, a row without text, or two passages of one id.
    """
    passages: list[Passage] = []
    seen: dict[str, str] = {}
    for file in files_of(path):
        for place, passage in _passages(file, notes):
            if passage.id in seen:
                raise DataError(
                    f"{place}: the passage {passage.id!r} is there twice, first in {seen[passage.id]}",
                    "give each passage an `id` of its own",
                )
            seen[passage.id] = place
            passages.append(passage)
    return Corpus(path, passages)


def _passages(file: Path, notes: list[str]) -> Iterator[tuple[str, Passage]]:
    for number, (place, row) in enumerate(read_rows(file, notes), 1):
        if kind_of(file) in TEXT_SUFFIXES:
            for count, piece in enumerate(cut(str(row["text"])), 1):
                yield f"{place}, piece {count}", Passage(f"{file.name}#{count}", "", piece)
            continue
        try:
            yield place, _passage(row, f"{file.name}#{number}")
        except BadRowError as error:
            raise DataError(f"{place}: {error}", "a passage has text, and may have title and id") from None


def _passage(row: Row, without_id: str) -> Passage:
    own = as_text(row.get("id"))
    title, text = optional_text(row, "title"), text_of(row, "text")
    refuse_half_characters([title, text])
    return Passage(str(own) if own not in (None, "") else without_id, title.strip(), text.strip())


def cut(text: str) -> list[str]:
    """A text in pieces of at most about 120 words: whole paragraphs as far as they fit, long ones by sentences."""
    pieces: list[str] = []
    room = 0
    for part in _parts(text):
        words = len(part.split())
        if not pieces or words > room:
            pieces.append(part)
            room = PIECE - words
        else:
            pieces[-1] += f" {part}"
            room -= words
    return pieces


def _parts(text: str) -> Iterator[str]:
    """Paragraphs; sentences of those that are too long, and so many words of sentences that are."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if len(words) <= PIECE:
            if words:
                yield " ".join(words)
            continue
        for sentence in re.split(r"(?<=[.!?\u3002])\s+", " ".join(words)):
            words = sentence.split()
            for start in range(0, len(words), PIECE):
                yield " ".join(words[start : start + PIECE])


def written_with(layout: str, prompt: str, passages: Sequence[Passage]) -> str:
    """A prompt with passages, numbered from 1.

    Args:
        layout: with `{passages}` and `{prompt}`, each once.
        prompt: of the row.
        passages: in the order in which they are shown.
    """
    titled = (f"{passage.title}: {passage.text}" if passage.title else passage.text for passage in passages)
    texts = "\n".join(f"[{number}] {text}" for number, text in enumerate(titled, 1))
    filled = {"{passages}": texts, "{prompt}": prompt}
    return "".join(filled.get(piece, piece) for piece in re.split(r"(\{passages\}|\{prompt\})", layout))
