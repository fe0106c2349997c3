"""What the functions of `dynlora_cli.api` return: a folder and the command's summary, shown as the command shows it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.config.arguments import place
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.events import Event
from dynlora_cli.runs.log import RunRecord, read_run
from dynlora_cli.runs.report import notebook
from dynlora_cli.runs.report.notebook import in_notebook
from dynlora_cli.text import size

if TYPE_CHECKING:
    from dynlora_cli.cli.views.console import Console


@dataclass(frozen=True, repr=False)
class Result:
    """What came out of a command.

    Attributes:
        summary: as data, the same that the command prints with `--json`.
        notes: what a person should know of it: what was guessed, what was not done.
    """

    summary: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        from dynlora_cli.cli.views.console import Console

        out = io.StringIO()
        console = Console(out, terminal=False)
        self._show(console)
        for note in self.notes:
            console.note(note)
        return out.getvalue().strip("\n")

    def _repr_html_(self) -> str:
        return notebook.page(self._html(), self.notes)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What IPython writes: the whole in a terminal; in a notebook one line, for the page says the rest."""
        printer.text(self._line() if in_notebook() else repr(self))

    def _line(self) -> str:
        return f"<{type(self).__name__}>"

    def _show(self, console: Console) -> None:
        """Write it as the command does."""
        raise NotImplementedError

    def _html(self) -> str:
        return notebook.plain(repr(self))


@dataclass(frozen=True, repr=False)
class Written(Result):
    """A folder that was written.

    Attributes:
        folder: what came out.
    """

    folder: Path = Path()

    def _line(self) -> str:
        return f"<{type(self).__name__} {self.folder}>"


@dataclass(frozen=True, repr=False)
class Run(Written):
    """A run on disk: what `train` and `prune` leave behind.

    Attributes:
        folder: the run folder; it holds the adapter, in the form that stock PEFT loads.
    """

    @cached_property
    def _record(self) -> RunRecord:
        return read_run(self.folder)

    @property
    def metrics(self) -> list[Event]:
        """The lines of metrics.jsonl: losses by step, `train` and `eval` alike, in order."""
        return sorted([*self._record.metrics, *self._record.evals], key=lambda event: event["step"])

    @property
    def rank_events(self) -> list[Event]:
        """The lines of rank_events.jsonl: what each pruning event removed."""
        return self._record.rank_events

    @property
    def ranks(self) -> dict[str, int]:
        """Components that each layer kept; 0 for those that kept none."""
        return dict(self.summary.get("ranks") or {})

    def _show(self, console: Console) -> None:
        from dynlora_cli.cli.views.adapters import AdapterView

        if self.summary.get("command") == "prune":
            view = AdapterView(console)
            (view.show_retired if "born" in self.summary else view.show_pruned)(dict(self.summary))
        else:
            console.show_summary(dict(self.summary))

    def _html(self) -> str:
        return notebook.run(self._record, self.summary)


@dataclass(frozen=True, repr=False)
class Merged(Written):
    """A merged model or pipeline; or, of several adapters, one adapter."""

    def _show(self, console: Console) -> None:
        from dynlora_cli.cli.views.adapters import AdapterView

        AdapterView(console).show_merged(dict(self.summary))

    def _html(self) -> str:
        names = {"base": "the base", "pipeline": "the pipeline", "adapter": "one adapter"}
        into = f"merged into {names[self.summary['into']]}:"
        return notebook.written(into, self.folder, notebook.agreement(self.summary.get("check")))


@dataclass(frozen=True, repr=False)
class Exported(Written):
    """Files for another tool."""

    def _show(self, console: Console) -> None:
        from dynlora_cli.cli.views.adapters import AdapterView

        view = AdapterView(console)
        (view.show_exported_library if "library" in self.summary else view.show_exported)(dict(self.summary))

    def _html(self) -> str:
        rows = [(name, size(file["bytes"])) for name, file in self.summary["files"].items()]
        rows += notebook.agreement(self.summary.get("check"))
        return notebook.written(f"exported to {self.summary['to']}:", self.folder, rows)


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """Numbers on held-out rows.

    `summary` has those of the base under `base`, and those of every adapter in the list `adapters`.
    """

    @property
    def ok(self) -> bool:
        """Whether every threshold was reached."""
        return bool(self.summary["ok"])

    @property
    def losses(self) -> dict[str, float]:
        """The held-out loss by name, in nats per target; `base` is the model without an adapter."""
        base = self.summary.get("base")
        losses = {"base": base["loss"]} if base else {}
        return losses | {one["name"]: one["loss"] for one in self.summary["adapters"]}

    def _show(self, console: Console) -> None:
        from dynlora_cli.cli.views.evaluation import show_evaluation

        show_evaluation(console, self.summary)

    def _html(self) -> str:
        from dynlora_cli.cli.views.evaluation import COLUMNS

        return notebook.page(notebook.evaluation(self.summary, COLUMNS), self.summary["notes"])


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """What an adapter is made of; `summary["adapters"]` has the description of each that was looked at."""

    @property
    def ranks(self) -> dict[str, int]:
        """Components of each layer of the (first) adapter."""
        return {name: layer["rank"] for name, layer in self.summary["adapters"][0].get("layers", {}).items()}

    def _show(self, console: Console) -> None:
        from dynlora_cli.cli.views.adapters import AdapterView

        AdapterView(console).show_inspected(dict(self.summary))


AdapterLike = str | os.PathLike[str] | Written


def folder_of(adapter: AdapterLike) -> Path:
    """Where an adapter is that is given as its folder, or as what wrote it.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(adapter, Written):
        return adapter.folder
    if isinstance(adapter, (str, os.PathLike)):
        return Path(place("adapter", adapter))
    raise UsageError(f"an adapter is a folder or a Run, and no {type(adapter).__name__}", "give its path")


def folders_of(adapters: AdapterLike | Sequence[AdapterLike]) -> list[Path]:
    """The same of one or several.

    Raises:
        UsageError: there are none, or one is no adapter.
    """
    several = adapters if isinstance(adapters, Sequence) and not isinstance(adapters, (str, bytes)) else [adapters]
    if not several:
        raise UsageError("adapter: got an empty list, must be one or more folders or Runs", "name an adapter")
    return [folder_of(one) for one in several]


def births_of(born: AdapterLike | Sequence[AdapterLike]) -> list[str]:
    """Updates, each named by its run's name or id, by its folder, or by what wrote it."""
    several = born if isinstance(born, Sequence) and not isinstance(born, (str, bytes)) else [born]
    return [os.fspath(folder_of(one)) for one in several]
