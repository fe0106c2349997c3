"""A conversation as data: who was asked what, what each speaker has answered, and what of it fits into a context.

Several speakers may answer one question, side by side. Each of them goes on from its own earlier answers, and where it
gave none, from the one that counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """A question and its answers.

    Attributes:
        question: of the user.
        answers: by speaker, as `--use` names them.
        speaker: whose answer counts: it is what speakers see that gave none.
    """

    question: str
    answers: Mapping[str, str]
    speaker: str

    def answer(self, speaker: str | None = None) -> str:
        """The speaker's own answer, or else the one that counts."""
        return self.answers.get(speaker or self.speaker) or self.answers[self.speaker]


@dataclass(frozen=True)
class Conversation:
    """What was said so far.

    Attributes:
        turns: in order.
        system: the system message, if there is one.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None

    def with_turn(self, turn: Turn) -> Conversation:
        return replace(self, turns=(*self.turns, turn))

    def without_last(self) -> Conversation:
        return replace(self, turns=self.turns[:-1])

    def messages(self, speaker: str, question: str, skip: int = 0) -> Messages:
        """What a speaker is asked.

        Args:
            speaker: whose answers to earlier questions it sees, where there are some.
            question: the new one.
            skip: so many of the oldest turns are left out.
        """
        told: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[skip:]:
            told += _pair(turn.question, turn.answer(speaker))
        return [*told, {"role": "user", "content": question}]

    def rows(self, *, chat: bool) -> list[dict[str, Any]]:
        """The conversation as rows that `dynlora train` and `eval` read: the answers that counted.

        Args:
            chat: one row of messages; else a row of prompt and completion for each turn.
        """
        if not chat:
            return [{"prompt": turn.question, "completion": turn.answer()} for turn in self.turns]
        told: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            told += _pair(turn.question, turn.answer())
        return [{"messages": told}] if self.turns else []


def _pair(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def turns_to_skip(tokens: Callable[[int], int], turns: Sequence[Turn], most: int | None) -> int:
    """How many of the oldest turns must be left out; all of them at most.

    Args:
        tokens: how many the conversation has without so many of its turns.
        turns: of the conversation.
        most: tokens that it may have; None: nobody knows.
    """
    if most is None:
        return 0
    return next((skip for skip in range(len(turns)) if tokens(skip) <= most), len(turns))
