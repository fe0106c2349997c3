"""Answers that are written at the same time, shown one after the other or side by side.

InOrder     the first one as it comes, the others behind it
Columns     all at once, each in a column of its own
WordWrap    text that comes in pieces, broken between words at the end of a line
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynlora_cli.cli.views.console import Console

if TYPE_CHECKING:
    from dynlora_cli.generation.requests import Answer, Request

LEAST_COLUMN = 36  # characters; in a narrower window answers stand one below the other
GAP = 3
REFRESHES = 8  # a second


class InOrder:
    """Answers that are written side by side, shown one after the other.

    Args:
        count: of answers.
        head: shows whose answer is next, by number.
        write: shows a part of it.
        end: that answer has ended; None: it was stopped.
    """

    def __init__(
        self, count: int, head: Callable[[int], None], write: Callable[[str], None], end: Callable[[int, Any], None]
    ) -> None:
        self.count, self.head, self.write, self.end = count, head, write, end
        self.waiting: list[list[str]] = [[] for _ in range(count)]
        self.answers: dict[int, Answer] = {}
        self.at = 0

    def start(self) -> None:
        if self.at < self.count:
            self.head(self.at)
            for text in self.waiting[self.at]:
                self.write(text)

    def piece(self, number: int, text: str) -> None:
        if number == self.at:
            self.write(text)
        else:
            self.waiting[number].append(text)

    def done(self, number: int, answer: Answer) -> None:
        self.answers[number] = answer
        while self.at in self.answers:
            self.end(self.at, self.answers[self.at])
            self.at += 1
            self.start()

    def leave(self) -> None:
        """End the line of an answer that was left in its middle."""
        if self.at < self.count:
            self.end(self.at, None)
            self.at = self.count


class Columns:
    """Answers side by side, redrawn while they are written.

    Args:
        console: of the terminal.
        heads: of each answer: whose it is, and what a router has decided.
        requests: that are answered.
        width: of a column, in characters.
    """

    def __init__(
        self, console: Console, heads: Sequence[tuple[str, str]], requests: Sequence[Request], width: int
    ) -> None:
        self.console, self.heads, self.requests, self.width = console, heads, requests, width
        self.texts = [""] * len(heads)
        self.ends: list[str | None] = [None] * len(heads)
        self._live = Live(
            self, console=console.rich, refresh_per_second=REFRESHES, transient=True, redirect_stdout=False
        )

    def start(self) -> None:
        self._live.start()

    def piece(self, number: int, text: str) -> None:
        self.texts[number] += text

    def done(self, number: int, answer: Answer) -> None:
        self.ends[number] = ended(answer, self.requests[number])

    def leave(self) -> None:
        """The picture goes, and the whole answers stay."""
        self._live.stop()
        for number, end in enumerate(self.ends):
            self.ends[number] = ended(None, self.requests[number]) if end is None else end
        self.console.rich.print(self._table(None))
        self.console.line()

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        # What does not fit into the window cannot be redrawn, so the newest lines are shown until all is there.
        yield self._table(max(3, console.size.height - 4))

    def _table(self, height: int | None) -> Table:
        table = Table.grid(padding=(0, GAP, 0, 0))
        for _ in self.heads:
            table.add_column(width=self.width)
        table.add_row(*(Text(name, style="accent", no_wrap=True, overflow="ellipsis") for name, _ in self.heads))
        if any(decided for _, decided in self.heads):
            table.add_row(*(Text(decided, style="label") for _, decided in self.heads))
        cells = []
        for text, end in zip(self.texts, self.ends, strict=True):
            lines = list(Text(text).wrap(self.console.rich, self.width))
            lines += Text(end, style="label").wrap(self.console.rich, self.width) if end else []
            cells.append(Text("\n").join(lines if height is None else lines[-height:]))
        table.add_row(*cells)
        return table


class WordWrap:
    """Breaks lines between words, which a terminal by itself does anywhere. A word is shown once it is whole.

    Args:
        write: takes what is to be shown.
        width: of a line, in characters.
    """

    def __init__(self, write: Callable[[str], None], width: int) -> None:
        self.write, self.width = write, width
        self._column, self._space, self._word = 0, "", ""

    def push(self, text: str) -> None:
        """The next piece."""
        for character in text:
            if not character.isspace():
                if self._column == 0 and not self._space and cell_len(self._word) >= self.width:
                    self.flush()  # longer than a line: no use in waiting
                self._word += character
                continue
            self.flush()
            if character == "\n":
                self.write("\n")
                self._column, self._space = 0, ""
            else:
                self._space += " " * 4 if character == "\t" else character

    def flush(self) -> None:
        """What is still waiting, but for spaces at the end of a line."""
        if not self._word:
            return
        size = cell_len(self._word)
        if self._column and self._column + len(self._space) + size > self.width:
            self.write("\n")
            self._column, self._space = 0, ""
        self.write(self._space + self._word)
        self._column = (self._column + len(self._space) + size) % self.width or self.width
        self._space = self._word = ""


def ended(answer: Answer | None, request: Request) -> str:
    """Why an answer ends where it does, if not of itself; None: it was stopped before its end."""
    if answer is None or answer.finish_reason == "cancelled":
        return "stopped"
    if answer.finish_reason == "failed":
        return "the answer ends here, for the model's logits became NaN"
    if answer.finish_reason != "length":
        return ""
    most = request.sampling.max_new_tokens
    if len(answer.ids) < most:
        return f"cut after {len(answer.ids)} tokens: the model's context is full"
    return f"cut after {most} tokens: /set max_new_tokens={2 * most} allows more"
