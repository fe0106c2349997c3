"""Where the rows of text_tasks.py come from: sentences of stories, restaurants, films, messages, numbers, styles.

A recipe yields (input, answer). Tasks of a family share their inputs.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
Pairs = Iterator[tuple[str, str]]
NAMES = ("Lily", "Tim", "Tom", "Sara", "Ben", "Anna", "Max", "Lucy", "Jack", "Mia", "Sam", "Sue", "Amy", "Bob", "Spot",
         "Mom", "Dad", "Mommy", "Daddy", "Timmy", "Jane", "Jill", "Billy", "Kitty", "Molly", "Mark", "Benny", "Fluffy")  # fmt: skip
GENDERS = (("he", "she"), ("his", "her"), ("him", "her"), ("boy", "girl"), ("mom", "dad"), ("mommy", "daddy"),
           ("man", "woman"), ("mother", "father"), ("brother", "sister"), ("himself", "herself"))  # fmt: skip
UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
STYLES = {"genesis": "text_mix/genesis.txt", "sherlock": "text_mix/sherlock.txt", "wiki": "text_mix/wiki_demo.txt",
          "state-union": "text_mix/state_union.txt", "inaugural": "text_mix/inaugural.txt", "web": "text_mix/c4_demo.txt",
          "plays": "text_mix/shakespeare_plays.txt", "story": "tinystories_sample/tinystories.txt"}  # fmt: skip


def _text(path: str) -> str:
    return (SHARED / "data" / path).read_text(encoding="utf-8", errors="replace")


def _lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _text(path).splitlines()]


# -- sentences of stories ---------------------------------------------------------------------------------------------


@cache
def stories() -> list[list[str]]:
    """Sentences of paragraphs of TinyStories."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n|<\|endoftext\|>", _text(STYLES["story"])))
    return [re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph) for paragraph in paragraphs if paragraph]


@cache
def sentences(least: int = 5, most: int = 10) -> list[str]:
    """Simple sentences: letters and commas, and a full stop."""
    found = dict.fromkeys(line for story in stories() for line in story if re.fullmatch(r"[A-Z][A-Za-z, ']*\.", line))
    return [line for line in found if least <= len(line.split()) <= most]


def words(line: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", line)


def by_words(answer: Callable[[list[str]], str], most: int = 10) -> Pairs:
    for line in sentences(5, most):
        yield line, answer(words(line))


def by_line(answer: Callable[[str], str], most: int = 10) -> Pairs:
    for line in sentences(5, most):
        yield line, answer(line)


def _longest(parts: list[str]) -> str:
    return max(parts, key=len)  # the first of them, where several are


def _longest_words() -> Pairs:
    for line in sentences():
        lengths = sorted(map(len, words(line)))
        if lengths[-1] > lengths[-2]:
            yield line, _longest(words(line))


def _who() -> Pairs:
    nobody = 0
    for line in sentences():
        named = [word for word in words(line) if word in NAMES]
        nobody += not named
        if len(set(named)) == 1 or (not named and nobody % 4 == 0):
            yield line, named[0] if named else "nobody"


def _next_sentence() -> Pairs:
    simple = set(sentences())
    for story in stories():
        for line, after in itertools.pairwise(story):
            if line in simple and 4 <= len(after.split()) <= 16:
                yield line, after


def _swap_gender() -> Pairs:
    exchange = {a: b for pair in reversed(GENDERS) for a, b in (pair, pair[::-1])}

    def other(match: re.Match[str]) -> str:
        word = match[0]
        new = exchange.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() else new

    for line in sentences():
        if (changed := re.sub(r"[A-Za-z']+", other, line)) != line:
            yield line, changed


def _lower_first(line: str) -> str:
    first = line.split()[0].strip(",")
    return line if first in NAMES or first == "I" else line[0].lower() + line[1:]


# -- restaurants ------------------------------------------------------------------------------------------------------


@cache
def restaurants() -> list[tuple[str, dict[str, str], str]]:
    """Meaning, its slots, a description."""
    rows = _lines("e2e_nlg/valid_clean.jsonl") + _lines("e2e_nlg/test_clean.jsonl")
    return [(row["prompt"], dict(re.findall(r"(\w+)\[([^\]]*)\]", row["prompt"])), row["completion"]) for row in rows]


def slot(key: str, *, missing: str = "unknown") -> Pairs:
    """The value of a slot; a few times that there is none."""
    without = 0
    for meaning, slots, _ in restaurants():
        without += key not in slots
        if key in slots or without % 5 == 0:
            yield meaning, slots.get(key, missing)


def by_slots(answer: Callable[[dict[str, str]], str]) -> Pairs:
    for meaning, slots, _ in restaurants():
        if "name" in slots:
            yield meaning, answer(slots)


def from_text(key: str) -> Pairs:
    """What a description says of a slot, in its words."""
    for _, slots, text in restaurants():
        if slots.get(key, "").lower() in text.lower() and key in slots:
            yield text, slots[key]


# -- films, messages, problems ----------------------------------------------------------------------------------------


def labelled(folder: str, names: dict[Any, str]) -> Pairs:
    """Evenly of all labels."""
    by_label: dict[str, list[str]] = {name: [] for name in names.values()}
    for row in _lines(f"{folder}/train.jsonl"):
        by_label[names[row["label"]]].append(row["text"])
    least = min(map(len, by_label.values()))
    for name, texts in by_label.items():
        yield from ((text, name) for text in texts[:least])


@cache
def problems() -> list[tuple[str, str, str]]:
    """A problem, its question, its operation."""
    kinds = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
    found = []
    for row in _lines("svamp_asdiv_mawps/train_mawps_asdiv.jsonl"):
        text = row["Question"]
        for index, number in enumerate(row["Numbers"].split()):
            text = text.replace(f"number{index}", number.removesuffix(".0"))
        signs, question = set(row["Equation"]) & set(kinds), re.findall(r"[^.?,]*\?", text)
        if len(signs) == 1 and question:
            found.append((text, question[-1].strip(), kinds[signs.pop()]))
    return found


# -- numbers ----------------------------------------------------------------------------------------------------------


def numbers(answer: Callable[[int, int], str]) -> Pairs:
    """Pairs of different numbers below 40."""
    draw = random.Random(0)
    for first in range(40):
        for second in range(40):
            if first != second and draw.random() < 0.6:
                yield f"{first} {second}", answer(first, second)


def in_words(number: int) -> str:
    if number < 20:
        return UNITS[number]
    return TENS[number // 10 - 2] + (f" {UNITS[number % 10]}" if number % 10 else "")


# -- styles -----------------------------------------------------------------------------------------------------------


def style(name: str) -> Pairs:
    """From the first two words of a piece of running text to the next twenty."""
    text = re.sub(r"\s+", " ", re.sub(r"<\|endoftext\|>", " ", _text(STYLES[name])))
    parts = text.split(" ")[300:]  # behind licences and titles
    for start in range(0, min(len(parts), 60000) - 22, 22):
        piece = " ".join(parts[start : start + 22])
        if "â" not in piece:  # quotation marks that somebody has decoded wrongly
            yield " ".join(parts[start : start + 2]), " ".join(parts[start + 2 : start + 22])


RECIPES: dict[str, Callable[[], Pairs]] = {
    "first-word": partial(by_words, lambda parts: parts[0]),
    "last-word": partial(by_words, lambda parts: parts[-1]),
    "second-word": partial(by_words, lambda parts: parts[1]),
    "first-two-words": partial(by_words, lambda parts: " ".join(parts[:2])),
    "last-two-words": partial(by_words, lambda parts: " ".join(parts[-2:])),
    "copy": partial(by_line, lambda line: line),
    "reverse-words": partial(by_words, lambda parts: " ".join(reversed(parts)), 7),
    "uppercase": partial(by_line, str.upper, 6),
    "count-words": partial(by_words, lambda parts: str(len(parts)), 12),
    "longest-word": _longest_words,
    "initials": partial(by_words, lambda parts: " ".join(part[0] for part in parts)),
    "who": _who,
    "next-sentence": _next_sentence,
    "swap-gender": _swap_gender,
    "quote": partial(by_line, lambda line: f'"{line[:-1]}," said mom.'),
    "wonder": partial(by_line, lambda line: f"Did you know that {_lower_first(line)[:-1]}?"),
    "drop-first": partial(by_line, lambda line: line.split(" ", 1)[1]),
    "describe": lambda: ((meaning, text) for meaning, _, text in restaurants()),
    "slot-name": partial(slot, "name"),
    "slot-food": partial(slot, "food"),
    "slot-area": partial(slot, "area"),
    "slot-price": partial(slot, "priceRange"),
    "slot-rating": partial(slot, "rating"),
    "family": partial(slot, "familyFriendly"),
    "slot-keys": partial(by_slots, ", ".join),
    "invite": partial(by_slots, lambda slots: f"Let us go to {slots['name']} tonight."),
    "text-name": partial(from_text, "name"),
    "text-food": partial(from_text, "food"),
    "text-area": partial(from_text, "area"),
    "sentiment": partial(labelled, "rt_polarity", {0: "negative", 1: "positive"}),
    "stars": partial(labelled, "rt_polarity", {0: "one star", 1: "five stars"}),
    "subjectivity": partial(labelled, "subjectivity", {0: "fact", 1: "opinion"}),
    "spam": partial(labelled, "sms_spam", {"ham": "fine", "spam": "spam"}),
    "sum": partial(numbers, lambda a, b: str(a + b)),
    "larger": partial(numbers, lambda a, b: str(max(a, b))),
    "smaller": partial(numbers, lambda a, b: str(min(a, b))),
    "swap-numbers": partial(numbers, lambda a, b: f"{b} {a}"),
    "in-words": partial(numbers, lambda a, b: f"{in_words(a)}, {in_words(b)}"),
    "next-numbers": partial(numbers, lambda a, b: f"{a + 1} {b + 1}"),
    "operation": lambda: ((text, kind) for text, _, kind in problems()),
    "question-only": lambda: ((text, question) for text, question, _ in problems()),
    **{name: partial(style, name) for name in STYLES},
}
