"""The rows of a recipe's sources, each as an example of its task, or dropped with a reason that is counted."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from dynlora_cli import plugins
from dynlora_cli.data.chat.template import Writing, on_date
from dynlora_cli.data.chat.turns import as_turns
from dynlora_cli.data.chat.ways import Ways
from dynlora_cli.data.columns import Account, example_for, in_yaml, located, renamed
from dynlora_cli.data.examples import Draft, Located
from dynlora_cli.data.forms import PREFERRING, WITH_TURNS, Grounded, Judged, Pair, Plain, Preference, Turns, name_of
from dynlora_cli.data.mix import chosen
from dynlora_cli.data.row_files import Row
from dynlora_cli.data.sources import Table, tables
from dynlora_cli.data.splits import BEGINS, EMPTY, LONGER, Kept
from dynlora_cli.data.vocabulary import Vocabulary
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Dataset, Source, Train
    from dynlora_cli.data.encode import Encoder

_CHUNK = 1024  # rows tokenised in one call


class TaskOfRows(Protocol):
    """What is asked of a task (tasks/task.py) to read rows for it."""

    name: str
    objective: str
    forms: tuple[str, ...]
    has_classes: bool
    outputs: list[str] | None

    def like(self, train: Train | None) -> TaskOfRows:
        """The same task, for the objective of another run."""
        ...

    def encoder(self, tokenizer: PreTrainedTokenizerBase, train_on: str, max_length: int) -> Encoder:
        """Makes examples of rows in their neutral forms."""
        ...


@dataclass(slots=True)
class Reader:
    """What reading needs from source to source."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    task: TaskOfRows
    max_length: int
    encoder: Encoder
    writing: Writing
    vocabulary: Vocabulary
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    lost: dict[bool, Counter[str]] = field(default_factory=lambda: {False: Counter(), True: Counter()})  # held out
    turned: dict[str, set[bool]] = field(default_factory=dict)
    variables: set[str] = field(default_factory=set)  # of the chat template, that recipe, source or row set
    set_apart: bool = False  # rows have `dataset.separator` in them


def read(reader: Reader, sources: Sequence[Source], *, held_out: bool, limited: bool = True) -> tuple[list[Kept], int]:
    """Kept rows of some sources in order, where `limited` no more than they say, and how many were dropped."""
    kept: list[Kept] = []
    numbers = itertools.count()
    lost: Counter[str] = Counter()
    with on_date(reader.writing.moment):
        for number, source in enumerate(sources):
            ways, own = Ways.of(reader.dataset, source), list[Kept]()
            account = Account(source, reader.dataset.retrieve is not None, ways)
            for table in tables(source, reader.notes, held_out=held_out):
                for place, draft in drafts(reader, source, table, account):
                    row = fit(reader, place, draft, next(numbers))
                    if isinstance(row, Kept):
                        row.source = number
                        own.append(row)
                    else:
                        lost[row] += 1
            account.settle(reader.notes)
            kept += _limited(reader, source, own) if limited else own
    reader.lost[held_out] += lost
    return kept, lost.total()


def _limited(reader: Reader, source: Source, rows: list[Kept]) -> list[Kept]:
    """No more rows of a source than the recipe asks for."""
    if source.rows is None or len(rows) <= source.rows:
        if source.rows is not None and len(rows) < source.rows:
            reader.notes.append(f"{source.path}: it has {counted(len(rows), 'row')}, fewer than `rows: {source.rows}`")
        return rows
    reader.notes.append(f"{source.path}: {source.rows} of {counted(len(rows), 'row')}, chosen by seed {reader.seed}")
    return chosen(rows, source.rows, reader.seed)


def drafts(
    reader: Reader, source: Source, table: Table, account: Account, *, skip: int = 0
) -> Iterator[tuple[str, Draft]]:
    """Tokens of a table's rows, tokenised a thousand at a time; without the first `skip`, which are read all the same.

    How rows are read is decided by the first of the table, whatever is skipped.
    """
    rows = ((place, renamed(row, source.columns, place)) for place, row in table.read())
    place, first = next(rows)  # a table without rows has raised
    form = _format(reader, source, table, place, first, account)
    if table.whole_text:
        account.enter(place, first, form)
        reader.forms.add(Plain.__name__)
        pieces = enumerate(reader.encoder.pieces(place, str(first["text"])), 1)
        for number, draft in itertools.islice(pieces, skip, None):
            yield f"{place}, piece {number}", draft
        return
    opening = [(place, first), *itertools.islice(rows, _CHUNK - 1)]
    has_template = _as_turns(reader, table, form, [row for _, row in opening])
    wanted = itertools.islice(itertools.chain(opening, rows), skip, None)
    whole = (located(form, place, row, has_template, account) for place, row in wanted)
    read = (part for row in whole for part in reader.encoder.apart(replace(row, home=table.home)))
    while batch := [_apart(reader, form, row) for row in itertools.islice(read, _CHUNK)]:
        found = reader.encoder.encode(batch)
        for row, draft in zip(batch, found, strict=True):
            draft.confidence = 1.0 if row.confidence is None else row.confidence
            draft.located = row if reader.dataset.retrieve else None
        yield from zip((row.place for row in batch), found, strict=True)
        batch = [_without_context(row) for row in batch]
        reader.forms.add(type(batch[0].form).__name__)
        _note_form(reader, table, batch)


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
        reader.turned.setdefault(name, set()).add(turns)
    return turns


def _format(reader: Reader, source: Source, table: Table, place: str, row: Row, account: Account) -> ModuleType:
    """The format named in the recipe, or the first that fits the columns and the task."""
    if source.format != "auto":
        form = plugins.load("formats", source.format)
        serves = set(form.FORMS) & set(reader.task.forms)
        if not serves or (table.whole_text and source.format != "text"):
            kind = "a text file" if table.whole_text else f"model.task {_called(reader.task)}"
            raise DataError(f"{table.name}: format {source.format!r} does not serve {kind}", _objectives_for(form))
        return form
    columns = set(row)
    fitting = fitting_formats(reader.task.forms, columns)
    if not fitting:
        if not set(reader.task.forms) & PREFERRING:
            account.enter(place, row, None)
        raise _no_format(reader.task, place, row)
    others = [name_of(form) for form in fitting[1:]]
    note = f"{table.name}: format {name_of(fitting[0])}, chosen by its columns"
    note += f" ({', '.join(others)} would fit too)" if others else ""
    reader.notes.append(note)
    return fitting[0]


def _called(task: TaskOfRows) -> str:
    """`causal-lm`, or `causal-lm with train.objective dpo`."""
    return task.name if task.objective == plugins.OBJECTIVE else f"{task.name} with train.objective {task.objective}"


def _objectives_for(form: ModuleType) -> str | None:
    """What to set, where a format is for objectives that have forms of their own."""
    names = plugins.names("objectives")
    able = [name for name in names if set(form.FORMS) & set(plugins.declared("objectives", name, "FORMS", ()))]
    return f"its rows are for train.objective {' or '.join(able)}" if able else None


def _no_format(task: TaskOfRows, place: str, row: Row) -> DataError:
    lines = "\n".join(f"  {name_of(form)}: {form.COLUMNS}" for form in _serving(task.forms))
    named = in_yaml(example_for(row, task.forms))
    hint = f"rename them in the recipe, ours to theirs, such as `columns: {{{named}}}`"
    return DataError(
        f"{place}: no format fits the columns {', '.join(sorted(row))}; for {_called(task)} there are\n{lines}",
        hint if named else "give the rows the columns of one of them",
    )


def fitting_formats(forms: Collection[str], columns: Set[str]) -> list[ModuleType]:
    """The formats whose rows have these columns and give one of some forms; the one to be chosen first."""
    return [form for form in _serving(forms) if form.matches(columns)]


def _serving(forms: Collection[str]) -> list[ModuleType]:
    found = [plugins.load("formats", name) for name in plugins.names("formats")]
    return sorted((form for form in found if set(form.FORMS) & set(forms)), key=lambda form: form.PRECEDENCE)


def _without_context(row: Located) -> Located:
    """A row as what is trained reads it."""
    return replace(row, form=row.form.said) if isinstance(row.form, Grounded) else row


def _note_form(reader: Reader, table: Table, batch: list[Located]) -> None:
    """What a person should know about how these rows were put together."""
    if isinstance(batch[0].form, Turns) and not reader.encoder.closes_turns:
        reader.notes.append(
            "the chat template ends assistant turns without a special token; the end-of-text token was added"
        )
    others = any(isinstance(row.form, Turns) and row.form.marks_others for row in batch)
    if others and reader.dataset.train_on != "all":
        reader.notes.append(
            f"{table.name}: turns of others than the assistant are marked to train and do not: "
            "dataset.train_on: all trains every turn that is not marked otherwise"
        )
    forms = [row.form for row in batch]
    talks = [form for form in forms if isinstance(form, (Turns, Preference, Judged))]
    reader.variables.update(*(form.told.kwargs for form in talks))
    reader.notes += [f"{table.name}: {remark}" for form in talks for remark in form.remarks]
    if any(isinstance(form, (Turns, Pair)) and form.is_empty for form in forms):
        reader.notes.append(f"{table.name}: some answers are empty: the model learns to say nothing there")
    pairs = [form for form in forms if isinstance(form, Pair)]
    if reader.encoder.joins and any(pair.runs_on for pair in pairs):
        reader.notes.append(
            f"{table.name}: some completions follow their prompt with nothing between the two; "
            "end prompts with a space or a newline if that is not meant, or set dataset.separator"
        )


def _apart(reader: Reader, form: ModuleType, row: Located) -> Located:
    """The row with `dataset.separator` behind its prompt, where that is bare text."""
    pair = row.form.said if isinstance(row.form, Grounded) else row.form
    if not reader.encoder.joins or name_of(form) not in ("completion", "grounded") or not isinstance(pair, Pair):
        return row
    apart = pair.apart(reader.dataset.separator)
    reader.set_apart |= apart != pair
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
