"""Answers as they come: their words go to stdout and nothing else does, all about them goes to stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from rich.text import Text

from dynlora_cli.cli.views.console import Console
from dynlora_cli.cli.views.progress import middle_cut, printable
from dynlora_cli.config.mix import mix_text
from dynlora_cli.errors import MachineError
from dynlora_cli.generation.prompts import Prompt

if TYPE_CHECKING:
    from dynlora_cli.commands.generate import Spoken
    from dynlora_cli.generation.requests import Answer, Request

LONGEST_PROMPT = 200  # characters of a prompt above its answer


class ReaderGoneError(Exception):
    """Nobody reads stdout any more, as behind `| head`."""


class AnswerView:
    """Shows answers to people, and to whatever reads stdout.

    Args:
        console: for people.
        out: stdout.
        prompts: all that are asked.
        several: answers are told apart by headings.
    """

    def __init__(self, console: Console, out: TextIO, prompts: Sequence[Prompt], *, several: bool) -> None:
        self.console, self.out, self.prompts, self.several = console, out, prompts, several
        self._terminal = out.isatty()
        self._open = False  # a line has begun
        self._prompt: int | None = None

    def note(self, text: str) -> None:
        """What a person should know."""
        self.leave()
        self.console.note(text)

    def begin(self, spoken: Spoken, request: Request) -> None:
        """Whose answer follows, and to what."""
        if len(self.prompts) > 1 and spoken.prompt != self._prompt:
            prompt = self.prompts[spoken.prompt]
            shown = middle_cut(printable(" ".join(_text(prompt).split())), LONGEST_PROMPT)
            self.console.line(Text.assemble((f"{printable(prompt.place)}  ", "label"), shown))
        self._prompt = spoken.prompt
        if request.decision is not None:
            reason = printable(request.decision.reason)
            self.console.line(Text.assemble((printable(_speaker(request)), "accent"), (f"  {reason}", "label")))
        elif self.several:
            self.console.line(Text(printable(_speaker(request)), style="accent"))

    def piece(self, text: str) -> None:
        """A part of an answer, at once."""
        self._write(printable(text) if self._terminal else text)
        self._open = not text.endswith("\n")

    def end(self, spoken: Spoken, request: Request, answer: Answer) -> None:  # noqa: ARG002 - one signature for all
        """An answer has ended."""
        self._open = self._open or not answer.text
        self.leave()
        if answer.finish_reason == "length":
            self.console.note(f"cut after {len(answer.ids)} tokens: --max-new-tokens, or the model's context")
        elif answer.finish_reason == "failed":
            self.console.warning(f"{_speaker(request)}: the answer ends here, for the model's logits became NaN")
        if self.several:
            self.console.line()

    def leave(self) -> None:
        """End the line of an answer that was left in its middle."""
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        write(self.out, text)


class AnswerLines:
    """Each answer as one line of JSON on stdout.

    Args:
        console: for people.
        out: stdout.
        prompts: all that are asked.
        several: not used; every line says whose it is.
    """

    def __init__(self, console: Console, out: TextIO, prompts: Sequence[Prompt], *, several: bool) -> None:  # noqa: ARG002
        self.console, self.out, self.prompts = console, out, prompts

    def note(self, text: str) -> None:
        """What a person should know."""
        self.console.note(text)

    def begin(self, spoken: Spoken, request: Request) -> None:
        """Nothing is shown before an answer is whole."""

    def piece(self, text: str) -> None:
        """Nothing is shown before an answer is whole."""

    def end(self, spoken: Spoken, request: Request, answer: Answer) -> None:
        """The line of an answer."""
        prompt = self.prompts[spoken.prompt]
        line: dict[str, Any] = {
            "prompt": prompt.content,
            "place": prompt.place or None,
            "use": spoken.use.text,
            "mix": None if request.by_token else dict(request.mix),
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": len(answer.ids),
        }
        if request.decision is not None:
            decision = request.decision
            line["router"] = request.router
            line["decision"] = {
                "chosen": list(decision.chosen),
                "confidence": decision.confidence,
                "reason": decision.reason,
                "by_token": decision.by_token,
            }
        write(self.out, json.dumps(line, allow_nan=False) + "\n")

    def leave(self) -> None:
        """No line is ever left in its middle."""


def write(out: TextIO, text: str) -> None:
    """Write and flush.

    Raises:
        ReaderGoneError: nobody reads it any more.
        MachineError: it takes no more, or cannot say this.
    """
    try:
        out.write(text)
        out.flush()
    except UnicodeEncodeError as error:
        raise MachineError(
            f"stdout is {error.encoding}, which cannot write {error.object[error.start]!r}", "set PYTHONUTF8=1"
        ) from None
    except OSError as error:
        # What is still in the buffer would raise again when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError from None
        raise MachineError(
            f"stdout cannot be written ({error.strerror or error})", "send the answers elsewhere"
        ) from None


def _text(prompt: Prompt) -> str:
    return prompt.content if isinstance(prompt.content, str) else str(prompt.content[-1].get("content") or "")


def _speaker(request: Request) -> str:
    return " | ".join(request.mix) if request.by_token else mix_text(request.mix)
