"""Conversations whose template does not write all the reasoning at once, as several; and what is said of reasoning.

A template shows a model no thoughts but those of its present answer, since a server does not. A turn whose thoughts are
gone that way becomes a row of its own, up to and with that turn, in which they are shown as a server would show them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dynlora_cli.data.chat.fit import Fit
from dynlora_cli.data.chat.reasoning import AUTO, SWITCHES, found_in, marked_at
from dynlora_cli.data.chat.template import MARKER, write
from dynlora_cli.data.chat.ways import reads
from dynlora_cli.data.forms import BadRowError, Turns
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Reasoned:
    """Rows, so that the template writes the reasoning of every turn that trains.

    Args:
        tokenizer: with the chat template.
        fit: makes conversations as the template wants them.
    """

    tokenizer: PreTrainedTokenizerBase
    fit: Fit
    _rows: Counter[str] = field(default_factory=Counter)
    _turns: Counter[str] = field(default_factory=Counter)
    _wrote_empty: bool = False
    _by_row: bool = False

    def parts(self, turns: Turns, *, train_on: str) -> list[Turns]:
        """The conversations that one is, the whole of it last.

        Args:
            turns: as the data have it.
            train_on: the recipe's `dataset.train_on`.

        Raises:
            BadRowError: the template never writes the reasoning of a turn that trains.
        """
        kind = self._count(turns)
        if kind != "with" or turns.told.reasoning == "drop":
            return [turns]
        speaks = [number for number, message in enumerate(turns.messages) if message["role"] == "assistant"]
        speaks = speaks[-1:] if train_on == "completion" else speaks
        wanted = [number for number in speaks if number not in turns.untrained]
        left = {number for number in wanted if found_in(turns.messages[number])[0]} - self._shown(turns)
        if not left:
            return [turns]
        if train_on == "all":
            self._turns["unshown"] += len(left)
            return [turns]
        return self._apart(turns, wanted, left)

    def _apart(self, turns: Turns, wanted: list[int], left: set[int]) -> list[Turns]:
        """Rows for the turns whose reasoning the whole conversation does not show, and it for the others."""
        whole = replace(turns, untrained=turns.untrained | left)
        parts = [whole] if set(wanted) - left else []
        while left:
            last = max(left)
            part = replace(turns, messages=turns.messages[: last + 1])
            shown = self._shown(part) & left
            if last not in shown:
                raise _never(last)
            parts.append(replace(part, untrained=frozenset(range(last + 1)) - shown))
            left = left - shown
        self._rows["apart"] += 1
        self._turns["apart"] += len(parts)
        return parts[::-1]

    @property
    def counts(self) -> tuple[Counter[str], Counter[str], bool, bool]:
        """What was counted: rows and turns by what they hold, and two truths for `notes`."""
        return self._rows, self._turns, self._wrote_empty, self._by_row

    def add(self, counts: tuple[Counter[str], Counter[str], bool, bool]) -> None:
        """What was counted of other rows."""
        rows, turns, wrote_empty, by_row = counts
        self._rows, self._turns = self._rows + rows, self._turns + turns
        self._wrote_empty, self._by_row = self._wrote_empty or wrote_empty, self._by_row or by_row

    def refuse_lost(self, turns: Turns) -> None:
        """Refuse an answer at the end of a conversation whose reasoning is to be learned, and is not written.

        Raises:
            BadRowError: it is so.
        """
        last = len(turns.messages) - 1
        if turns.told.reasoning != "drop" and found_in(turns.messages[last])[0] and last not in self._shown(turns):
            raise _never(last)

    def _shown(self, turns: Turns) -> set[int]:
        """Numbers of the turns whose reasoning the template writes in this conversation."""
        fitted = self.fit.wanted(turns)
        messages, numbers = fitted.messages, []
        for number, message in enumerate(messages):
            if found_in(message)[0]:
                messages = marked_at(messages, number, f"{MARKER}{number}{MARKER}")
                numbers.append(number)
        text = write(self.tokenizer, messages, fitted.tools, fitted.told.kwargs)
        return {number for number in numbers if f"{MARKER}{number}{MARKER}" in text}

    def _count(self, turns: Turns) -> str:
        """Count a row by what it holds."""
        answers = [found_in(message)[0] for message in turns.messages if message["role"] == "assistant"]
        thoughts = sum(bool(thought) for thought in answers)
        kind = "with" if thoughts else "without"
        self._rows[kind] += 1
        self._rows[turns.told.reasoning] += kind == "with"
        self._turns[turns.told.reasoning] += thoughts
        self._by_row |= any(turns.told.kwargs.get(name) == AUTO for name in SWITCHES)
        if not thoughts or turns.told.reasoning == "drop":
            self._wrote_empty |= self.fit.puts_empty_block(turns)
        return kind

    def _advice(self) -> str:
        """How rows with and without reasoning can be told apart, where the template has a variable for that."""
        name = next((name for name in SWITCHES if reads(self.tokenizer.chat_template, name)), None)
        if name is None:
            return ": nothing in the prompt tells the model which of the two is wanted"
        return f"; `chat_template_kwargs: {{{name}: auto}}` asks for each row in the mode that it is in"

    def notes(self, template: str) -> list[str]:
        """What a person should know about the reasoning in the rows; `template` is their template in words."""
        rows, found = self._rows, []
        if not rows["with"] and not self._wrote_empty:
            return []
        for mode, says in (
            ("keep", "is trained on"),
            ("mask", "is read and not trained on, with its marks (dataset.reasoning: mask)"),
            ("drop", "is left out (dataset.reasoning: drop)"),
        ):
            if self._turns[mode]:
                found.append(
                    f"the reasoning of {counted(self._turns[mode], 'answer')} in {counted(rows[mode], 'row')} {says}"
                )
        if rows["with"] and rows["without"]:
            counts = f"{counted(rows['with'], 'row')} with reasoning, {counted(rows['without'], 'row')} without"
            if self._by_row:
                found.append(f"{counts}: each is asked for in the mode that it is in (enable_thinking: auto)")
            else:
                how = ", with an empty think block" if self._wrote_empty else ""
                found.append(f"{counts}, which stay as {template} writes them{how}{self._advice()}")
        elif self._wrote_empty and not rows["with"]:
            found.append(
                f"{template} puts an empty think block before answers without reasoning: see it by --dry-run; "
                "`chat_template_kwargs: {enable_thinking: false}` makes it part of the prompt"
            )
        if rows["apart"]:
            found.append(
                f"{template} leaves out what the assistant thought in earlier turns, as a server would: so "
                f"{counted(rows['apart'], 'conversation')} became {counted(self._turns['apart'], 'row')}, in each of "
                "which the last answer stands with its thoughts"
            )
        if self._turns["unshown"]:
            found.append(
                f"{template} leaves out the reasoning of {counted(self._turns['unshown'], 'earlier answer')}: with "
                "dataset.train_on: all each conversation is written once"
            )
        return found


def _never(number: int) -> BadRowError:
    return BadRowError(
        f"message {number + 1}: the chat template never writes what the assistant thinks there; set "
        "dataset.reasoning: drop to train on answers alone, or a dataset.chat_template that writes it"
    )
