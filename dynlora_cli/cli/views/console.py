"""What a person sees while a command runs. Everything here goes to stderr.

Console        start, example, plan, summary, notes and errors, as text that fits the terminal
TrainView      listener of the training loop: a live picture on a terminal, plain lines anywhere else
rank_map       blocks x module types with the components alive in each layer
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from dynlora_cli.cli.views.progress import (
    Progress,
    joined,
    middle_cut,
    printable,
    sample_rows,
    sparkline,
    start_rows,
    trained,
    with_budget,
)
from dynlora_cli.cli.views.rank_map import rank_map
from dynlora_cli.errors import DynloraError
from dynlora_cli.runs.log import Event
from dynlora_cli.text import MEASURES, change, count, counted, duration, number, percent, rate, short, size

# Readable on dark and on light terminals: no yellow and no white. What is good or bad is not dimmed with its column.
THEME = Theme(
    {
        "accent": "cyan",
        "label": "dim",
        "good": "not dim green",
        "bad": "not dim red",
        "warn": "not dim magenta",
        "head": "bold",
        "bar.back": "dim",
    }
)
REFRESHES_PER_SECOND = 4
PLAIN_WIDTH = 100  # width of tables where there is no terminal window
SHOWN_OF_PIECE = 600  # characters of one piece of the example


class Console:
    """Writes for people, to stderr.

    Args:
        file: where to write; stderr by default.
        terminal: whether it is a terminal that may be animated and coloured; found out by default. `TERM=dumb` says
            no, `NO_COLOR` keeps the animation but not the colours.
        width, height: of the window; found out by default.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        terminal: bool | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> None:
        file = file or sys.stderr
        if terminal is None:
            terminal = file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self.terminal = terminal
        self.rich = RichConsole(
            file=file,
            force_terminal=terminal,
            width=width or (None if terminal else PLAIN_WIDTH),
            height=height,
            theme=THEME,
            highlight=False,
            markup=False,
            emoji=False,
        )

    @property
    def coloured(self) -> bool:
        return self.terminal and not self.rich.no_color

    def line(self, text: str | Text = "") -> None:
        """One line, which we never break: paths and commands are there to be copied."""
        self.rich.print(printable(text) if isinstance(text, str) else text, soft_wrap=True)

    def sentence(self, text: str | Text, indent: int = 2) -> None:
        """Words; in a window broken between them, further lines set in. A word longer than the window stays whole."""
        text = Text(printable(text)) if isinstance(text, str) else text
        first, *more = between_words(text, max(20, self.rich.width - indent)) if self.terminal else [text]
        self.line(first)
        for line in more:
            self.line(Text.assemble(" " * indent, line))

    def note(self, text: str) -> None:
        self.sentence(Text.assemble(("note: ", "accent"), printable(text)), len("note: "))

    def warning(self, text: str) -> None:
        self.sentence(Text.assemble(("warning: ", "warn"), printable(text)), len("warning: "))

    def error(self, error: DynloraError) -> None:
        """What is wrong, line by line, and what to do next."""
        lead, *more = printable(error.message).split("\n")
        self.line(Text.assemble(("error: ", "bold red"), lead))
        for line in more:
            self.line(Text(f"       {line}"))
        if error.hint:
            self.line(Text.assemble((" hint: ", "accent"), printable(error.hint)))

    def show(self, content: RenderableType) -> None:
        """A table or a group; for a file without the blanks that fill a window's lines."""
        if self.terminal:
            self.rich.print(content)
            return
        with self.rich.capture() as capture:
            self.rich.print(content)
        self.rich.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))

    def train_view(self) -> TrainView:
        """A listener for the training loop, to be used as a context manager."""
        return TrainView(self)

    def show_start(self, event: Event) -> None:
        """What is about to be trained: the `start` event of the loop."""
        self.line(Text(printable((event.get("run") or {}).get("name") or "dynlora train"), style="head"))
        self.show(pairs(start_rows(event)))
        for note in event.get("notes") or ():
            self.note(note)
        if event.get("example"):
            self.show_example(event["example"])

    def show_example(self, pieces: Iterable[Sequence[Any]]) -> None:
        """One example as the model sees it; what counts in the loss is in ⟦ ⟧, and in colour where there is any."""
        text = Text()
        for content, in_loss in pieces:
            shown = middle_cut(printable(content), SHOWN_OF_PIECE)
            text.append(f"⟦{shown}⟧" if in_loss else shown, style="bold cyan" if in_loss else "dim")
        legend = Text("one example; ", style="label")
        legend.append("⟦this⟧ counts in the loss", style="not dim cyan")
        self.line()
        self.line(legend)
        self.show(Padding(text, (0, 2)))
        self.line()

    def show_samples(self, event: Event, progress: Progress) -> None:
        """What the model answers at an evaluation; in one piece, so that the picture below is drawn once."""
        parts: list[tuple[str, str]] = [(f"at {count(event['step'])}, held out {number(progress.held_out)}\n", "label")]
        for label, text, right in sample_rows(event, max(20, self.rich.width - 14)):
            style = ("good" if right else "head") if label == "answered" else "label"
            parts += [(f"  {label:<8}  ", "label"), (f"{text}\n", style)]
        self.line(Text.assemble(*parts))

    def show_summary(self, summary: dict[str, Any]) -> None:
        """What came out: numbers before and after, the rank map, where the adapter is, and what to type next."""
        parts: list[RenderableType] = [Text(), _headline(summary), Text(), _before_after(summary)]
        if summary.get("also"):
            parts += [Text(), also_table(summary["also"])]
        if summary.get("ranks"):
            ranks = summary["ranks"]
            start: float = (summary.get("components_start") or 0) / len(ranks) or max(ranks.values())
            parts += [Text(), rank_map(ranks, dict.fromkeys(ranks, start), self.rich.width - 2, 40)]
        if summary.get("output_dir"):
            kind = joined(summary.get("adapter"), size(summary.get("adapter_bytes")))
            parts += [Text(), Text.assemble(("adapter  ", "label"), f"{printable(summary['output_dir'])}  ({kind})")]
        for note in summary.get("notes") or ():
            parts.append(Text.assemble(("note: ", "accent"), printable(note)))
        self.show(Group(*parts))
        if summary.get("next"):
            self.show_next(summary["next"])

    def show_next(self, commands: Iterable[str]) -> None:
        """Commands that make sense now, to be copied."""
        self.line()
        self.line(Text("Next", style="head"))
        for command in commands:
            self.line(Text(f"  {printable(command)}", style="accent"))


def between_words(text: Text, width: int) -> list[Text]:
    """The text in lines of at most `width` cells, but for words that are longer, which stay whole to be copied."""
    ends, used = [], 0
    for word in re.finditer(r"\S+\s*", text.plain):
        if used and used + cell_len(word[0].rstrip()) > width:
            ends.append(word.start())
            used = 0
        used += cell_len(word[0])
    lines = list(text.divide(ends))
    for line in lines:
        line.rstrip()
    return lines


class TrainView:
    """Shows a training run while it goes on; a context manager, and a listener of the loop's events.

    On a terminal one live picture is redrawn a few times a second and gone at the end, for the summary to stand in its
    place; when the run fails, the last picture stays. Elsewhere every event that matters is one plain line.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress()
        self._live: Live | None = None

    def __enter__(self) -> TrainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(keep=kind is not None)

    def __call__(self, event: Event) -> None:
        self.progress.hear(event)
        kind = event["event"]
        if kind == "start":
            self.console.show_start(event)
            self._start()
        elif kind == "end":
            self._stop(keep=False)
        elif kind == "note":
            self.console.note(event["text"])
        elif kind == "warning":
            self.console.warning(event["text"])
        elif kind == "samples" and self._live is not None:
            self.console.show_samples(event, self.progress)
        elif self._live is None and (line := self.progress.line(event)):
            self.console.line(line)

    def begin(self, event: Event) -> None:
        """Take the `start` event without showing what it says: the picture alone."""
        self.progress.hear(event)
        self._start()

    def _start(self) -> None:
        if self.console.terminal:
            # stdout is left alone: it may be carrying the JSON of --json
            self._live = Live(
                self,
                console=self.console.rich,
                refresh_per_second=REFRESHES_PER_SECOND,
                redirect_stdout=False,
                transient=True,
            )
            self._live.start()

    def _stop(self, keep: bool) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.transient = not keep
            live.stop()

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        progress, width, height = self.progress, options.max_width, console.size.height
        numbers = _live_numbers(progress, wide=width >= 50)
        beside = width >= 90
        room = height - 6 if beside else height - 7 - numbers.row_count
        map_width = width - 46 if beside else width - 2
        yield Text()
        yield _bar(progress, width)
        yield Text()
        if not progress.ranks or room < 3:
            yield numbers
            return
        ranks = rank_map(progress.ranks, progress.start, map_width, room)
        if beside:
            both = Table.grid(padding=(0, 4, 0, 0))
            both.add_row(numbers, ranks)
            yield both
        else:
            yield Group(numbers, Text(), ranks)


def _bar(progress: Progress, width: int) -> Table:
    """The progress bar with the step and the time left."""
    left = "" if progress.seconds_left is None else f"{duration(progress.seconds_left)} left"
    step = f"{count(progress.step)}/{count(progress.steps)}"
    row = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(
        total=max(1, progress.steps),
        completed=progress.step,
        width=max(10, width - len(step) - len(left) - 6),
        complete_style="accent",
        finished_style="accent",
    )
    row.add_row(bar, Text(step, style="head"), Text(left, style="label"))
    return row


def _live_numbers(progress: Progress, wide: bool) -> Table:
    latest, run = progress.latest, progress.run
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="label", no_wrap=True)
    grid.add_column(no_wrap=True, min_width=27)  # so that the map beside it does not move
    spark = sparkline(progress.losses, 18) if wide else ""
    held_out = Text(number(progress.held_out))
    if wide and progress.held_out_step is not None:
        held_out.append(f" at {count(progress.held_out_step)}", style="label")
    if progress.held_out != progress.held_out_first:
        held_out.append(f"  from {number(progress.held_out_first)}", style="label")
    if progress.accuracy is not None:
        held_out.append(f"  {percent(progress.accuracy)} right")
    grid.add_row("loss", Text.assemble((progress.loss(latest), "head"), "  ", (spark, "accent")))
    grid.add_row("held out", held_out)
    if run.get("components"):
        grid.add_row("components", f"{count(latest.get('components'))} of {count(run['components'])}")
    grid.add_row("parameters", with_budget(latest.get("parameters") or trained(run), run))
    grid.add_row("learning rate", rate(latest.get("learning_rate")))
    grid.add_row("speed", f"{count(latest.get('tokens_per_second'))} tok/s")
    grid.add_row("memory", size(latest.get("memory_bytes")))
    if progress.last_event:
        grid.add_row("pruned", progress.last_event.replace("->", "→"))
    return grid


def _headline(summary: dict[str, Any]) -> Text:
    facts = joined(
        counted(summary.get("steps"), "step"),
        f"rate found in {duration(spent)}" if (spent := summary.get("rate_seconds")) else "",
        f"{short(summary.get('tokens'))} tokens at {count(summary.get('tokens_per_second'))} tok/s",
        f"{size(summary.get('peak_memory_bytes'))} peak memory",
    )
    done = ("Done", "bold green") if summary.get("ok", True) else ("Stopped", "bold red")
    return Text.assemble(done, (f" in {duration(summary.get('seconds'))}", "head"), (f"   {facts}", "label"))


def _before_after(summary: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="label")
    table.add_column("", style="label")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="head")
    table.add_column("", style="label")
    for key, label, show, rises in MEASURES:
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if after is not None:
            better = before is not None and (after > before if rises else after < before)
            style = "label" if rises is None else "good" if better else "bad"
            table.add_row(f"held-out {label}", show(before), show(after), Text(change(before, after), style=style))
    budget = f"budget {count(summary['budget_parameters'])}" if summary.get("budget_parameters") else ""
    after = summary.get("parameters")  # as many as before, where nothing can be pruned
    table.add_row("parameters", count(summary.get("parameters_start", after)), count(after), budget)
    if summary.get("budget_bytes") or summary.get("save_dtype"):
        most = f"budget {count(summary['budget_bytes'])}" if summary.get("budget_bytes") else ""
        of = joined(most, summary.get("save_dtype"))
        table.add_row("bytes of the file", "", count(summary.get("adapter_bytes")), of)
    ranks = list((summary.get("ranks") or {}).values())
    spread = f"per layer {min(ranks)} to {max(ranks)}, mean {sum(ranks) / len(ranks):.1f}" if ranks else ""
    if summary.get("components_start") is not None:
        table.add_row("components", count(summary["components_start"]), count(summary.get("components")), spread)
    first, last = summary.get("tokens_per_second_start"), summary.get("tokens_per_second_end")
    if first is not None and last is not None:
        table.add_row("tokens/s", count(first), count(last), change(first, last))
    for key, label in (("trained_bytes", "adapter, gradient"), ("optimizer_bytes", "optimizer")):
        if summary.get(key):
            beside = f"beside {size(summary['base_bytes'])} of the base" if key == "trained_bytes" else ""
            table.add_row(label, size(summary[f"{key}_start"]), size(summary[key]), beside)
    return table


def also_table(also: dict[str, dict[str, Any]]) -> Table:
    """Losses on rows of other kinds before and after; what is above 0 was forgotten."""
    table = plain_table("also measured", "rows", "before", "after", "forgetting")
    for name, one in also.items():
        lost = Text(f"{one['forgetting']:+.4f}", style="bad" if one["forgetting"] > 0 else "good")
        table.add_row(printable(name), count(one["rows"]), number(one["before"]), number(one["after"]), lost)
    return table


def plain_table(*heads: str) -> Table:
    """A table without rules; names are set left, numbers right."""
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="label")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index == 0 or not head else "right", no_wrap=True)
    return table


def pairs(rows: Iterable[tuple[str, str]]) -> Padding:
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="label", no_wrap=True)
    grid.add_column()
    for label, value in rows:
        grid.add_row(printable(label), printable(value))
    return Padding(grid, (0, 0, 0, 2))
