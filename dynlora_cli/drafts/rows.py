"""What the rows of a source are: task, format, columns, length.

Every row is read by the code that `train` reads it with, so what would be refused there is refused here. No tokenizer
is loaded: how long rows are in tokens is for `--dry-run` to say.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from dynlora_cli import plugins
from dynlora_cli.config.sections import Model, Source
from dynlora_cli.data.columns import Account, example_for, guessed, judges_in_words, located, mark_of, renamed
from dynlora_cli.data.forms import PREFERRING, Judged, Labelled, Preference, as_text, name_of
from dynlora_cli.data.rows.fitting import fitting_formats
from dynlora_cli.data.rows.pieces import Row
from dynlora_cli.data.sources import tables
from dynlora_cli.data.splits import classes_of
from dynlora_cli.errors import DataError, DynloraError, UsageError
from dynlora_cli.models.find import find_model, has_chat_template, is_encoder_decoder, is_hub_name
from dynlora_cli.text import counted

_ASKED, _RANKED = {"query", "anchor", "question"}, {"positive", "passage", "document", "negative"}
CAUSAL, CLASSIFICATION, SEQ2SEQ = "causal-lm", "sequence-classification", "seq2seq-lm"  # the tasks it chooses among
LENGTH = 1024
_SHORTEST = 16  # the fewest tokens of a piece of a text file


@dataclass(frozen=True)
class Base:
    """What the base model's files say; None where they are not looked at."""

    has_template: bool | None = None
    task: str | None = None

    @classmethod
    def of(cls, name: str) -> Base:
        """Of the model with this name; one on the hub is not looked at.

        Raises:
            UsageError: there is none.
        """
        if is_hub_name(name):
            return cls()
        folder, _ = find_model(Model(name_or_path=name))
        return cls(has_chat_template(folder), SEQ2SEQ if is_encoder_decoder(folder) else None)


@dataclass(frozen=True)
class Rows:
    """What the rows of a source are.

    Args:
        source: with the columns that were found.
        task: what they teach.
        form: their format's name.
        count: of rows; a text file is one.
        runs_together: there are prompts that their completions follow with nothing between the two.
        is_text: they are text files, to be cut into pieces.
        length: that examples and pieces may have, in tokens.
        objective: what is learned from them, where that is not to give their answers.
    """

    source: Source
    task: str = CAUSAL
    form: str | None = None
    count: int | None = None
    runs_together: bool = False
    is_text: bool = False
    length: int = LENGTH
    objective: str | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """The neutral forms that are learned from."""
        return _forms(self.task, self.objective)


@dataclass
class _Look:
    """What is seen of a source, row by row."""

    base: Base
    count: int = 0
    runs_together: bool = False
    labels: set[str | int | None] = field(default_factory=set)
    signs: int = 0  # characters of text files

    def read(self, form: ModuleType, place: str, row: Row, account: Account) -> None:
        """Read a row as `train` does, with columns renamed.

        Raises:
            DataError: `train` would refuse it.
        """
        example = located(form, place, row, self.base.has_template is not False, account).form
        self.count += 1
        if isinstance(example, Labelled):
            self.labels.add(example.label)
        if name_of(form) == "completion":
            prompt, completion = as_text(row["prompt"]), as_text(row["completion"])
            if isinstance(prompt, str) and isinstance(completion, str) and prompt and completion:  # else turns
                self.runs_together |= not (prompt[-1].isspace() or completion[0].isspace())


def looked_at(source: Source, base: Base, notes: list[str]) -> Rows:
    """The rows of a local source.

    Raises:
        DataError: they cannot be read, are of several kinds, or too few to learn from.
    """
    found: dict[tuple[str, str | None, str, str], tuple[str, Source]] = {}
    look, account, is_text = _Look(base), None, False
    for table in tables(source, notes, held_out=False):
        rows = table.read()
        place, first = next(rows)  # a table without rows has raised
        task, objective, form, named = _fit(place, first, source, base)
        found.setdefault((task, objective, name_of(form), str(named.columns)), (table.name, named))
        account = account or Account(named)
        look.read(form, place, renamed(first, named.columns, place), account)
        for place, row in rows:
            look.read(form, place, renamed(row, named.columns, place), account)
        if table.whole_text:
            is_text, look.signs = True, look.signs + len(first["text"])
    if len(found) > 1:
        kinds = "; ".join(f"{name}: {form}" for (_, _, form, _), (name, _) in found.items())
        raise DataError(f"{source.path}: its files hold rows of different kinds ({kinds})", "name one of the files")
    ((task, objective, name, _), (_, named)) = next(iter(found.items()))
    if account:
        account.settle(notes)
    if look.count == 1 and not is_text:
        raise DataError(f"{source.path}: one row is all there is to learn from", "add rows")
    if look.labels:
        classes_of(look.labels)
    together = task == CAUSAL and base.has_template is not True and look.runs_together
    notes += _said(source, named, together)
    length = _piece(source, look.signs) if is_text else LENGTH
    notes += [f"{source.path}: rows of the format {name}, for train.objective: {objective}"] if objective else []
    return Rows(named, task, name, look.count, together, is_text, length, objective)


def _piece(source: Source, signs: int) -> int:
    """Tokens of a piece of texts with so many characters: several pieces, also where a token is four of them.

    Raises:
        DataError: there is too little to be cut into pieces.
    """
    if signs < 16 * _SHORTEST:
        raise DataError(f"{source.path}: {counted(signs, 'character')} of text are too few to learn from", "add text")
    length = LENGTH
    while length * 16 > signs:
        length //= 2
    return length


def _said(source: Source, named: Source, together: bool) -> list[str]:
    """Sentences about what was guessed of rows."""
    notes = []
    if named.columns != source.columns:
        shown = ", ".join(f"{ours}: {theirs}" for ours, theirs in named.columns.items())
        notes.append(f"{source.path}: columns known by their names, ours to the data's: {shown}")
    if together:
        says = "dataset.separator puts a newline between them, with which the trained model is to be asked as well"
        notes.append(f"{source.path}: prompts and completions would run together as bare text; {says}")
    return notes


def _fit(place: str, row: Row, source: Source, base: Base) -> tuple[str, str | None, ModuleType, Source]:
    """The task, the objective and the format that rows such as this one are for, and the source, its columns named."""
    missing = [theirs for theirs in source.columns.values() if theirs not in row]
    if missing:
        raise UsageError(f"--columns: {place} has no {missing[0]!r}", f"columns there: {', '.join(row)}")
    # A text with a label could be learned as text, but whoever labels it wants a classifier.
    tasks = [CLASSIFICATION, CAUSAL] if "label" in {*row, *source.columns} else [CAUSAL, CLASSIFICATION]
    tasks = [base.task] if base.task else tasks
    if not (base.task or source.columns) and _RANKED & row.keys() and _ASKED & row.keys():
        tasks = ["embedding", *tasks]  # passages to be found, which no language model writes
    if CAUSAL in tasks and (prefers := _preferring(place, row, source)):
        return CAUSAL, *prefers
    ways = [(task, source) for task in tasks]
    if not source.columns:
        known = [(task, source.model_copy(update={"columns": guessed(row, _forms(task))})) for task in sorted(tasks)]
        ways += sorted(known, key=lambda way: set(way[1].columns) == {"text"})  # two columns say more than one
    for task, named in ways:
        for form in fitting_formats(_forms(task), {*row, *named.columns}):
            return task, None, form, named
    Account(source).enter(place, row, None)  # refuses what no naming of columns helps
    example = ",".join(f"{ours}={theirs}" for ours, theirs in example_for(row, _forms(tasks[0])).items())
    way = f"say which is which, ours to theirs, such as --columns {shlex.quote(example)}"
    raise DataError(
        f"{place}: the columns {', '.join(sorted(row))} fit no format",
        way if example else "none of them holds a text; rows have prompt and completion, messages, or text",
    )


def _preferring(place: str, row: Row, source: Source) -> tuple[str, ModuleType, Source] | None:
    """The objective, the format and the source of rows that compare or judge answers; None for others.

    Raises:
        DataError: answers are judged in words that kto does not know.
    """
    ways = [source]
    if not source.columns and (columns := guessed(row, {Preference.__name__})):
        ways.append(source.model_copy(update={"columns": columns}))
    for form, objective in _preferring_objectives().items():
        for named in ways:
            there = renamed(row, named.columns, place)
            for fitting in fitting_formats({form}, set(there)):
                label = there.get("label", there.get("kto_tag"))
                if form != Judged.__name__ or mark_of(label) in (0, 1):
                    return objective, fitting, named
                if judges_in_words(label):
                    raise DataError(
                        f"{place}: the label is {label!r}, and an answer is good (true) or bad (false)",
                        "write the labels as true and false to learn from both with train.objective: kto",
                    )
    return None  # the label is a class, or there is none


def _preferring_objectives() -> dict[str, str]:
    """Forms of answers that are compared or judged, and the first objective that is made for each."""
    found: dict[str, str] = {}
    for name in plugins.names("objectives"):
        forms: tuple[str, ...] = plugins.declared("objectives", name, "FORMS", ())
        if PREFERRING & set(forms):
            found.setdefault(forms[0], name)
    return found


def taught(objective: str) -> str:
    """What an objective teaches, in words, and the names of others that learn from the same rows."""
    form = _forms(CAUSAL, objective)[0]
    own = [
        name for name in plugins.names("objectives") if form in (plugins.declared("objectives", name, "FORMS") or ())
    ]
    words = plugins.declared("objectives", objective, "TEACHES") or "what rows of this kind teach"
    return " | ".join([words, *(name for name in sorted(own, reverse=True) if name != objective)])


def _forms(task: str, objective: str | None = None) -> tuple[str, ...]:
    """The neutral forms that a task learns from, or an objective that has forms of its own."""
    own = plugins.declared("objectives", objective, "FORMS") if objective else None
    return tuple(own or plugins.declared("tasks", task, "FORMS"))


# -- rows to measure on ----------------------------------------------------------------------------------------------


def beside(files: list[Path], rows: Rows, base: Base, notes: list[str]) -> list[Path]:
    """Those of some files that hold rows of the same kind; of the others a note says why not."""
    fitting = []
    for file in files:
        try:
            source = rows.source.model_copy(update={"path": str(file)})
            for table in tables(source, [], held_out=True):
                look, account = _Look(base), Account(source)
                for place, row in table.read():
                    named = renamed(row, source.columns, place)
                    forms = fitting_formats(rows.forms, set(named))
                    if not forms or name_of(forms[0]) != rows.form:
                        raise DataError(f"{place}: its columns are not those of {rows.form} rows")
                    look.read(forms[0], place, named, account)
            fitting.append(file)
        except DynloraError as error:
            notes.append(f"{file} is left aside: {error.message}")
    return fitting


def say_beside(val: list[Path], test: list[Path], notes: list[str]) -> None:
    if val:
        notes.append(f"held-out loss is measured on {', '.join(map(str, val))} (dataset.val)")
    if test:
        notes.append(f"not trained on, left for `dynlora eval --data`: {', '.join(map(str, test))}")
