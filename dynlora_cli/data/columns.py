"""What becomes of the columns of rows: each is read by the format, or named in a note, or refused.

A format declares what it reads (`COLUMNS`), a recipe what is to be read under another name (`columns`) and what is left
aside on purpose (`ignore`). Of all others a note says that they are not read, unless they say how rows are to be
learned: a run that leaves such a column aside in silence learns something else than its rows ask for.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.chat.ways import COLUMN, Ways
from dynlora_cli.data.examples import Located
from dynlora_cli.data.forms import (
    WITH_TURNS,
    BadRowError,
    Grounded,
    Judged,
    Labelled,
    Plain,
    Preference,
    Turns,
    as_text,
    first_answer,
    name_of,
    refuse_half_characters,
)
from dynlora_cli.data.rows.pieces import Row
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Source

_SHOWN = 8  # names in a note


@dataclass(frozen=True)
class _Meaning:
    """What a column of some names says, and when leaving it aside matters.

    Args:
        says: goes on after `column 'x' is 0.5 here, which`.
        advice: what to do instead of leaving it aside.
        matters: of the first value that was seen in the column, and the present one.
    """

    says: str
    advice: str
    matters: Callable[[Any, Any], bool]


def mark_of(value: object) -> float | None:
    """1.0 for true, 0.0 for false, a number as it is, also where a CSV has made it text; None for anything else."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    try:
        return float(value) if isinstance(value, (bool, int, float, str)) else None
    except (ValueError, OverflowError):
        return None


def _truth(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


# Marks of good and bad answers that are neither true and false nor 1 and 0.
_JUDGING = {"-1", "-1.0", "good", "bad", "up", "down", "thumbs_up", "thumbs_down", "thumbs up", "thumbs down", "like"}
_JUDGING |= {
    "dislike",
    "chosen",
    "rejected",
    "desirable",
    "undesirable",
    "accepted",
    "👍",
    "👎",
    "correct",
    "incorrect",
}


def judges_in_words(value: object) -> bool:
    """Whether a label judges an answer, in other marks than kto reads."""
    return not isinstance(value, bool) and str(value).strip().lower() in _JUDGING


def _judges(value: object) -> bool:
    return _truth(value) or judges_in_words(value) or (mark_of(value) == 1 and not isinstance(value, bool))


def _always(first: Any, value: Any) -> bool:  # noqa: ARG001 - one signature for all
    return True


_ALIKE = "and every row counts alike here"
_WEIGHS = _Meaning(f"weighs rows, {_ALIKE}", "leave rows out, or repeat them", lambda _, value: mark_of(value) != 1)
_MARKS = _Meaning("says which rows train", "leave those out that do not", lambda _, value: mark_of(value) != 1)
_MASKS = _Meaning("says which rows do not train", "leave those out", lambda _, value: mark_of(value) != 0)
_RATES = _Meaning(f"rates rows, {_ALIKE}", "keep the rows that are good enough", lambda first, value: value != first)
_SPLITS = _Meaning(
    "says which split a row is of, and all would train",
    "write a file for each split, under dataset.train and dataset.val",
    lambda first, value: value != first,
)
_JUDGES = _Meaning(
    "tells good answers from bad ones, and all would be learned",
    "keep the rows with good answers, set train.objective: kto to learn from both, or set model.task: "
    "sequence-classification to learn the label",
    lambda first, value: value != first and _judges(value) and _judges(first),
)
_PREFERS = _Meaning(
    "is one of a preference pair, and single answers are learned here",
    "",  # by what the row has: _to_prefer
    _always,
)
_PRECEDES = _Meaning("holds earlier turns of the conversation", "write rows as `messages`, turn by turn", _always)
_OFFERS = _Meaning("offers tools to the model", "write rows as `messages` with `tools`", _always)
_SHOWS = _Meaning("holds what a model of text does not see", "use rows of text alone", _always)
_COVERS = _Meaning("says which tokens train", "mark turns of `messages` with `train: false` instead", _always)

CONFIDENCE = "confidence"  # a column that every format may have beside its own; see `confidence_of`
PASSAGE = "passage_id"  # another, which `dataset.retrieve` alone reads

_MEANINGS = {
    name: meaning
    for names, meaning in (
        ("weight weights sample_weight example_weight loss_weight row_weight", _WEIGHS),
        ("train training trainable loss", _MARKS),
        ("masked", _MASKS),
        ("score scores reward rewards rating ratings", _RATES),
        ("split", _SPLITS),
        ("label kto_tag", _JUDGES),
        ("chosen rejected chosen_response rejected_response chosen_messages rejected_messages", _PREFERS),
        ("history", _PRECEDES),
        ("tools functions", _OFFERS),
        ("image images video videos audio audios", _SHOWS),
        ("loss_mask completion_mask assistant_mask assistant_masks", _COVERS),
    )
    for name in names.split()
}


@dataclass
class Account:
    """The columns of one source's rows.

    Args:
        source: says what is renamed, and what is ignored.
        retrieves: passages are looked for (`dataset.retrieve`).
        ways: how its conversations are written.
        unread, seen, choices: what nothing reads, with first values; all columns; rows with several right answers.
    """

    source: Source
    retrieves: bool = False
    ways: Ways = field(default_factory=Ways)
    unread: dict[str, Any] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    choices: int = 0

    def enter(self, place: str, row: Mapping[str, Any], form: ModuleType | None) -> None:
        """Look at a row.

        Args:
            place: of the row.
            row: its columns, renamed ones under both names.
            form: the format that reads it; None: none does.

        Raises:
            DataError: a column that nothing reads says how the row is to be learned.
        """
        self.seen.update(row)
        self.choices += first_answer(row) is not row and len(row["completion"]) > 1
        aside = {*self.source.columns.values(), *self.source.ignore, CONFIDENCE, *([PASSAGE] if self.retrieves else [])}
        aside |= {COLUMN} if form is not None and set(form.FORMS) & WITH_TURNS else set()
        for name in row.keys() - aside - (columns_of(form) if form else set()):
            value = row[name]
            if value is None or value in ("", [], {}, "[]", "{}", "null"):
                continue
            meaning = _MEANINGS.get(name.lower())
            first = self.unread.setdefault(name, value if meaning else None)
            if meaning and meaning.matters(first, value):
                advice = meaning.advice or _to_prefer(row)
                raise DataError(
                    f"{place}: column {name!r} ({_short(repr(value))} here) {meaning.says}",
                    f"{advice}; or write `ignore: [{name}]` beside the path in the recipe to leave it aside",
                )

    def settle(self, notes: list[str]) -> None:
        """Name what was not read, when all rows were looked at.

        Raises:
            DataError: the recipe ignores a column that no row has.
        """
        for name in self.source.ignore:
            if name not in self.seen:
                there = ", ".join(map(_short, sorted(self.seen)))
                raise DataError(
                    f"{self.source.path}: no column {name!r}, which `ignore` names", f"columns there: {there}"
                )
        if self.choices:
            several = f"{counted(self.choices, 'row')} with several right answers"
            notes.append(f"{self.source.path}: {several}, of which the first is learned")
        names = [_short(name) or "one without a name" for name in self.unread]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            notes.append(f"{self.source.path}: columns that are not read: {', '.join(sorted(names)[:_SHOWN])}{more}")


def _to_prefer(row: Mapping[str, Any]) -> str:
    """How to learn the better answers of rows with preference pairs, by what this one has."""
    names = {each.lower(): each for each in row}
    better = _first(("chosen", "chosen_response", "chosen_messages"), names)
    worse = _first(("rejected", "rejected_response", "rejected_messages"), names)
    if better is None:
        return "the better answers are in the other columns"
    both = "set train.objective: dpo to learn which answer is better"
    if worse and (better, worse) != ("chosen", "rejected"):
        both += f", with `columns: {{chosen: {names[better]}, rejected: {names[worse]}}}`"
    chosen = row[names[better]]
    if isinstance(chosen, str):
        ours = "completion" if "prompt" in row else "output" if "instruction" in row else None
    else:
        ours = "messages" if _is_talk(chosen) and len(chosen) > 1 else None
    if ours is None:
        return f"{both}; to learn the better answers alone, write {names[better]!r} as the last turn of `messages`"
    aside = f" and `ignore: [{names[worse]}]`" if worse else ""
    alone = f"to learn the better answers alone, write `columns: {{{ours}: {names[better]}}}`{aside} beside the path"
    return f"{both}; {alone}"


def columns_of(form: ModuleType) -> set[str]:
    """The names of the columns that a format reads."""
    return {*re.findall(r"\w+", form.COLUMNS), *getattr(form, "ALSO", ())}


def _short(text: str) -> str:
    """Other people's text for a line of ours: printable, and not long."""
    shown = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return shown if len(shown) <= 40 else shown[:37] + "..."


# -- names that others use -------------------------------------------------------------------------------------------

_PAIRED = "question answer, query response, input output, instruction response, problem solution, prompt response"
_ASKS = ("question", "query", "prompt", "instruction", "problem", "input", "user", "source")
_ANSWERS = ("answer", "response", "output", "completion", "reply", "solution", "assistant", "target")
_TALKS = ("conversation", "dialogue", "dialog", "turns", "chat")
_TEXTS = ("sentence", "content", "review", "comment", "body", "document", "article", "passage")
_COMPARED = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
_BETTER = ("chosen", "chosen_response", "response_chosen", "chosen_messages", "accepted", "preferred", "better", "good",
           "preferred_output")  # fmt: skip
_WORSE = ("rejected", "rejected_response", "response_rejected", "rejected_messages", "dispreferred", "worse", "bad",
          "non_preferred_output")  # fmt: skip
_CLASSES = ("label", "labels", "class", "category", "sentiment", "intent")


def guessed(row: Mapping[str, Any], forms: Collection[str]) -> dict[str, str]:
    """Our names to a row's, where its columns have names that others use for the same; empty where they have not.

    Args:
        row: no format fits its columns as they are.
        forms: names of those that the task learns from.
    """
    named = {name.casefold(): name for name in row}
    if Preference.__name__ in forms and Judged.__name__ not in forms:
        better, worse = _first(_BETTER, named), _first(_WORSE, named)
        asks = _first(_ASKS, named)
        asked = {"prompt": named[asks]} if asks and asks != "prompt" else {}
        return {"chosen": named[better], "rejected": named[worse], **asked} if better and worse else {}
    if Labelled.__name__ in forms:
        label = named.get(_first(_CLASSES, named) or "")
        pair = next((pair for pair in _COMPARED if named.keys() >= set(pair)), None)
        text = pair[0] if pair else _first(("text", *_TEXTS), named)
        if not text or not label:
            return {}
        return {"text": named[text], "label": label} | ({"text_pair": named[pair[1]]} if pair else {})
    if Grounded.__name__ in forms:
        return _asked_about(named)
    ordered = [*(tuple(pair.split()) for pair in _PAIRED.split(", ")), *itertools.product(_ASKS, _ANSWERS)]
    for asks, answers in ordered:
        if asks in named and answers in named:
            return _asked(named, asks, answers)
    talk = _first(_TALKS, named) if Turns.__name__ in forms else None
    if talk and _is_talk(row[named[talk]]):
        return {"messages": named[talk]}
    text = _first(("text", *_TEXTS), named) if Plain.__name__ in forms else None
    return {"text": named[text]} if text else {}


def _is_talk(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def in_yaml(columns: Mapping[str, str]) -> str:
    """Names of columns, ours to theirs, to be copied into a recipe."""
    plain = re.compile(r"[^\W\d]\w*([ -]\w+)*")
    shown = {ours: name if plain.fullmatch(name) else json.dumps(name) for ours, name in columns.items()}
    return ", ".join(f"{ours}: {name}" for ours, name in shown.items())


def _asked_about(named: Mapping[str, str]) -> dict[str, str]:
    """A text, a question about it and its answer; the answer may be missing yet."""
    about, asks, answers = (_first(names, named) for names in (("context", "passage", "document"), _ASKS, _ANSWERS))
    if not about or not asks:
        return {}
    wanted = {"context": about, "prompt": asks, **({"completion": answers} if answers else {})}
    return {ours: named[theirs] for ours, theirs in wanted.items() if ours != theirs}


def _asked(named: Mapping[str, str], asks: str, answers: str) -> dict[str, str]:
    """A question and its answer: a prompt and a completion, or an instruction where more than these is to be read."""
    context = "context" if "context" in named and "input" not in named else "input"
    more = {"input": context, "system": "system", "history": "history"}
    if asks == "instruction" or (asks != "input" and any(theirs in named for theirs in more.values())):
        wanted = {"instruction": asks, "output": answers} | more
    else:
        wanted = {"prompt": asks, "completion": answers}
    there = {ours: named[theirs] for ours, theirs in wanted.items() if theirs in named}
    return {ours: theirs for ours, theirs in there.items() if ours != theirs}


def example_for(row: Mapping[str, Any], forms: Collection[str]) -> dict[str, str]:
    """Our names to some of a row's, to show how columns are named; empty where the row has no text."""
    texts = [name for name, value in row.items() if isinstance(value, str) and value and name]
    if found := guessed(row, forms):
        return found
    if Preference.__name__ in forms:
        return {}
    if Plain.__name__ in forms and len(texts) == 1:
        return {"text": texts[0]}
    ours = ("text", "label") if Labelled.__name__ in forms else ("prompt", "completion")
    return dict(zip(ours, texts, strict=False)) if len(texts) > 1 else {}


def _first(names: Iterable[str], there: Mapping[str, str]) -> str | None:
    return next((name for name in names if name in there), None)


def renamed(row: Row, columns: dict[str, str], place: str) -> Row:
    """The row under our column names; `columns` maps ours to theirs.

    Raises:
        DataError: it lacks one of them.
    """
    missing = [theirs for theirs in columns.values() if theirs not in row]
    if missing:
        raise DataError(
            f"{place}: no column {missing[0]!r}, which `columns` names", f"columns there: {', '.join(map(str, row))}"
        )
    return row | {ours: row[theirs] for ours, theirs in columns.items()}


def confidence_of(row: Row, ignored: Collection[str]) -> float | None:
    """The row's own confidence, which must be from 0 to 1; None where it says nothing.

    Raises:
        BadRowError: it is no such number.
    """
    value = None if CONFIDENCE in ignored else row.get(CONFIDENCE)
    if value in (None, ""):
        return None
    number = None if isinstance(value, bool) or _truth(value) else mark_of(value)
    if number is None or not 0 <= number <= 1:
        raise BadRowError(
            f"column {CONFIDENCE!r} is {_short(repr(value))}, and must be from 0 to 1 "
            f"(or write `ignore: [{CONFIDENCE}]` beside the path in the recipe to leave it aside)"
        )
    return number


def _passage_of(row: Row, account: Account) -> str | None:
    value = row.get(PASSAGE) if account.retrieves and PASSAGE not in account.source.ignore else None
    return None if value in (None, "") else str(as_text(value))


def located(form: ModuleType, place: str, row: Row, has_template: bool, account: Account) -> Located:
    """A row in its neutral form; with a template, one that can be turns is.

    Raises:
        DataError: it does not fit the format, or has a column that may not be left aside.
    """
    account.enter(place, row, form)
    try:
        example = account.ways.applied(form.to_example(row, has_template=has_template), row)
        parts = [example.context, example.said] if isinstance(example, Grounded) else [example]
        for part in parts:
            refuse_half_characters(part if isinstance(part, str) else [getattr(part, one.name) for one in fields(part)])
        return Located(place, example, confidence_of(row, account.source.ignore), _passage_of(row, account))
    except BadRowError as error:
        hint = f"columns found: {', '.join(map(str, row))}; a {name_of(form)} row has {form.COLUMNS}"
        raise DataError(f"{place}: {error}", hint) from error
