"""Rows that a person gives about documents: prompts, perhaps with answers, each of which belongs to a chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from dynlora_cli.config.sections import Source
from dynlora_cli.data.columns import renamed
from dynlora_cli.data.forms import BadRowError, first_answer, optional_text, refuse_half_characters, text_of
from dynlora_cli.data.sources import tables
from dynlora_cli.documents.chunks import Chunk
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.retrieval.lexical import words_of


@dataclass(frozen=True)
class GivenRow:
    """A prompt about the documents, and its answer; empty: the model is to write it."""

    prompt: str
    completion: str = ""


def read_given(path: Path, columns: Mapping[str, str], notes: list[str]) -> list[GivenRow]:
    """The rows of a file, each prompt once.

    Args:
        path: of the file.
        columns: our names to the file's.
        notes: what was found out about it is added here.

    Raises:
        UsageError, DataError: it cannot be read, or a row has no prompt.
    """
    found: dict[tuple[str, str], GivenRow] = {}
    try:
        for table in tables(Source(path=str(path), columns=dict(columns)), notes, held_out=False):
            for place, row in table.read():
                try:
                    refuse_half_characters(row)
                    ours = first_answer(renamed(row, dict(columns), place))
                    one = GivenRow(text_of(ours, "prompt").strip(), optional_text(ours, "completion").strip())
                except BadRowError as error:
                    raise DataError(f"{place}: {error}", "rows have `prompt`, and may have `completion`") from None
                if not one.prompt:
                    raise DataError(f"{place}: the prompt is empty", "remove the row")
                found[one.prompt, one.completion] = one
    except UsageError as error:
        raise type(error)(f"--data: {error.message.removeprefix('dataset: ')}", error.hint) from None
    return list(found.values())


def by_chunk(rows: Sequence[GivenRow], chunks: Sequence[Chunk]) -> dict[int, list[GivenRow]]:
    """Each row with the chunk that it has most words in common with, rare ones before common ones.

    An answer counts as well as its prompt: it is words of the chunk, as a rule.
    """
    words = [set(words_of(chunk.text)) for chunk in chunks]
    spread = Counter(word for found in words for word in found)
    found: dict[int, list[GivenRow]] = {}
    for row in rows:
        said = set(words_of(f"{row.prompt} {row.completion}"))
        scores = [sum(log(1 + len(chunks) / spread[word]) for word in sorted(said & own)) for own in words]
        found.setdefault(max(range(len(chunks)), key=scores.__getitem__), []).append(row)
    return found
