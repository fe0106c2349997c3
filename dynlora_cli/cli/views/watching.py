"""What shows a Python call while it goes on: a notebook's display, the terminal's picture, a function."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from dynlora_cli.cli.views.adapters import AdapterView
from dynlora_cli.cli.views.console import Console, TrainView
from dynlora_cli.cli.views.progress import Progress
from dynlora_cli.errors import UsageError
from dynlora_cli.execution.interrupt import ask_here
from dynlora_cli.runs.events import Event
from dynlora_cli.runs.report import notebook

Show = Callable[[Event], Any]
SECONDS_BETWEEN = 0.5  # two pictures of a notebook


class Heard:
    """A listener that hands events on, and keeps what a person should know.

    Attributes:
        notes: of all events, each once.
    """

    def __init__(self, show: Show | None) -> None:
        self._show = show
        self.notes: list[str] = []

    def __call__(self, event: Event) -> None:
        texts = [event["text"]] if event["event"] in ("note", "warning") else event.get("notes") or ()
        self.notes += [text for text in dict.fromkeys(texts) if text not in self.notes]
        if self._show is not None:
            try:
                self._show(event)
            except KeyboardInterrupt:
                if not ask_here():
                    raise


@contextmanager
def watched(progress: Literal["auto"] | Show | None) -> Iterator[Heard]:
    """A listener of events inside the block.

    Args:
        progress: "auto": a notebook or a terminal, where there is one; a function that takes events; None: nobody.

    Raises:
        UsageError: it is none of these.
    """
    if progress is None or callable(progress):
        yield Heard(progress)
    elif progress != "auto":
        raise UsageError(f"progress is {progress!r}", 'give "auto", a function that takes events, or None')
    elif notebook.in_notebook():
        yield Heard(NotebookView())
    elif (console := Console()).terminal:
        with console.train_view() as view:
            yield Heard(_Terminal(view))
    else:
        yield Heard(None)


class _Terminal:
    """The picture of the commands."""

    def __init__(self, view: TrainView) -> None:
        self._train, self._others = view, AdapterView(view.console)

    def __call__(self, event: Event) -> None:
        if event["event"] == "point":
            self._others(event)
        elif event["event"] == "progress":
            self._train.console.line(event["text"])
        else:
            self._train(event)


class NotebookView:
    """One output of a notebook's cell, which is redrawn while a run goes on."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._handle: Any = None
        self._drawn = 0.0
        self._lines: list[str] = []

    def __call__(self, event: Event) -> None:
        self.progress.hear(event)
        kind = event["event"]
        if kind in ("note", "warning", "progress"):
            self._lines.append(event["text"])
        if kind == "end":
            self._draw(notebook.ended(event["summary"]))
        elif kind != "tick" or time.monotonic() - self._drawn > SECONDS_BETWEEN:
            self._draw(self._picture())

    def _picture(self) -> str:
        state = self.progress
        if not state.run:
            return notebook.lines(self._lines)
        return notebook.live(
            state.step, state.steps, state.latest, (state.held_out_first, state.held_out), state.ranks, state.start
        )

    def _draw(self, html: str) -> None:
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)
        else:
            self._handle.update(HTML(html))
