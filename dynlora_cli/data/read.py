"""The rows of a recipe's sources, each as an example of its task, or dropped with a reason that is counted."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from dynlora_cli import plugins
from dynlora_cli.data.chat.template import Writing, on_date
from dynlora_cli.data.chat.turns import as_turns
from dynlora_cli.data.chat.ways import Ways
from dynlora_cli.data.columns import Account, located, renamed
from dynlora_cli.data.examples import Draft, Located
from dynlora_cli.data.forms import WITH_TURNS, Grounded, Judged, Pair, Plain, Preference, Turns, name_of
from dynlora_cli.data.rows.choice import chosen
from dynlora_cli.data.rows.fitting import TaskOfRows, format_of
from dynlora_cli.data.rows.kept import Kept, KeptList, KeptRows
from dynlora_cli.data.rows.pieces import Piece, Row, bounded
from dynlora_cli.data.sources import Table, tables
from dynlora_cli.data.splits import BEGINS, EMPTY, LONGER
from dynlora_cli.data.vocabulary import Vocabulary
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Dataset, Source
    from dynlora_cli.data.encode import Encoder
    from dynlora_cli.data.rows.blocks import Block


@dataclass(slots=True)
class Told:
    """What reading tells beside the rows.

    Args:
        notes: sentences for a person, in order.
        forms: the neutral forms that rows came in, by name.
        turned: of each format that could be turns whether it was.
        variables: of the chat template, that recipe, source or row set.
        set_apart: rows have `dataset.separator` in them.
        lost: rows that were dropped, by the reason.
    """

    notes: list[str] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    turned: dict[str, set[bool]] = field(default_factory=dict)
    variables: set[str] = field(default_factory=set)
    set_apart: bool = False
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, more: Told) -> None:
        """What was told next."""
        self.notes += more.notes
        self.forms |= more.forms
        for name, turns in more.turned.items():
            self.turned.setdefault(name, set()).update(turns)
        self.variables |= more.variables
        self.set_apart |= more.set_apart
        self.lost += more.lost


@dataclass(slots=True)
class Reader:
    """What reading needs from source to source; `told` is what it tells of one list of sources, or of a part."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    task: TaskOfRows
    max_length: int
    encoder: Encoder
    writing: Writing
    vocabulary: Vocabulary
    seed: int = 0
    told: Told = field(default_factory=Told)
    lost: dict[bool, Counter[str]] = field(default_factory=lambda: {False: Counter(), True: Counter()})  # held out

    @property
    def notes(self) -> list[str]:
        """For a person; to be added to."""
        return self.told.notes

    @notes.setter
    def notes(self, notes: list[str]) -> None:
        self.told.notes = notes


class Readers(Protocol):
    """Other processes that read (rows/team.py)."""

    def read(
        self, reader: Reader, shape: Shape, account: Account, pieces: Iterator[Piece], first: int
    ) -> Iterator[tuple[list[Kept] | Block, int]]:
        """Rows of the pieces of one table, in order, and how many each was with those that are dropped."""
        ...


class Opened(Protocol):
    """Rows that have been read before (rows/cache.py)."""

    def source(self, number: int, *, held_out: bool) -> tuple[KeptRows, Told]:
        """The rows of one source, and what reading it told."""
        ...


def read(
    reader: Reader,
    sources: Sequence[Source],
    *,
    held_out: bool,
    limited: bool = True,
    opened: Opened | None = None,
) -> tuple[KeptRows, int]:
    """Kept rows of some sources in order, where `limited` no more than they say, and how many were dropped.

    Args:
        reader: told what there is to tell.
        sources: of one list of the recipe.
        held_out: they are to measure on.
        limited: `rows` of the sources counts.
        opened: has the rows already.
    """
    kept, lost, first = list[KeptRows](), Counter[str](), 0
    for number, source in enumerate(sources):
        if opened:
            own, told = opened.source(number, held_out=held_out)
        else:
            own, told, first = _read_now(reader, source, number, held_out=held_out, first=first)
        reader.told.add(told)
        lost += told.lost
        kept.append(_limited(reader, source, own) if limited else own)
    reader.lost[held_out] += lost
    return (functools.reduce(lambda rows, more: rows.followed_by(more), kept) if kept else KeptList()), lost.total()


def _read_now(reader: Reader, source: Source, number: int, *, held_out: bool, first: int) -> tuple[KeptRows, Told, int]:
    """The rows of one source as objects, what reading them told, and the number of the next row."""
    rows, part = KeptList(), replace(reader, told=Told())

    def take(kept: list[Kept] | Block) -> None:
        assert isinstance(kept, list)
        for row in kept:
            row.source = number
        rows.extend(kept)

    first += read_source(part, source, held_out=held_out, first=first, take=take)
    return rows, part.told, first


def read_source(
    reader: Reader,
    source: Source,
    *,
    held_out: bool,
    first: int,
    take: Callable[[list[Kept] | Block], None],
    team: Readers | None = None,
) -> int:
    """Read one source from its files.

    Args:
        reader: told what there is to tell.
        source: to be read.
        held_out: it is to measure on.
        first: the number of its first row.
        take: given the rows, about a thousand at a time.
        team: other processes that read; None: this one alone.

    Returns:
        How many rows there were, with those that were dropped.
    """
    ways, count = Ways.of(reader.dataset, source), 0
    account = Account(source, reader.dataset.retrieve is not None, ways)
    with on_date(reader.writing.moment):
        for table in tables(source, reader.notes, held_out=held_out):
            for kept, rows in _of_table(reader, source, table, account, first + count, team):
                take(kept)
                count += rows
    account.settle(reader.notes)
    return count


def _limited(reader: Reader, source: Source, rows: KeptRows) -> KeptRows:
    """No more rows of a source than the recipe asks for."""
    if source.rows is None or len(rows) <= source.rows:
        if source.rows is not None and len(rows) < source.rows:
            reader.notes.append(f"{source.path}: it has {counted(len(rows), 'row')}, fewer than `rows: {source.rows}`")
        return rows
    reader.notes.append(f"{source.path}: {source.rows} of {counted(len(rows), 'row')}, chosen by seed {reader.seed}")
    return chosen(rows, source.rows, reader.seed)


def _of_table(
    reader: Reader, source: Source, table: Table, account: Account, first: int, team: Readers | None
) -> Iterator[tuple[list[Kept] | Block, int]]:
    """Rows of a table, about a thousand at a time, and how many these were with those that are dropped."""
    pieces = table.pieces()
    begun = _beginning(reader, source, table, account, next(pieces))  # a table without rows has raised
    if isinstance(begun, list):
        yield _fitted(reader, begun, first)
        return
    shape, opening = begun
    parts: Iterator[Iterable[tuple[str, Row]]] = bounded(opening)
    if not team:
        parts = itertools.chain(parts, (piece.rows() for piece in pieces))
    for part in parts:
        found = of_piece(reader, shape, account, part, first)
        first += found[1]
        yield found
    if team:
        yield from team.read(reader, shape, account, pieces, first)


def drafts(
    reader: Reader, source: Source, table: Table, account: Account, *, skip: int = 0
) -> Iterator[tuple[str, Draft]]:
    """Tokens of a table's rows, tokenised a thousand at a time; without the first `skip`, which are read all the same.

    How rows are read is decided by the first of the table, whatever is skipped.
    """
    pieces = table.pieces()
    begun = _beginning(reader, source, table, account, next(pieces))
    if isinstance(begun, list):
        yield from begun[skip:]
        return
    shape, opening = begun
    rows = itertools.chain(opening, itertools.chain.from_iterable(piece.rows() for piece in pieces))
    for part in bounded(itertools.islice(rows, skip, None)):
        yield from _drafts_of(reader, shape, account, part)


def _beginning(
    reader: Reader, source: Source, table: Table, account: Account, piece: Piece
) -> tuple[Shape, list[tuple[str, Row]]] | list[tuple[str, Draft]]:
    """How the rows of a table are read, by its first thousand, and these; of a text file the drafts of all of it."""
    rows = iter(piece.rows())
    place, bare = next(rows)
    row = renamed(bare, source.columns, place)
    form = format_of(reader.task, reader.notes, source, table, place, row, account)
    if table.whole_text:
        account.enter(place, row, form)
        reader.told.forms.add(Plain.__name__)
        parts = reader.encoder.pieces(place, str(row["text"]))
        return [(f"{place}, piece {number}", draft) for number, draft in enumerate(parts, 1)]
    opening = [(place, bare), *rows]
    turns = _as_turns(reader, table, form, [renamed(row, source.columns, place) for place, row in opening])
    return Shape(source, table.name, table.home, name_of(form), turns), opening


@dataclass(frozen=True, slots=True)
class Shape:
    """How the rows of one table are read: its source, its name, from where paths count, its format, and as turns."""

    source: Source
    name: str
    home: Path | None
    form: str
    turns: bool


def of_piece(
    reader: Reader, shape: Shape, account: Account, rows: Iterable[tuple[str, Row]], first: int = 0
) -> tuple[list[Kept], int]:
    """Some rows that stand beside each other as examples, and how many there were with those that are dropped.

    Args:
        reader: told what there is to tell.
        shape: of their table.
        account: of their source.
        rows: with their places.
        first: the number of the first of them.
    """
    return _fitted(reader, _drafts_of(reader, shape, account, rows), first)


def _drafts_of(
    reader: Reader, shape: Shape, account: Account, rows: Iterable[tuple[str, Row]]
) -> list[tuple[str, Draft]]:
    form, columns = plugins.load("formats", shape.form), shape.source.columns
    whole = (located(form, place, renamed(row, columns, place), shape.turns, account) for place, row in rows)
    read = (part for row in whole for part in reader.encoder.apart(replace(row, home=shape.home)))
    batch = [_apart(reader, form, row) for row in read]
    found = reader.encoder.encode(batch)
    for row, draft in zip(batch, found, strict=True):
        draft.confidence = 1.0 if row.confidence is None else row.confidence
        draft.located = row if reader.dataset.retrieve else None
    bare = [_without_context(row) for row in batch]
    reader.told.forms.add(type(bare[0].form).__name__)
    _note_form(reader, shape.name, bare)
    return list(zip((row.place for row in batch), found, strict=True))


def _fitted(reader: Reader, drafts: Iterable[tuple[str, Draft]], first: int) -> tuple[list[Kept], int]:
    """Drafts within the length limit, and how many there were."""
    kept, count = [], 0
    for count, (place, draft) in enumerate(drafts, 1):
        row = fit(reader, place, draft, first + count - 1)
        if isinstance(row, Kept):
            kept.append(row)
        else:
            reader.told.lost[row] += 1
    return kept, count


def _as_turns(reader: Reader, table: Table, form: ModuleType, opening: list[Row]) -> bool:
    """Whether the rows of a table become turns; kept for the record."""
    if not set(reader.task.forms) & WITH_TURNS:
        if reader.dataset.chat is True:
            able = [
                name for name in plugins.names("tasks") if Turns.__name__ in plugins.declared("tasks", name, "FORMS")
            ]
            reader.notes.append(f"dataset.chat is not used: only {', '.join(able)} has turns")
        return False
    chat, recorded, name = reader.dataset.chat, reader.writing.turned, name_of(form)
    turns, note = as_turns(reader.tokenizer, chat, name, opening, recorded)
    if note:
        reader.notes.append(f"{table.name}: {note}")
    if reader.tokenizer.chat_template and name != "text":
        reader.told.turned.setdefault(name, set()).add(turns)
    return turns


def _without_context(row: Located) -> Located:
    """A row as what is trained reads it."""
    return replace(row, form=row.form.said) if isinstance(row.form, Grounded) else row


def _note_form(reader: Reader, table: str, batch: list[Located]) -> None:
    """What a person should know about how these rows were put together."""
    if isinstance(batch[0].form, Turns) and not reader.encoder.closes_turns:
        reader.notes.append(
            "the chat template ends assistant turns without a special token; the end-of-text token was added"
        )
    others = any(isinstance(row.form, Turns) and row.form.marks_others for row in batch)
    if others and reader.dataset.train_on != "all":
        reader.notes.append(
            f"{table}: turns of others than the assistant are marked to train and do not: "
            "dataset.train_on: all trains every turn that is not marked otherwise"
        )
    forms = [row.form for row in batch]
    talks = [form for form in forms if isinstance(form, (Turns, Preference, Judged))]
    reader.told.variables.update(*(form.told.kwargs for form in talks))
    reader.notes += [f"{table}: {remark}" for form in talks for remark in form.remarks]
    if any(isinstance(form, (Turns, Pair)) and form.is_empty for form in forms):
        reader.notes.append(f"{table}: some answers are empty: the model learns to say nothing there")
    pairs = [form for form in forms if isinstance(form, Pair)]
    if reader.encoder.joins and any(pair.runs_on for pair in pairs):
        reader.notes.append(
            f"{table}: some completions follow their prompt with nothing between the two; "
            "end prompts with a space or a newline if that is not meant, or set dataset.separator"
        )


def _apart(reader: Reader, form: ModuleType, row: Located) -> Located:
    """The row with `dataset.separator` behind its prompt, where that is bare text."""
    pair = row.form.said if isinstance(row.form, Grounded) else row.form
    if not reader.encoder.joins or name_of(form) not in ("completion", "grounded") or not isinstance(pair, Pair):
        return row
    apart = pair.apart(reader.dataset.separator)
    reader.told.set_apart |= apart != pair
    return replace(row, form=replace(row.form, said=apart) if isinstance(row.form, Grounded) else apart)


def fit(reader: Reader, place: str, draft: Draft, number: int) -> Kept | str:
    """A draft within the length limit, or why its row is dropped, to follow after `3 rows`."""
    limit = reader.max_length
    reader.vocabulary.check(place, draft.ids, draft.other or draft.labels, *draft.lines)
    truncated = draft.overflows(limit)
    if truncated and reader.dataset.overlong == "error":
        raise DataError(
            f"{place}: longer than max_length {limit}",
            "raise dataset.max_length, or set dataset.overlong: truncate or drop",
        )
    if truncated and reader.dataset.overlong == "drop":
        return f"{LONGER} {limit}"
    cut_answer = draft.loses_answer(limit)
    example = reader.encoder.example(draft, number)
    if not example.input_ids:  # which no model reads
        return EMPTY
    if draft.untaught or not example.supervised():
        return draft.untaught or (f"with an answer that {BEGINS} {limit}" if truncated else EMPTY)
    prompt = hashlib.sha256(draft.prompt.encode("utf-8", "surrogatepass")).digest()[:16]
    return Kept(example, prompt, draft.label, truncated, cut_answer, located=draft.located)
