"""Where keys come from: the rows that an adapter was trained on, or the description that it was written from.

Besides these from documents, cut into passages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.config.sections import Source
from dynlora_cli.data.earlier import earlier_data, run_folder
from dynlora_cli.data.grounded import GroundedText
from dynlora_cli.data.preferences.examples import TwoLines
from dynlora_cli.data.rows.pieces import Row
from dynlora_cli.data.sources import tables
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.evaluation.requests import RequestTexts
from dynlora_cli.evaluation.rows import held_out_rows, own_recipe, own_table
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.library.forms import Origin
from dynlora_cli.library.held_out import HeldOut
from dynlora_cli.library.keys import Key
from dynlora_cli.models.place import Place
from dynlora_cli.tasks import task as tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.data.examples import Example

WORDS = 128  # of a passage
_COMPARED = (
    "its rows compare or judge answers, and a library tells by right answers whether an update helps: what it learned "
    "from are keys only; right answers can be named with --data FILE"
)
CHARACTERS = 1200  # of a passage, for languages that put no spaces between words
LONGEST_REQUEST = 2000  # characters
HELD_OUT_SHARE = 0.2  # of a file of rows that nobody has split
BRING_BACK = (
    "add it from the folder in which it was trained, where its paths start; or bring the rows back as they were, or "
    "name rows with --data FILE"
)


@dataclass
class Found:
    """Texts that may become keys.

    Attributes:
        keys: of training rows and of documents.
        held_out: rows with their requests, none of which was trained on.
        sources: the files.
        notes: for the person.
    """

    keys: list[Key] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    sources: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_rows(adapter: Adapter, place: Place, tokenizer: PreTrainedTokenizerBase, data: Path | None) -> Found:
    """The requests of the rows that an adapter was trained on, and of those that were held out.

    Args:
        adapter: of a run, whose record says which rows; or any, with `data`.
        place: its base.
        tokenizer: saved with the adapter, or the base's.
        data: a file of rows in place of the run's own; a fifth of its requests is held out, by their hashes.

    Raises:
        UsageError: the run's rows are not what they were, or a file cannot be read.
    """
    if data is None:
        return _own_rows(adapter, place, tokenizer)
    rows = held_out_rows(adapter, place, tokenizer, data, passages=False, plain=True)
    requests = [(text, example) for text, example in _requests(rows.examples, tokenizer) if text]
    held = [(text, example) for text, example in requests if _is_held_out(text)]
    notes = [f"{data}: {note}" if not note.startswith(str(data)) else note for note in rows.notes]
    notes.append(f"{data}: nothing says whether the adapter was trained on these rows; a fifth is held out of the keys")
    return Found(
        keys=[Key(text, f"row {example.row + 1}") for text, example in requests if not _is_held_out(text)],
        held_out=[HeldOut(text, example) for text, example in held],
        sources=_origins("rows", Source(path=str(data))),
        notes=notes,
    )


def _own_rows(adapter: Adapter, place: Place, tokenizer: PreTrainedTokenizerBase) -> Found:
    recipe = own_recipe(adapter)
    if recipe is None:
        return _description(adapter)
    table = own_table(adapter, place) or place.files.table_rows
    try:
        read = earlier_data(
            run_folder(adapter.folder),
            tokenizer,
            tasks.of(place.options),
            table=table,
            context=place.files.context_length,
        )
    except UsageError as error:
        raise UsageError(error.message, BRING_BACK) from None
    compared = issubclass(read.kind, TwoLines)
    keys = [Key(text, f"row {example.row + 1}") for text, example in _requests(read.train, tokenizer)]
    return Found(
        notes=[_COMPARED] if compared else [],
        keys=[*keys, *_of_contexts(read.train, tokenizer)],
        held_out=[HeldOut(text, example) for text, example in _requests([] if compared else read.val, tokenizer)],
        sources=[
            *(origin for source in recipe.dataset.train for origin in _origins("rows", source)),
            *_documents_on_record(adapter),
        ],
    )


def _of_contexts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Key]:
    """The passages of the texts that rows are about, where they are about any."""
    contexts = dict.fromkeys(tuple(example.context_ids) for example in examples if isinstance(example, GroundedText))
    number = 0
    for ids in contexts:
        text = str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for passage in passages(text):
            number += 1
            yield Key(passage, f"document, passage {number}")


def _description(adapter: Adapter) -> Found:
    """The description that a hypernetwork wrote an adapter from, if it did."""
    text = (adapter.record.get("written") or {}).get("description")
    return Found(keys=[Key(text, "description")] if text else [])


def _documents_on_record(adapter: Adapter) -> list[Origin]:
    """The documents that `dynlora adapt` made an adapter from."""
    found = (adapter.record.get("adapted") or {}).get("documents") or []
    return [Origin(kind="documents", path=one["name"], sha256=one["sha256"]) for one in found]


def _requests(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Example]]:
    texts = RequestTexts(tokenizer)
    return ((texts.of(example)[:LONGEST_REQUEST], example) for example in examples)


def _is_held_out(text: str) -> bool:
    """By the request alone, so that rows with the same one stay together."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def find_passages(documents: Path) -> Found:
    """The passages of a file or a folder: texts, or tables with a column `text`.

    Raises:
        UsageError, DataError: they cannot be read.
    """
    found, source = Found(), Source(path=str(documents))
    for table in tables(source, found.notes, held_out=False):
        number = 0
        for place, row in table.read():
            for passage in passages(_text_of(place, row)):
                number += 1
                found.keys.append(Key(passage, f"{Path(table.name).name}, passage {number}"))
    found.sources = _origins("documents", source)
    return found


def _text_of(place: str, row: Row) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        raise DataError(f"{place}: --documents takes texts, or rows with a column 'text'; found {', '.join(row)}")
    return text


def passages(text: str) -> Iterator[str]:
    """A text in pieces of about 128 words, whole paragraphs where they fit."""
    piece: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = [word[start : start + CHARACTERS] for word in paragraph.split() for start in _starts(word)]
        if piece and not _fits(piece + words):
            yield " ".join(piece)
            piece = []
        for word in words:
            if piece and not _fits([*piece, word]):
                yield " ".join(piece)
                piece = []
            piece.append(word)
    if piece:
        yield " ".join(piece)


def _starts(word: str) -> range:
    return range(0, len(word), CHARACTERS)


def _fits(words: list[str]) -> bool:
    return len(words) <= WORDS and sum(map(len, words)) + len(words) - 1 <= CHARACTERS


def _origins(kind: str, source: Source) -> list[Origin]:
    """The files of a source with their hashes; a set that is no local file has none."""
    if source.path.startswith("builtin:") or not Path(source.path).expanduser().exists():
        return [Origin(kind=kind, path=source.path, sha256=None)]  # type: ignore[arg-type]
    files = [Path(table.name) for table in tables(source, [], held_out=False)]
    return [Origin(kind=kind, path=str(file), sha256=sha256_of(file)) for file in files]  # type: ignore[arg-type]
