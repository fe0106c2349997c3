"""What a person sees of `dynlora adapt`: rows as they are written, the run, and what came out."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.status import Status

from dynlora_cli.cli.views.console import Console, pairs
from dynlora_cli.cli.views.progress import joined, printable
from dynlora_cli.runs.events import Event
from dynlora_cli.text import change, count, counted, duration, number, short, size, to_type


class AdaptView:
    """A listener of the events; a context manager while the work goes on.

    While rows are written, a terminal shows the last line of it alone; elsewhere each line is one.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._train = console.train_view()
        self._open = ExitStack()
        self._status: Status | None = None

    def __enter__(self) -> AdaptView:
        self._open.enter_context(self._train)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._still()
        self._open.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        if event["event"] == "progress":
            self._progress(printable(event["text"]))
            return
        if event["event"] == "start":
            self._still()
        self._train(event)

    def _progress(self, text: str) -> None:
        if not self.console.terminal:
            self.console.line(text)
        elif self._status is None:
            self._status = Status(text, console=self.console.rich)
            self._status.start()
        else:
            self._status.update(text)

    def _still(self) -> None:
        """No line that moves any more."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def show(self, summary: dict[str, Any]) -> None:
        """What came out, of the documents first."""
        if "hypernet" in summary:
            self._show_written(summary)
            return
        self.console.show_summary({key: value for key, value in summary.items() if key != "next"})
        adapted = summary.get("adapted") or {}
        documents = adapted.get("documents") or []
        names = ", ".join(document["name"] for document in documents[:3])
        more = f" and {len(documents) - 3} more" if len(documents) > 3 else ""
        before, after, floor = summary.get("loss_before"), summary.get("loss_after"), adapted.get("loss_with_document")
        losses = f"{number(before)} without the document, {number(after)} with the adapter ({change(before, after)})"
        rows = [
            ("documents", joined(names + more, counted(sum(each["chunks"] for each in documents), "chunk"))),
            ("rows", joined(f"{count(adapted.get('rows'))} to train", f"{count(adapted.get('held_out'))} held out")),
            ("questions by", str(adapted.get("questions") or "")),
            ("answers by", str(adapted.get("answers") or "")),
            ("held-out loss", f"{losses}, {number(floor)} with the document in the prompt" if floor else losses),
            ("time", self._times(summary, adapted)),
            ("size", size(summary.get("adapter_bytes"))),
        ]
        self.console.line()
        self.console.show(pairs([(label, text) for label, text in rows if text]))
        self.console.show_next(summary["next"])

    def _show_written(self, summary: dict[str, Any]) -> None:
        """What a hypernetwork wrote, and from what."""
        names = ", ".join(str(document["name"]) for document in summary.get("documents") or ())
        rows = [
            ("written from", printable(str(summary.get("description") or names))),
            ("by", joined(summary["method"], printable(summary["hypernet"]))),
            ("for", printable(str(summary["model"]))),
            ("components", f"{count(summary['components'])} of {count(summary['components_start'])}"),
            ("parameters", f"{count(summary['parameters'])} of {count(summary['parameters_start'])}"),
            ("time", f"{duration(summary['seconds'])}, the base and the network loaded"),
            ("size", joined(size(summary.get("adapter_bytes")), printable(summary["output_dir"]))),
        ]
        self.console.line()
        self.console.show(pairs(rows))
        self.console.show_next(summary["next"])

    @staticmethod
    def _times(summary: dict[str, Any], adapted: dict[str, Any]) -> str:
        writing, training = adapted.get("writing_seconds"), summary.get("seconds")
        return joined(writing and f"{duration(writing)} for the rows", training and f"{duration(training)} to train")

    def show_plan(self, plan: dict[str, Any]) -> None:
        """What would be done."""
        documents, recipe = plan["documents"], Path(plan["output_dir"]) / "recipe.yaml"
        rows = [
            ("model", plan["model"]),
            *(
                (f"{'documents' if not at else ''}", f"{one['name']}  {counted(one['chunks'], 'chunk')}")
                for at, one in enumerate(documents)
            ),
            ("tokens", f"{count(plan['tokens'])} in {counted(plan['chunks'], 'chunk')}"),
            ("rows", f"about {short(plan['rows'])}"),
            ("questions by", plan["questions"]),
            ("budget", str(plan["budget"])),
            ("output", plan["output_dir"]),
            ("memory", f"known once the rows are written: {to_type('train', recipe, '--dry-run')}"),
        ]
        self.console.show(pairs(rows))
