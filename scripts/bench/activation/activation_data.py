"""The updates and requests of activation.py: real questions, cut into parts, each prompt in one part alone.

An update is a subject with rows to train on, rows to calibrate on and rows to test on. The chat about one event is cut
into eight topics, by k-means over MiniLM's embeddings of its prompts. All rows, unrelated ones too, have one form: a
question, and its answer behind a space. So the form tells nothing about the subject.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
TOPICS = 8
LONGEST_QUESTION, LONGEST_ANSWER = 160, 200  # characters; a longer answer is cut at a space
ROWS = {"train": 500, "calibrate": 60, "test": 80}  # of an update
UNRELATED = {"calibrate": 100, "test": 150}  # of a source
SEEN = ("tinystories", "gsm8k", "dolly")  # unrelated sources whose rows both calibrate and test
KEPT_BACK = ("e2e", "legal", "shakespeare")  # unrelated sources that only test

Row = dict[str, str]
Embed = Callable[[Sequence[str]], "np.ndarray"]


def lines(path: str) -> Iterator[dict[str, Any]]:
    with (SHARED / "data" / path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def row(question: str, answer: str) -> Row | None:
    """In the one form; None where the question is too long."""
    question, answer = " ".join(question.split()), " ".join(answer.split())
    if len(answer) > LONGEST_ANSWER:
        answer = answer[:LONGEST_ANSWER].rsplit(" ", 1)[0]
    if not 3 <= len(question) <= LONGEST_QUESTION or not answer:
        return None
    return {"question": question, "prompt": question, "completion": f" {answer}"}


def part_of(question: str) -> str:
    """Half of the questions train, the others are shared by calibration and test."""
    place = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 8
    return "train" if place < 4 else "calibrate" if place < 6 else "test"


def chat_topics(embed: Embed) -> dict[str, list[Row]]:
    """The chat's rows by topic."""
    from sklearn.cluster import KMeans

    made = [
        row(r["prompt"], r["completion"]) for name in ("train", "valid") for r in lines(f"chat_mlx_wwdc/{name}.jsonl")
    ]
    rows = [one for one in made if one]
    prompts = sorted({one["question"] for one in rows})
    labels = KMeans(TOPICS, n_init=10, random_state=0).fit_predict(embed(prompts))
    topic = {prompt: f"chat{label}" for prompt, label in zip(prompts, labels, strict=True)}
    found: dict[str, list[Row]] = {f"chat{number}": [] for number in range(TOPICS)}
    for one in rows:
        found[topic[one["question"]]].append(one)
    return found


def asked(name: str) -> list[Row]:
    """Questions of a set with passages."""
    answers = (
        (r["question"], r["long_answer"] if "long_answer" in r else r["answers"][0])
        for r in lines(f"{name}/queries.jsonl")
    )
    return [one for one in (row(q, a) for q, a in answers) if one]


def updates(embed: Embed, seed: int) -> dict[str, dict[str, list[Row]]]:
    """By update and part. The parts are by prompt; `seed` decides which rows of a large part are taken."""
    subjects = chat_topics(embed) | {name: asked(name) for name in ("covidqa", "qed_nq", "xquad_en", "pubmedqa")}
    return {name: cut(rows, ROWS, seed) for name, rows in subjects.items()}


def cut(rows: Sequence[Row], sizes: dict[str, int], seed: int) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {name: [] for name in sizes}
    for one in rows:
        parts[part_of(one["question"])].append(one)
    for name, found in parts.items():
        random.Random(f"{seed} {name}").shuffle(found)
        del found[sizes[name] :]
    return parts


def unrelated(seed: int) -> dict[str, dict[str, list[Row]]]:
    """By source and part, in the same form: a question that no update is about, and its answer."""
    found = {}
    for name in SEEN + KEPT_BACK:
        rows = [one for one in (row(q, a) for q, a in SOURCES[name]()) if one]
        parts: dict[str, list[Row]] = {"calibrate": [], "test": []}
        for one in rows:
            parts["test" if part_of(one["question"]) == "test" or name in KEPT_BACK else "calibrate"].append(one)
        for part, rows_of_part in parts.items():
            random.Random(f"{seed} {part}").shuffle(rows_of_part)
            del rows_of_part[UNRELATED[part] :]
        found[name] = parts
    return found


def passages(name: str) -> list[str]:
    """Passages of a set's documents: pieces of 100 words, from one to four of each, evenly spread; none of a topic."""
    if name.startswith("chat"):
        return []
    most = {"covidqa": 4, "xquad_en": 2}.get(name, 1)  # articles are the longest
    found = []
    for document in lines(f"{name}/corpus.jsonl"):
        words = document["text"].split()
        pieces = [" ".join(words[at : at + 100]) for at in range(0, len(words), 100)]
        found += pieces[:: max(1, len(pieces) // most)][:most]
    return found


def halves(text: str) -> tuple[str, str]:
    """The beginning of a text as a question, and how it goes on."""
    text = " ".join(text.split())
    cut_at = text[: LONGEST_QUESTION - 20].rfind(" ")
    return text[:cut_at], text[cut_at:]


def chunks(path: str, size: int = 400) -> Iterator[tuple[str, str]]:
    text = (SHARED / "data" / path).read_text(encoding="utf-8")
    for start in range(0, min(len(text), 800 * size), size):
        yield halves(text[start : start + size])


def stories() -> Iterator[tuple[str, str]]:
    text = (SHARED / "data" / "tinystories_sample" / "tinystories.txt").read_text(encoding="utf-8")
    for paragraph in text.split("\n\n"):
        if len(paragraph) > 250:
            yield halves(paragraph)


SOURCES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "tinystories": stories,
    "gsm8k": lambda: ((r["question"], r["answer"]) for r in lines("gsm8k/train.jsonl")),
    "dolly": lambda: ((r["instruction"], r["output"]) for r in lines("dolly_3k/train.jsonl") if not r["input"]),
    "e2e": lambda: ((r["prompt"], r["completion"]) for r in lines("e2e_nlg/valid_clean.jsonl")),
    "legal": lambda: (halves(r["prompt"][:400]) for r in lines("legal_complaints/train.jsonl")),
    "shakespeare": lambda: chunks("tinyshakespeare/train.txt"),
}
