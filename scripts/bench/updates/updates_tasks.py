"""The rows of updates.py: five domains, ten tasks of continual learning, and general text, as prompt and completion.

A task is a folder with train.jsonl, val.jsonl and test.jsonl. `val` served the choice of the learning rates, `test` only
the tables. Prompts are cut to their first `PROMPT` characters, and rows with a longer completion than `COMPLETION` are
left out: a step is then cheap. Rows with the same prompt are in the same part.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dynlora_cli.data import builtin

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
ROWS = {"train": 800, "val": 64, "test": 64}
PROMPT, COMPLETION, CHUNK = 300, 300, 240  # characters
ANSWER = "\nAnswer: "  # what a prompt of the ten tasks ends with

Row = dict[str, Any]
Rows = Iterator[tuple[str | None, Row]]  # a part (None: the row's prompt decides) and a row

DOMAINS = ("law", "finance", "medicine", "arithmetic", "code")
TASKS = ("agnews", "amazon", "boolq", "cb", "copa", "mnli", "qqp", "rte", "sst2", "wic")


def _lines(path: str) -> Iterator[Row]:
    with (SHARED / "data" / path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _row(prompt: str, end: str, completion: str, longest: int = PROMPT) -> Row:
    return {"prompt": prompt[:longest].rstrip() + end, "completion": completion}


def _law() -> Rows:
    for part, name in ((None, "train"), ("test", "test")):
        for row in _lines(f"legal_complaints/{name}.jsonl"):
            yield part, _row(row["prompt"], "\nDefendants: ", row["completion"], longest=160)


def _finance() -> Rows:
    for part, name in ((None, "train"), ("test", "test")):
        for row in _lines(f"financial_phrasebank/{name}.jsonl"):
            yield part, _row(row["text"], "\nSentiment: ", row["label"])


def _medicine() -> Rows:
    for row in _lines("pubmedqa/queries.jsonl"):
        yield None, _row(row["question"], "\nConclusion: ", row["long_answer"])


def _arithmetic() -> Rows:
    for part, name in ((None, "train"), ("test", "test")):
        for row in _lines(f"gsm8k/{name}.jsonl"):
            if len(row["question"]) <= 180 and len(row["answer"]) <= 160:  # cut, they would make no sense
                yield part, _row(row["question"], "\n", row["answer"])


def _code() -> Rows:
    for split in ("train", "val"):
        for row in builtin.rows(split):
            yield "test" if split == "val" else None, _row(row["prompt"], "", row["completion"])


def _of_ten(task: str) -> Callable[[], Rows]:
    def rows() -> Rows:
        for part, name in ((None, "train"), ("test", "test")):
            for row in _lines(f"continual/{task}_{name}.jsonl"):
                yield part, _row(row["prompt"].removesuffix(ANSWER), ANSWER, row["completion"])

    return rows


def _text(file: str) -> Callable[[], Rows]:
    """Running text in pieces; the base is measured on it, and nothing is trained."""

    def rows() -> Rows:
        text = re.sub(r"\s+", " ", (SHARED / "data" / file).read_text(encoding="utf-8"))
        for start in range(0, len(text) - CHUNK, CHUNK):
            yield None, {"text": text[start : start + CHUNK].strip()}

    return rows


SOURCES: dict[str, Callable[[], Rows]] = {
    "law": _law,
    "finance": _finance,
    "medicine": _medicine,
    "arithmetic": _arithmetic,
    "code": _code,
    **{task: _of_ten(task) for task in TASKS},
    "stories": _text("tinystories_sample/tinystories.txt"),
    "wikitext": _text("wikitext2/valid.txt"),
}


def prepare(name: str, work: Path) -> Path:
    """Write the parts of a task, if they are not there, and return their folder."""
    folder = work / "data" / name
    if folder.is_dir():
        return folder
    making = folder.with_name(f".{name}.{os.getpid()}")
    making.mkdir(parents=True)
    for part, chosen in parts(SOURCES[name]()).items():
        (making / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    making.rename(folder)
    return folder


def parts(source: Rows) -> dict[str, list[Row]]:
    """Rows of each part, in an order that the prompts decide."""
    found: dict[str, list[Row]] = {part: [] for part in ROWS}
    rows = [(_digest(row), part, row) for part, row in source if len(row.get("completion", "")) <= COMPLETION]
    tested = {digest for digest, part, _ in rows if part == "test"}
    for digest, given, row in sorted(rows, key=lambda item: (item[0], json.dumps(item[2]))):
        part = given or _part(digest, bool(tested))
        if (part == "test" or digest not in tested) and len(found[part]) < ROWS[part]:
            found[part].append(row)
    return found


def _digest(row: Row) -> int:
    """A number from the row's prompt: equal prompts stay together, and the order is mixed."""
    return int(hashlib.sha256((row.get("prompt") or row["text"]).encode()).hexdigest()[:12], 16)


def _part(digest: int, has_test: bool) -> str:
    tenth = digest * 7919 % 10
    return "val" if tenth == 0 else "test" if tenth == 1 and not has_test else "train"
