"""`dynlora chat` at a real terminal, and where there is none."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import Answer
from eval_helpers import Run
from test_architecture import fresh

from dynlora_cli.cli.views.chat import LineScreen
from dynlora_cli.cli.views.console import Console
from dynlora_cli.cli.views.side_by_side import WordWrap

pty = pytest.importorskip("pty", reason="there is no pty here")
PROMPT = "›"
PATIENCE = 120  # seconds, on a slow machine


def plain(text: str) -> str:
    """Without what colours and moves."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x01\x02\r]", "", text)


def words(text: str) -> str:
    """In one line, however it was broken."""
    return " ".join(text.split())


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *arguments: object, columns: int = 100) -> None:
        import fcntl
        import termios

        self.raw, self.seen = b"", 0
        self.child, self.descriptor = pty.fork()
        if not self.child:
            # Not the C library's environment: pytest has loaded readline, which puts a window's size into it.
            kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
            command = [sys.executable, "-m", "dynlora_cli", "chat", *map(str, arguments)]
            os.execve(sys.executable, command, kept | {"TERM": "xterm-256color"})
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def until(self, wanted: str) -> str:
        """What is shown from the last call on until `wanted` comes."""
        ends = time.monotonic() + PATIENCE
        while True:
            shown = plain(self.raw.decode("utf-8", "ignore"))
            at = shown.find(wanted, self.seen)
            if at >= 0:
                new, self.seen = shown[self.seen : at + len(wanted)], at + len(wanted)
                return new
            assert time.monotonic() < ends, f"{wanted!r} never came: {shown[self.seen :]}"
            ready, _, _ = select.select([self.descriptor], [], [], 1)
            if ready:
                self.raw += os.read(self.descriptor, 1 << 16)

    def say(self, line: str) -> str:
        """Type a line, and what is shown until the next prompt."""
        self.type(line + "\n")
        self.until("\n")
        return self.until(PROMPT)

    def end(self) -> int:
        """The exit code."""
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            done, status = os.waitpid(self.child, os.WNOHANG)
            if done:
                self.child = 0
                return os.waitstatus_to_exitcode(status)
            ready, _, _ = select.select([self.descriptor], [], [], 0.1)
            if ready:
                try:
                    self.raw += os.read(self.descriptor, 1 << 16)
                except OSError:  # it has hung up
                    time.sleep(0.1)
        raise AssertionError("it does not end")

    def close(self) -> None:
        if self.child:
            os.kill(self.child, 9)
            os.waitpid(self.child, 0)
        os.close(self.descriptor)


@pytest.fixture
def at_terminal(chat_run: Run) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: object, **window: Any) -> Terminal:
        opened.append(Terminal("--adapter", chat_run.folder, *arguments, **window))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


@pytest.mark.slow
def test_a_talk_at_a_terminal(at_terminal: Callable[..., Terminal], tmp_path: Path):
    terminal = at_terminal("--max-new-tokens", 12)
    assert "/help for commands, Ctrl-D to leave" in terminal.until(PROMPT)
    answered = terminal.say("sort 3")
    assert answered.endswith(f"out {PROMPT}")
    assert len(answered.split("\n")[0]) > 3
    assert "there is no command /hepl; did you mean '/help'?" in terminal.say("/hepl")
    assert "/retry" in terminal.say("/help")
    assert terminal.say("/base").endswith(f"base {PROMPT}")
    columns = terminal.say("/compare")
    assert "base, out answer side by side" in columns
    assert re.search(r"base {20,}out", terminal.say("sort 4"))  # in one line: two columns
    path = tmp_path / "talk.jsonl"
    assert "2 turns written to" in words(terminal.say(f"/save {path}"))
    assert "is there already" in words(terminal.say(f"/save {path}"))
    assert json.loads(path.read_text())["messages"][0] == {"role": "user", "content": "sort 3"}
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.slow
def test_answers_stand_one_below_the_other_in_a_narrow_window(at_terminal: Callable[..., Terminal]):
    terminal = at_terminal("--compare", "--max-new-tokens", 6, columns=60)
    assert terminal.until(PROMPT).endswith(f"compare {PROMPT}")
    lines = terminal.say("sort 3").split("\n")
    assert "base" in lines
    assert lines.index("base") < lines.index("out")
    terminal.type("/quit\n")
    assert terminal.end() == 0


@pytest.mark.slow
def test_words_come_one_by_one_and_ctrl_c_stops_them(shared: Path):
    model = shared / "models" / "stories3M"
    terminal = Terminal("--base", model, "--max-new-tokens", 400, "--do-sample", "--seed", 1)
    try:
        terminal.until(PROMPT)
        terminal.type("Once upon a time there was a very long story\n")
        terminal.until("\n")
        sizes: set[int] = set()
        while len(sizes) < 4:  # it is shown while it is written
            assert PROMPT not in terminal.until(" ")
            sizes.add(len(terminal.raw))
        terminal.type("\x03")
        stopped = terminal.until(PROMPT)
        assert "stopped" in stopped
        assert "^C" not in stopped
        time.sleep(2)  # until it listens again: Ctrl-C right at the prompt may be lost
        terminal.type("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_who_ends_it_amid_an_answer_gets_the_terminal_back(shared: Path):
    import termios

    terminal = Terminal("--base", shared / "models" / "stories3M", "--max-new-tokens", 400)
    try:
        terminal.until(PROMPT)
        terminal.type("Once upon a time\n")
        terminal.until("\n")
        terminal.until(" ")
        ends = time.monotonic() + PATIENCE  # a space may come before the answer begins
        while termios.tcgetattr(terminal.descriptor)[3] & termios.ECHO:
            assert time.monotonic() < ends
            time.sleep(0.01)
        os.kill(terminal.child, signal.SIGTERM)
        assert terminal.end() == -signal.SIGTERM
        assert termios.tcgetattr(terminal.descriptor)[3] & termios.ECHO
    finally:
        terminal.close()


# -- without a terminal ----------------------------------------------------------------------------------------------


@pytest.fixture
def script(dynlora: Callable[..., Answer], chat_run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    def run(lines: str, *arguments: object) -> Answer:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return dynlora("chat", "--adapter", chat_run.folder, "--max-new-tokens", 6, *arguments)

    return run


def test_each_line_is_a_turn_and_stdout_holds_answers_alone(script: Callable[..., Answer]):
    rows = [json.loads(line) for line in script("sort 3\n\nsort 4\n", "--json").out.splitlines()]
    assert [(row["prompt"], row["use"]) for row in rows] == [("sort 3", "out"), ("sort 4", "out")]
    assert rows[1]["prompt_tokens"] > rows[0]["prompt_tokens"]
    answer = script("sort 3\n/set seed=1\nsort 4\n/quit\nnever asked\n")
    assert answer.code == 0
    assert answer.out == "".join(row["text"].lstrip() + "\n" for row in rows)
    assert PROMPT not in answer.out + answer.err


def test_a_model_cannot_steer_the_terminal():
    """Lines come from a pipe, and answers go to a terminal."""

    class Window(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, request = Window(), SimpleNamespace(decision=None, by_token=False, mix={})
    screen = LineScreen(Console(io.StringIO()), io.StringIO(), out)
    screen.begin("?", ["out"], [request])  # type: ignore[list-item]
    screen.piece(0, "\x1b]0;owned\x07\x9b2J")
    screen.finish()
    assert not re.search(r"[\x07\x1b\x9b]", out.getvalue())
    assert "owned" in out.getvalue()


def test_side_by_side_in_a_script(script: Callable[..., Answer]):
    answer = script("sort 3\n", "--compare")
    rows = [json.loads(line) for line in script("sort 3\n", "--compare", "--json").out.splitlines()]
    assert answer.out == "".join(row["text"].lstrip() + "\n" for row in rows)
    assert [line for line in answer.err.splitlines() if line in ("base", "out")] == ["base", "out"]
    assert [row["use"] for row in rows] == ["base", "out"]


def test_a_block_of_lines_is_one_turn(script: Callable[..., Answer]):
    (row,) = [json.loads(line) for line in script('"""sort\nthese 3"""\n', "--json").out.splitlines()]
    assert row["prompt"] == "sort\nthese 3"


def test_a_script_ends_at_its_first_mistake(script: Callable[..., Answer]):
    answer = script("/adaptor out\nsort 3\n", "--json")
    assert answer.code == 2
    (line,) = answer.out.splitlines()
    assert json.loads(line)["error"] == "there is no command /adaptor; did you mean '/adapter'?"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nope"], "nope does not exist"),
        ([], "there is no run below ./out"),
        (["--base", "x", "--temperature", "-1"], "temperature is -1"),
        (["--router", "embeding", "--base", "x"], "did you mean 'embedding'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_before_anything_heavy_loads(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, loaded, shown = fresh("chat", *arguments)
    assert (code, loaded) == (2, []), shown
    assert message in " ".join(shown.split())


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_fault(chat_run: Run):
    command = [sys.executable, "-m", "dynlora_cli", "chat", "--adapter", str(chat_run.folder), "--max-new-tokens", "3"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as talking:  # type: ignore[call-overload]
        talking.stdout.close()
        talking.stdin.write(b"sort 3\nsort 4\n")
        talking.stdin.close()
        said = talking.stderr.read().decode()
        assert (talking.wait(PATIENCE), "Traceback" in said) == (0, False), said


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_break_between_words_however_the_text_comes(size: int):
    text = "one two three  four\n\n  five six-seven-eight\tnine " + "x" * 25 + " end"
    shown: list[str] = []
    wrap = WordWrap(shown.append, 12)
    for at in range(0, len(text), size):
        wrap.push(text[at : at + size])
    wrap.flush()
    lines = "".join(shown).split("\n")
    assert "".join(shown).split() == text.split()
    # A word that is longer than a line is broken by the terminal itself.
    assert all(len(line) <= 12 for line in lines if not any(len(word) > 12 for word in line.split()))
    assert lines[:4] == ["one two", "three  four", "", "  five"]
