"""What a chat looks like: on a terminal, in a pipe, and as lines of JSON.

TerminalScreen   a person at a terminal: prompts with history, answers as they come, side by side where there is room
LineScreen       a script: each line of stdin is a turn, answers go to stdout without decoration
JsonScreen       the same, each answer a line of JSON
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

from rich.table import Table
from rich.text import Text

from dynlora_cli.cli.views.answers import write
from dynlora_cli.cli.views.console import Console
from dynlora_cli.cli.views.progress import printable
from dynlora_cli.cli.views.side_by_side import GAP, LEAST_COLUMN, Columns, InOrder, WordWrap, ended
from dynlora_cli.config.mix import mix_text
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.generation.session import COMMANDS, Session, Tell

if TYPE_CHECKING:
    from dynlora_cli.generation.requests import Answer, Request
    from dynlora_cli.library.activation import Decision

BLOCK = '"""'


class LineScreen:
    """Each line of stdin is a turn. Answers go to stdout, and all else to stderr.

    Args:
        console: for people.
        stdin, out: of the process.
    """

    def __init__(self, console: Console, stdin: TextIO, out: TextIO) -> None:
        self.console, self.stdin, self.out = console, stdin, out
        self._terminal = out.isatty()
        self.forgiving = stdin.isatty()

    def loading(self) -> AbstractContextManager[object]:
        """Nothing is shown meanwhile."""
        return nullcontext()

    def open(self, base: str, names: Sequence[str]) -> None:
        """Nothing is said: stdout holds answers alone."""

    def read(self, session: Session) -> str | None:
        """The next line, or a block of several between two lines that begin and end with three quotes."""
        if self.forgiving:
            self.console.rich.print(Text(f"{_who(session)} > ", style="label"), end="")
        return _whole(self._line)

    def _line(self) -> str | None:
        try:
            line = self.stdin.readline()
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: not UTF-8 text ({error.reason})", "save it as UTF-8") from None
        return line.removesuffix("\n").removesuffix("\r") if line else None

    def note(self, text: str) -> None:
        self.console.note(text)

    def tell(self, told: Tell) -> None:
        for line in ([told.text] if told.text else []) + [f"  {left:<26}  {right}" for left, right in told.rows]:
            self.console.line(line)

    def problem(self, error: DynloraError) -> None:
        self.console.error(error)

    def begin(self, question: str, speakers: Sequence[str], requests: Sequence[Request]) -> None:  # noqa: ARG002
        self._requests = requests
        self._speakers = InOrder(len(speakers), self._head, self._write, self._end)
        alone, pairs = len(speakers) == 1, zip(speakers, requests, strict=True)
        self._heads = [_decided(request) or ("" if alone else printable(who)) for who, request in pairs]
        self._speakers.start()

    def piece(self, number: int, text: str) -> None:
        self._speakers.piece(number, text)

    def done(self, number: int, answer: Answer) -> None:
        self._speakers.done(number, answer)

    def finish(self) -> None:
        self._speakers.leave()

    def _head(self, number: int) -> None:
        if self._heads[number]:
            self.console.line(Text(self._heads[number], style="accent"))

    def _write(self, text: str) -> None:
        write(self.out, printable(text) if self._terminal else text)

    def _end(self, number: int, answer: Answer | None) -> None:
        write(self.out, "\n")
        if said := ended(answer, self._requests[number]):
            self.console.note(said)


class JsonScreen(LineScreen):
    """Each answer is a line of JSON on stdout."""

    def begin(self, question: str, speakers: Sequence[str], requests: Sequence[Request]) -> None:
        self._asked = question, list(speakers), list(requests)

    def piece(self, number: int, text: str) -> None:
        """Nothing is shown before an answer is whole."""

    def done(self, number: int, answer: Answer) -> None:
        question, speakers, requests = self._asked
        request = requests[number]
        line: dict[str, Any] = {
            "prompt": question,
            "use": speakers[number],
            "mix": None if request.by_token else dict(request.mix),
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": len(answer.ids),
        }
        if (decision := request.decision) is not None:
            line["router"] = request.router
            line["decision"] = {
                "chosen": list(decision.chosen),
                "confidence": decision.confidence,
                "reason": decision.reason,
                "by_token": decision.by_token,
            }
        write(self.out, json.dumps(line, allow_nan=False) + "\n")

    def finish(self) -> None:
        """Whoever reads lines finds in each how its answer has ended."""


class TerminalScreen:
    """A person at a terminal.

    Args:
        out: the terminal.
    """

    forgiving = True

    def __init__(self, out: TextIO) -> None:
        self.console, self.out = Console(out), out
        self._columns: Columns | None = None
        self._echo = ExitStack()
        self._names: list[str] = []
        self._readline = _readline(self._completions)

    def loading(self) -> AbstractContextManager[object]:
        """A sign that something goes on."""
        return self.console.rich.status(Text("loading", style="label"), spinner_style="label")

    def open(self, base: str, names: Sequence[str]) -> None:
        self._names = list(names)
        parts = [(printable(base), "label"), (f"  {', '.join(map(printable, names))}" if names else "", "")]
        self.console.line(Text.assemble(*parts))
        self.console.line(Text("/help for commands, Ctrl-D to leave", style="label"))
        self.console.line()

    def read(self, session: Session) -> str | None:
        return _whole(lambda: self._ask(f"{printable(_who(session))} ›"), lambda: self._ask("   …"))

    def _ask(self, prompt: str) -> str | None:
        """A line typed behind a prompt; readline is told which characters of it take no room."""
        if self.console.coloured and self._readline:
            prompt = f"\x01\x1b[36m\x02{prompt}\x01\x1b[0m\x02"
        try:
            with redirect_stdout(self.out):  # else `input` would not know that this is a terminal
                return input(f"{prompt} ")
        except EOFError:
            self.console.line()
            return None
        except KeyboardInterrupt:
            self.console.line()
            self.console.line(Text("Ctrl-D leaves", style="label"))
            raise
        except UnicodeDecodeError as error:
            raise UsageError(f"this is no UTF-8 text ({error.reason})") from None

    def note(self, text: str) -> None:
        self._say(text, "label")

    def tell(self, told: Tell) -> None:
        if told.text:
            self._say(told.text, "label")
        if told.rows:
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(style="accent", no_wrap=True)
            table.add_column(style="label")
            for row in told.rows:
                table.add_row(*map(printable, row))
            self.console.rich.print(table)
        self.console.line()

    def problem(self, error: DynloraError) -> None:
        self._say(error.message, "bad")
        if error.hint:
            self._say(error.hint, "label")
        self.console.line()

    def _say(self, text: str, style: str) -> None:
        """About the chat, broken between words."""
        self.console.rich.print(Text(printable(text), style=style))

    def begin(self, question: str, speakers: Sequence[str], requests: Sequence[Request]) -> None:  # noqa: ARG002
        self._echo.enter_context(_no_echo(self.out))
        several = len(speakers) > 1
        pairs = zip(speakers, requests, strict=True)
        heads = [(printable(who) if several else "", _decided(request)) for who, request in pairs]
        width = (self.console.rich.width - GAP * (len(speakers) - 1)) // len(speakers)
        if several and width >= LEAST_COLUMN:
            self._columns = Columns(self.console, heads, requests, width)
            self._columns.start()
            return
        self._heads, self._requests = heads, requests
        self._wrap = WordWrap(partial(write, self.out), self.console.rich.width)
        self._in_order = InOrder(len(speakers), self._head, self._wrap.push, self._end)
        self._in_order.start()

    def piece(self, number: int, text: str) -> None:
        (self._columns or self._in_order).piece(number, printable(text))

    def done(self, number: int, answer: Answer) -> None:
        (self._columns or self._in_order).done(number, answer)

    def finish(self) -> None:
        if self._columns is not None:
            columns, self._columns = self._columns, None
            columns.leave()
        else:
            self._in_order.leave()
        self._echo.close()

    def _head(self, number: int) -> None:
        name, decided = self._heads[number]
        if name:
            self.console.line(Text(name, style="accent"))
        if decided:
            self.console.line(Text(decided, style="label"))

    def _end(self, number: int, answer: Answer | None) -> None:
        self._wrap.push("\n")
        if said := ended(answer, self._requests[number]):
            self.console.rich.print(Text(said, style="label"))
        self.console.line()

    def _completions(self, text: str) -> list[str]:
        """What a word may go on as: a command at the start of a line, and names of adapters."""
        words = [*COMMANDS, "/exit"] if text.startswith("/") else self._names
        return [word for word in words if word.startswith(text)]


def _who(session: Session) -> str:
    return "compare" if session.beside else session.speaker


def _decided(request: Request) -> str:
    """What a router has decided, in one line; empty where nobody had to."""
    decision: Decision | None = request.decision
    if decision is None:
        return ""
    who = " | ".join(request.mix) if request.by_token else mix_text(request.mix)
    sure = "".join(f", {name} {value:.2f}" for name, value in list(decision.confidence.items())[:3])
    return printable(f"{who} ({request.router}{sure}): {decision.reason}")


def _whole(line: Callable[[], str | None], more: Callable[[], str | None] | None = None) -> str | None:
    """A line; or all lines of a block that begins with three quotes, without these."""
    text = line()
    if text is None or not text.lstrip().startswith(BLOCK):
        return text
    parts = [text.lstrip().removeprefix(BLOCK)]
    while not parts[-1].rstrip().endswith(BLOCK):
        following = (more or line)()
        if following is None:
            break
        parts.append(following)
    return "\n".join(parts).rstrip().removesuffix(BLOCK).strip("\n")


def _readline(completions: Callable[[str], list[str]]) -> bool:
    """Switch on history and completion; False where Python has no readline, as on Windows."""
    with suppress(ImportError):
        import readline

        def complete(text: str, number: int) -> str | None:
            found = completions(text)
            return f"{found[number]} " if number < len(found) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n,+*=")
        readline.set_auto_history(True)
        libedit = "libedit" in str(readline.__doc__)
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        return True
    return False


@contextmanager
def _no_echo(terminal: TextIO) -> Iterator[None]:
    """In this block the terminal does not show what is typed: it would stand in the midst of an answer."""
    with as_it_was(terminal) as before:
        if before is not None:
            import termios

            silent = list(before)
            silent[3] &= ~termios.ECHO
            termios.tcsetattr(terminal, termios.TCSADRAIN, silent)
        yield


@contextmanager
def as_it_was(terminal: TextIO) -> Iterator[list[Any] | None]:
    """The terminal's settings, which it has again after this block, and where a signal ends the process in it.

    A signal ends a process without leaving its blocks, and the shell would show nothing of what is typed then. None
    where this is no terminal.
    """
    if find_spec("termios") is None:  # Windows
        yield None
        return
    import termios

    try:
        before = termios.tcgetattr(terminal)
    except (termios.error, OSError):  # no terminal after all
        yield None
        return

    def put_back() -> None:
        with suppress(termios.error, OSError):  # it has hung up
            termios.tcsetattr(terminal, termios.TCSANOW, before)

    def end(number: int, _frame: object) -> None:
        put_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    ending = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, end)
    try:
        yield before
    finally:
        put_back()
        for number in ending:
            signal.signal(number, signal.SIG_DFL)
