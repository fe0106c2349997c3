"""From chunks to rows: requests about each chunk, and answers by the chunk, kept on disk as they come.

What is kept of a chunk is a file of its own (`chunk-00001.json`), written whole after each batch of answers, so that a
stop at any moment loses no more than the batch in hand, and whoever goes on writes the same rows.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dynlora_cli.documents.begun import CHUNK
from dynlora_cli.documents.chunks import Chunk
from dynlora_cli.documents.requests import beginnings, invented, same
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.whole import write_json
from dynlora_cli.text import counted, duration

if TYPE_CHECKING:
    from dynlora_cli.documents.given import GivenRow

BATCH = 16  # requests or answers that are written together, and then kept
GIVEN = "given"  # the kind of a row of a person
SENTENCE = "sentence"  # the kind of a row that goes on with a sentence of the chunk
GO_ON = "Complete the sentence: {} ..."  # of a model that can be asked, and does not ask well itself
TRIES = 5  # for each request that is wanted, at most
HELD_OUT = 8  # of so many rows of a chunk one is held out
Tell = Callable[[str], None]


class Writes(Protocol):
    """A model that has a chunk in its prompt, see `writer.Writer`."""

    def ask(self, chunk: Chunk, begin: int, many: int) -> list[tuple[str, str]]:
        """Requests about a chunk, each with its kind, by the tries from `begin` on."""

    def answer(self, chunk: Chunk, prompts: Sequence[str]) -> list[str]:
        """An answer to each."""


@dataclass
class Asked:
    """One request about a chunk.

    Attributes:
        prompt: the request.
        kind: of the request: as in requests.py, `given`, or `sentence`, a sentence that is to be gone on with.
        completion: the answer; None: not written yet; empty: there is none, and the row is left out.
    """

    prompt: str
    kind: str
    completion: str | None = None


@dataclass(frozen=True)
class DocumentRow:
    """A row of the run that is to be."""

    chunk: int
    context: str
    prompt: str
    completion: str
    held_out: bool = False

    def line(self) -> str:
        """As a line of a file in the format `grounded`."""
        row = {"context": self.context, "prompt": self.prompt, "completion": self.completion}
        return json.dumps(row, ensure_ascii=False) + "\n"


@dataclass
class Study:
    """The rows about some chunks, as far as they are written.

    Args:
        chunks: all of them.
        folder: where they are kept.
        questions: requests that are wanted about each chunk.
        given: a person's rows, by the number of their chunk; None: the model writes them.
        chat: the model can be asked; else it goes on with sentences of the chunk.

    Attributes:
        notes: for the person.
        filled: chunks of which sentences stand in for requests, since the model wrote too few.
        left_out: requests without an answer, or with one that has a number which the text does not have.
    """

    chunks: Sequence[Chunk]
    folder: Path
    questions: int
    chat: bool
    given: Mapping[int, Sequence[GivenRow]] | None = None
    notes: list[str] = field(default_factory=list)
    filled: int = 0
    left_out: int = 0

    def write(self, writer: Writes, tell: Tell) -> list[DocumentRow]:
        """Write what is not yet there.

        Args:
            writer: asks and answers.
            tell: takes a line whenever a chunk is done.

        Returns:
            All rows, in the order of the chunks; of those that no person gave, none has the prompt of another.
        """
        taken: set[str] = set()
        rows, began, done_before = [], time.monotonic(), self._done()
        for number, chunk in enumerate(self.chunks):
            asked = self._asked(number)
            if asked is None:
                asked = self._requests(number, chunk, writer, taken)
                self._keep(number, asked)
            taken |= {same(one.prompt) for one in asked}
            self.filled += self.given is None and self.chat and any(one.kind == SENTENCE for one in asked)
            self._answer(number, chunk, asked, writer)
            self.left_out += sum(not one.completion for one in asked)
            rows += _rows(number, chunk, asked)
            if number >= done_before:
                spent, done = time.monotonic() - began, number + 1 - done_before
                left = spent / done * (len(self.chunks) - number - 1)
                more = f", {duration(left)} left" if left >= 1 else ""
                tell(f"rows    {number + 1}/{len(self.chunks)} chunks  {counted(len(rows), 'row')}{more}")
        self._note_few(rows)
        return with_held_out(rows)

    # -- requests ----------------------------------------------------------------------------------------------------

    def _requests(self, number: int, chunk: Chunk, writer: Writes, taken: set[str]) -> list[Asked]:
        if self.given is not None:
            return [Asked(row.prompt, GIVEN, row.completion or None) for row in self.given.get(number, ())]
        if not self.chat:
            return _spread(_distinct(starmap(_sentence, beginnings(chunk.text)), taken), self.questions)
        found: list[Asked] = []
        for begin in range(0, TRIES * self.questions, BATCH):
            for kind, text in writer.ask(chunk, begin, BATCH):
                if len(found) < self.questions and same(text) not in taken:
                    taken.add(same(text))
                    found.append(Asked(text, kind))
            if len(found) == self.questions:
                break
        if len(found) < self.questions / 2:
            more = (_sentence(GO_ON.format(a), b.strip()) for a, b in beginnings(chunk.text))
            found += _spread(_distinct(more, taken), self.questions - len(found))
        return found

    def _note_few(self, rows: Sequence[DocumentRow]) -> None:
        if self.left_out:
            many = counted(self.left_out, "question is", "questions are")
            self.notes.append(
                f"{many} left out: the model has no answer, or one with a number that the text does not have"
            )
        wanted = self.questions * len(self.chunks)
        if self.filled:
            text = f"of {counted(self.filled, 'chunk')} the model wrote few requests that are about the text, so that"
            self.notes.append(f"{text} sentences to be completed stand in for others; a larger model asks better")
        if self.given is None and len(rows) < wanted / 2:
            self.notes.append(f"{counted(len(rows), 'row')} of {wanted:,} that were wanted: the text gives no more")

    # -- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, number: int, chunk: Chunk, asked: list[Asked], writer: Writes) -> None:
        open_ones = [one for one in asked if one.completion is None]
        for at in range(0, len(open_ones), BATCH):
            batch = open_ones[at : at + BATCH]
            for one, text in zip(batch, writer.answer(chunk, [one.prompt for one in batch]), strict=True):
                made_up = one.kind != GIVEN and invented(text, chunk.title, chunk.text, one.prompt)
                one.completion = "" if made_up else text
            self._keep(number, asked)

    # -- the disk ----------------------------------------------------------------------------------------------------

    def _place(self, number: int) -> Path:
        return self.folder / f"{CHUNK}{number + 1:05d}.json"

    def _keep(self, number: int, asked: Sequence[Asked]) -> None:
        write_json(self._place(number), {"rows": [vars(one) for one in asked]})

    def _asked(self, number: int) -> list[Asked] | None:
        """What is on the disk of a chunk; None: nothing."""
        if not self._place(number).is_file():
            return None
        return [Asked(**row) for row in read_object(self._place(number))["rows"]]

    def _done(self) -> int:
        """Chunks at the beginning that need nothing more."""
        for number in range(len(self.chunks)):
            asked = self._asked(number)
            if asked is None or any(one.completion is None for one in asked):
                return number
        return len(self.chunks)


def with_held_out(rows: Sequence[DocumentRow]) -> list[DocumentRow]:
    """The rows, of which an eighth is held out, chosen by a hash: one at least, and no prompt that is trained on."""
    prompts = sorted({same(row.prompt) for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    chosen = set(prompts[: max(1, round(len(prompts) / HELD_OUT))] if len(prompts) > 1 else ())
    return [replace(row, held_out=same(row.prompt) in chosen) for row in rows]


def _rows(number: int, chunk: Chunk, asked: Iterable[Asked]) -> list[DocumentRow]:
    return [DocumentRow(number, chunk.text, one.prompt, one.completion) for one in asked if one.completion]


def _sentence(prompt: str, completion: str) -> Asked:
    return Asked(prompt, SENTENCE, completion)


def _distinct(asked: Iterable[Asked], taken: set[str]) -> list[Asked]:
    """Of those with the same prompt the first, and none whose prompt is taken."""
    found: dict[str, Asked] = {}
    for one in asked:
        found.setdefault(same(one.prompt), one)
    return [one for words, one in found.items() if words not in taken]


def _spread(asked: Sequence[Asked], most: int) -> list[Asked]:
    """So many of them, from all over the chunk."""
    if len(asked) <= most:
        return list(asked)
    return [asked[at * len(asked) // most] for at in range(most)]


def provenance(chunks: Sequence[Chunk], documents: Sequence[Any]) -> list[dict[str, Any]]:
    """The documents, for the record of a run."""
    counts = [sum(chunk.document == number for chunk in chunks) for number in range(len(documents))]
    return [
        {"name": one.name, "sha256": one.sha256, "characters": one.characters, "chunks": count}
        for one, count in zip(documents, counts, strict=True)
    ]
