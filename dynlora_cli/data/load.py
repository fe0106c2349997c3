"""The data of a run: from the recipe's sources to token ids with labels, split in training and held-out rows.

The walk: `sources.tables` reads, a file of `formats/` gives each row its neutral form, `Encoder` makes tokens and
labels, and this file cuts, splits, counts and reports. Everything that tools tend to lose in silence (answers cut off,
rows without a target, prompts on both sides of a split) is counted here, and is an error where training would be void.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING

from dynlora_cli import plugins
from dynlora_cli.data.chat_template import Writing, date_note, on_date, read_template, template_name
from dynlora_cli.data.chat_turns import as_turns
from dynlora_cli.data.columns import Account, example_for, in_yaml, located, renamed
from dynlora_cli.data.encode import Encoder
from dynlora_cli.data.examples import IGNORED, Draft, Example, Located
from dynlora_cli.data.forms import Pair, Plain, Turns, name_of
from dynlora_cli.data.row_files import Row
from dynlora_cli.data.sources import BUILTIN, Table, tables
from dynlora_cli.data.splits import (
    BEGINS,
    EMPTY,
    LONGER,
    Kept,
    advice_for,
    class_names,
    note_shared,
    number_labels,
    reasons_of,
    split,
)
from dynlora_cli.data.vocabulary import Vocabulary
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Dataset, Source

CAUSAL, CLASSIFICATION, SEQ2SEQ = "causal-lm", "sequence-classification", "seq2seq-lm"
_CHUNK = 1024  # rows tokenised in one call


@dataclass(slots=True)
class Data:
    """Examples of a run, and what happened to the rows on the way.

    Args:
        train: examples to train on.
        val: held-out examples; may be empty.
        labels: names of the classes, for a classifier.
        notes: sentences for the person who runs it: what was chosen, what to look at.
        counts: for `train` and `val`: rows, tokens, supervised, truncated, cut_answers, dropped.
        sha256: over the options and all examples in order.
        sizing: examples held out from the training rows to choose the rank by; only where that is asked for.
        forms: the neutral forms that rows came in, by name: Turns, Pair, Plain, Labelled.
        writing: how the rows were written; the record of a run keeps it.
    """

    train: list[Example]
    val: list[Example]
    labels: list[str] | None
    notes: list[str]
    counts: dict[str, dict[str, int]]
    sha256: str
    sizing: list[Example] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    writing: Writing = field(default_factory=Writing)


@dataclass(slots=True)
class _Reader:
    """What reading needs from source to source."""

    dataset: Dataset
    tokenizer: PreTrainedTokenizerBase
    task: str
    max_length: int
    encoder: Encoder
    writing: Writing
    vocabulary: Vocabulary
    notes: list[str] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    lost: dict[bool, Counter[str]] = field(default_factory=lambda: {False: Counter(), True: Counter()})  # held out
    turned: dict[str, set[bool]] = field(default_factory=dict)
    set_apart: bool = False  # rows have `dataset.separator` in them


def load_data(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    seed: int,
    max_length: int | None = None,
    num_labels: int | None = None,
    labels: list[str] | None = None,
    sizing: int = 0,
    writing: Writing | None = None,
    table: int | None = None,
    own_classes: list[str] | None = None,
) -> Data:
    """Read, tokenise, split and count the rows of a recipe.

    A `chat_template` in the recipe is set on the tokenizer, so that it is saved with the run.

    Args:
        dataset: the recipe's `dataset` section.
        tokenizer: of the base model.
        task: causal-lm | seq2seq-lm | sequence-classification.
        seed: decides which rows are held out, by a hash of their prompts: row order does not matter.
        max_length: caps `dataset.max_length`, such as at the model's context.
        num_labels: classes that the recipe announces, if it does.
        labels: names of the classes in their order, where they are known; by default they are found in the rows.
        sizing: rows to hold out from the training rows as well, at most a tenth of them.
        writing: how the run that they belong to writes its rows; None: a run that begins now.
        table: tokens that the model has rows for; None: nobody knows.
        own_classes: those that the model has a head for, in its order, if it has one.

    Raises:
        DataError: rows that cannot be trained on; names the place and what to change.
        UsageError: a missing file. MachineError: a hub data set that cannot be reached.
    """
    if dataset.chat_template:
        tokenizer.chat_template = read_template(dataset.chat_template)
    limit = min(dataset.max_length, max_length or dataset.max_length)
    encoder = Encoder(tokenizer, dataset.train_on, limit, decoded=task == SEQ2SEQ)
    vocabulary = Vocabulary(tokenizer, table)
    reader = _Reader(dataset, tokenizer, task, limit, encoder, writing or Writing(), vocabulary)
    train, dropped = _read(reader, dataset.train, held_out=False)
    if task == CLASSIFICATION:
        known = labels or list(reader.writing.labels)
        labels = known or class_names(train, num_labels, own_classes, reader.notes)
    val, val_dropped = _read(reader, dataset.val, held_out=True)
    if dataset.val:
        note_shared(reader.notes, train, val)
    elif all(source.path == BUILTIN for source in dataset.train):
        val, val_dropped = _read(reader, dataset.train[:1], held_out=True)
    else:
        train, val = split(train, dataset.val_size, seed, reader.notes)
    train, sizing_rows = split(train, min(0.1, sizing / max(1, len(train))), seed + 1, reader.notes)
    if labels is not None:
        number_labels(train + val + sizing_rows, labels, reader.notes)
    counts = {"train": _counts(train, dropped), "val": _counts(val, val_dropped)}
    _check_supervised(counts, reader)
    if dataset.separator and not reader.set_apart:
        reader.notes.append("dataset.separator is not used: no row has bare text as its prompt, without a space behind")
    reader.notes += encoder.notes(template_name(dataset.chat_template))
    if Turns.__name__ in reader.forms and (note := date_note(tokenizer.chat_template, reader.writing.moment)):
        reader.notes.append(note)
    training, measured, sized = ([kept.example for kept in part] for part in (train, val, sizing_rows))
    data = Data(training, measured, labels, reader.notes, counts, "", sized, reader.forms, _written(reader))
    data.sha256 = _digest(data, dataset, str(tokenizer.chat_template), limit)
    data.notes = list(dict.fromkeys(reader.notes))
    return data


def _written(reader: _Reader) -> Writing:
    """How the rows were written: of each format that could be turns whether it was, where that is one answer."""
    found = {name: turns == {True} for name, turns in reader.turned.items() if len(turns) == 1}
    return replace(reader.writing, turned=found)


# -- reading ---------------------------------------------------------------------------------------------------------


def _read(reader: _Reader, sources: Sequence[Source], *, held_out: bool) -> tuple[list[Kept], int]:
    """Kept rows of some sources in order, and how many were dropped."""
    kept: list[Kept] = []
    numbers = itertools.count()
    lost: Counter[str] = Counter()
    with on_date(reader.writing.moment):
        for source in sources:
            account = Account(source)
            for table in tables(source, reader.notes, held_out=held_out):
                for place, draft in _drafts(reader, source, table, account):
                    row = _fit(reader, place, draft, next(numbers))
                    if isinstance(row, Kept):
                        kept.append(row)
                    else:
                        lost[row] += 1
            account.settle(reader.notes)
    reader.lost[held_out] += lost
    return kept, lost.total()


def _drafts(reader: _Reader, source: Source, table: Table, account: Account) -> Iterator[tuple[str, Draft]]:
    """Tokens of a table's rows, tokenised a thousand at a time."""
    rows = ((place, renamed(row, source.columns, place)) for place, row in table.read())
    place, first = next(rows)  # a table without rows has raised
    form = _format(reader, source, table, place, first, account)
    if table.whole_text:
        account.enter(place, first, form)
        reader.forms.add(Plain.__name__)
        for number, draft in enumerate(reader.encoder.pieces(place, str(first["text"])), 1):
            yield f"{place}, piece {number}", draft
        return
    opening = [(place, first), *itertools.islice(rows, _CHUNK - 1)]
    has_template = _as_turns(reader, table, form, [row for _, row in opening])
    read = (located(form, place, row, has_template, account) for place, row in itertools.chain(opening, rows))
    while batch := [_apart(reader, form, row) for row in itertools.islice(read, _CHUNK)]:
        drafts = reader.encoder.encode(batch)
        yield from zip((row.place for row in batch), drafts, strict=True)
        reader.forms.add(type(batch[0].form).__name__)
        _note_form(reader, table, batch)


def _as_turns(reader: _Reader, table: Table, form: ModuleType, opening: list[Row]) -> bool:
    """Whether the rows of a table become turns; kept for the record."""
    if reader.task != CAUSAL:
        reader.notes += ["dataset.chat is not used: only causal-lm has turns"] if reader.dataset.chat is True else []
        return False
    chat, recorded, name = reader.dataset.chat, reader.writing.turned, name_of(form)
    turns, note = as_turns(reader.tokenizer, chat, name, opening, recorded)
    if note:
        reader.notes.append(f"{table.name}: {note}")
    if reader.tokenizer.chat_template and name != "text":
        reader.turned.setdefault(name, set()).add(turns)
    return turns


def _format(reader: _Reader, source: Source, table: Table, place: str, row: Row, account: Account) -> ModuleType:
    """The format named in the recipe, or the first that fits the columns and the task."""
    if source.format != "auto":
        form = plugins.load("formats", source.format)
        if reader.task not in form.TASKS or (table.whole_text and source.format != "text"):
            kind = "a text file" if table.whole_text else f"model.task {reader.task}"
            raise DataError(f"{table.name}: format {source.format!r} does not serve {kind}")
        return form
    columns = set(row)
    fitting = fitting_formats(reader.task, columns)
    if not fitting:
        account.enter(place, row, None)
        lines = "\n".join(f"  {name_of(form)}: {form.COLUMNS}" for form in _serving(reader.task))
        named = in_yaml(example_for(row, reader.task))
        raise DataError(
            f"{place}: no format fits the columns {', '.join(sorted(columns))}; for {reader.task} there are\n{lines}",
            f"rename them in the recipe, ours to theirs, such as `columns: {{{named}}}`"
            if named
            else "give the rows the columns of one of them",
        )
    others = [name_of(form) for form in fitting[1:]]
    note = f"{table.name}: format {name_of(fitting[0])}, chosen by its columns"
    note += f" ({', '.join(others)} would fit too)" if others else ""
    reader.notes.append(note)
    return fitting[0]


def fitting_formats(task: str, columns: Set[str]) -> list[ModuleType]:
    """The formats whose rows have these columns, for a task; the one to be chosen first."""
    return [form for form in _serving(task) if form.matches(columns)]


def _serving(task: str) -> list[ModuleType]:
    forms = [plugins.load("formats", name) for name in plugins.names("formats")]
    return sorted((form for form in forms if task in form.TASKS), key=lambda form: form.PRECEDENCE)


def _note_form(reader: _Reader, table: Table, batch: list[Located]) -> None:
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
    reader.notes += [f"{table.name}: {remark}" for form in forms if isinstance(form, Turns) for remark in form.remarks]
    if any(isinstance(form, (Turns, Pair)) and form.is_empty for form in forms):
        reader.notes.append(f"{table.name}: some answers are empty: the model learns to say nothing there")
    pairs = [form for form in forms if isinstance(form, Pair)]
    if not reader.encoder.decoded and any(pair.runs_on for pair in pairs):
        reader.notes.append(
            f"{table.name}: some completions follow their prompt with nothing between the two; "
            "end prompts with a space or a newline if that is not meant, or set dataset.separator"
        )


def _apart(reader: _Reader, form: ModuleType, row: Located) -> Located:
    """The row with `dataset.separator` behind its prompt, where that is bare text."""
    if reader.task != CAUSAL or name_of(form) != "completion" or not isinstance(row.form, Pair):
        return row
    apart = row.form.apart(reader.dataset.separator)
    reader.set_apart |= apart != row.form
    return Located(row.place, apart)


def _fit(reader: _Reader, place: str, draft: Draft, number: int) -> Kept | str:
    """A draft within the length limit, or why its row is dropped, to follow after `3 rows`."""
    limit, cut_answer = reader.max_length, False
    reader.vocabulary.check(place, draft.ids, draft.labels)
    truncated = draft.cut or max(len(draft.ids), len(draft.labels)) > limit
    if truncated and reader.dataset.overlong == "error":
        raise DataError(
            f"{place}: longer than max_length {limit}",
            "raise dataset.max_length, or set dataset.overlong: truncate or drop",
        )
    if truncated and reader.dataset.overlong == "drop":
        return f"{LONGER} {limit}"
    labels: Sequence[int] | int = 0
    if draft.label is None:
        labels = array("i", draft.labels[:limit])
        cut_answer = any(label != IGNORED for label in draft.labels[limit:])
    types = array("i", draft.types) if draft.types else None
    example = Example(array("i", draft.ids[:limit]), labels, number, types, reader.encoder.decoded)
    if not example.input_ids:  # which no model reads
        return EMPTY
    if not example.supervised():
        return draft.untaught or (f"with an answer that {BEGINS} {limit}" if truncated else EMPTY)
    prompt = hashlib.sha256(draft.prompt.encode("utf-8", "surrogatepass")).digest()[:16]
    return Kept(example, prompt, draft.label, truncated, cut_answer)


# -- counts ----------------------------------------------------------------------------------------------------------


def _counts(rows: list[Kept], dropped: int) -> dict[str, int]:
    return {
        "rows": len(rows),
        "tokens": sum(row.example.tokens for row in rows),
        "supervised": sum(row.example.supervised() for row in rows),
        "truncated": sum(row.truncated for row in rows),
        "cut_answers": sum(row.cut_answer for row in rows),
        "dropped": dropped,
    }


def _check_supervised(counts: dict[str, dict[str, int]], reader: _Reader) -> None:
    """Refuse a run that could learn nothing; tell what was lost."""
    train, notes, limit = counts["train"], reader.notes, reader.max_length
    if not train["supervised"]:
        reasons = "; ".join(reasons_of(reader.lost[False]))
        raise DataError(f"dataset.train: no token left to learn from: {reasons}", advice_for(reasons, limit))
    if train["supervised"] < 0.01 * train["tokens"] and train["supervised"] != train["rows"]:
        notes.append(f"only {train['supervised'] / train['tokens']:.2%} of the training tokens carry a loss")
    for part, count in counts.items():
        if count["cut_answers"]:
            notes.append(f"{part}: {count['cut_answers']} of {count['rows']} answers were cut at max_length {limit}")
        if count["dropped"]:
            reasons = "; ".join(reasons_of(reader.lost[part == "val"]))
            notes.append(f"{part}: {counted(count['dropped'], 'row')} dropped: {reasons}")


def _digest(data: Data, dataset: Dataset, template: str, limit: int) -> str:
    options = [dataset.train_on, dataset.overlong, limit, template, data.labels]
    digest = hashlib.sha256(json.dumps(options).encode())
    for name, examples in (("train", data.train), ("val", data.val)):
        digest.update(name.encode())
        for example in examples:
            labels = [example.labels] if isinstance(example.labels, int) else example.labels
            for part in (example.input_ids, labels, example.token_type_ids or ()):
                digest.update(array("i", part).tobytes() + b"|")
    return digest.hexdigest()
