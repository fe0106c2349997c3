"""Documents with questions about them, from the data sets in DYNLORA_SHARED: what bench documents.py learns, and what it asks.

    xquad      passages of Wikipedia, 5 questions or so each; the answer is a span of the passage
    covidqa    the beginnings of scientific articles, several chunks long, with the questions that are answered there
    pubmedqa   abstracts without their conclusion; one question each, and the conclusion is its answer

Documents are in the order of a hash of their names. The first ten of xquad were used to try settings and are in no
table; no question of any set was seen by the model that writes questions or trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DYNLORA_SHARED", Path(__file__).parents[4] / "shared"))
FOLDERS = {"xquad": "xquad_en", "covidqa": "covidqa", "pubmedqa": "pubmedqa"}
TRIED = {"xquad": 10, "covidqa": 0, "pubmedqa": 0}
BEGINNING = 5000  # characters of an article
LEAST = {"xquad": 3, "covidqa": 3, "pubmedqa": 1}  # questions of a document
LONGEST_ANSWER = 120  # characters; longer ones of covidqa are whole sentences
ARTICLE, PUNCTUATION = re.compile(r"\b(?:a|an|the)\b"), str.maketrans(dict.fromkeys(string.punctuation + "–—’‘“”", " "))


@dataclass(frozen=True)
class Question:
    """A question of a set, and the answers that count as right; the first is the one whose loss is measured."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A document and all questions about it."""

    set: str
    name: str
    title: str
    text: str
    questions: tuple[Question, ...]


def documents(set_: str, many: int, *, tried: bool = False) -> list[Document]:
    """The first documents of a set that were kept back, no two of one title; or those that settings were tried on."""
    folder = SHARED / "data" / FOLDERS[set_]
    asked: dict[str, list[Question]] = {}
    for row in _rows(folder / "queries.jsonl"):
        asked.setdefault(row["passage_id"], []).append(Question(row["question"], tuple(_answers(row))))
    found = []
    for row in sorted(_rows(folder / "corpus.jsonl"), key=lambda row: _hash(folder.name, row["id"])):
        text = beginning(row["text"]) if set_ == "covidqa" else row["text"]
        questions = [q for q in asked.get(row["id"], []) if set_ == "pubmedqa" or _answered(q, text)]
        if len(questions) >= LEAST[set_]:
            found.append(Document(set_, row["id"], row["title"] or row["id"], text, tuple(questions)))
    first, rest = found[: TRIED[set_]], found[TRIED[set_] :]
    return first[:many] if tried else _by_title(rest)[:many]


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # texts hold line separators of Unicode: no splitlines
        return [json.loads(line) for line in file]


def _answers(row: dict[str, Any]) -> list[str]:
    return [row["long_answer"]] if "long_answer" in row else [answer.strip() for answer in row["answers"]]


def _answered(question: Question, text: str) -> bool:
    return len(question.answers[0]) <= LONGEST_ANSWER and any(answer in text for answer in question.answers)


def _hash(folder: str, name: str) -> str:
    return hashlib.sha256((folder + name).encode()).hexdigest()


def _by_title(found: Sequence[Document]) -> list[Document]:
    return list({one.title: one for one in reversed(found)}.values())[::-1]


def beginning(text: str, most: int = BEGINNING) -> str:
    """The first paragraphs of an article that fit, and at least the beginning of its first."""
    if len(text) <= most:
        return text
    cut = text[:most]
    end = cut.rfind("\n\n")
    return cut[:end] if end > most // 3 else cut[: cut.rfind(" ")]


# -- answers ---------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Lower case, no punctuation and articles, as SQuAD compares answers."""
    return " ".join(ARTICLE.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact(said: str, answers: Sequence[str]) -> bool:
    """Whether it is one of the answers, and nothing else."""
    return plain(said) in [plain(answer) for answer in answers]


def contains(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is in it, word by word."""
    return any(f" {plain(answer)} " in f" {plain(said)} " for answer in answers)


def overlap(said: str, answers: Sequence[str]) -> float:
    """SQuAD's F1 over words, the best of the answers."""
    return max(_f1(plain(said).split(), plain(answer).split()) for answer in answers)


def _f1(said: Sequence[str], answer: Sequence[str]) -> float:
    common = (Counter(said) & Counter(answer)).total()
    return 2 * common / (len(said) + len(answer)) if common else 0.0
