"""Which format reads the rows of a table, by their columns and by what a task learns from."""

from __future__ import annotations

from collections.abc import Collection, Set
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from dynlora_cli import plugins
from dynlora_cli.data.columns import Account, example_for, in_yaml
from dynlora_cli.data.forms import PREFERRING, name_of
from dynlora_cli.data.rows.pieces import Row
from dynlora_cli.data.sources import Table
from dynlora_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Source, Train
    from dynlora_cli.data.encode import Encoder


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


def format_of(
    task: TaskOfRows, notes: list[str], source: Source, table: Table, place: str, row: Row, account: Account
) -> ModuleType:
    """The format named in the recipe, or the first that fits the columns and the task.

    Args:
        task: of the run.
        notes: told which was chosen.
        source, table, place, row: where the first row stands, and that row.
        account: of the source's columns.

    Raises:
        DataError: none fits, or the one that is named does not serve.
    """
    if source.format != "auto":
        form = plugins.load("formats", source.format)
        serves = set(form.FORMS) & set(task.forms)
        if not serves or (table.whole_text and source.format != "text"):
            kind = "a text file" if table.whole_text else f"model.task {_called(task)}"
            raise DataError(f"{table.name}: format {source.format!r} does not serve {kind}", _objectives_for(form))
        return form
    columns = set(row)
    fitting = fitting_formats(task.forms, columns)
    if not fitting:
        if not set(task.forms) & PREFERRING:
            account.enter(place, row, None)
        raise _no_format(task, place, row)
    others = [name_of(form) for form in fitting[1:]]
    note = f"{table.name}: format {name_of(fitting[0])}, chosen by its columns"
    note += f" ({', '.join(others)} would fit too)" if others else ""
    notes.append(note)
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
