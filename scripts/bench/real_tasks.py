"""What real.py trains on: six public sets, each cut to about 30,000 training tokens, in the form in which people have them.

Rows with a prompt go through the model's chat template, as `dynlora train` would do with the file; running text stays
text. Rows are chosen by length, so that none is cut and a step of 8 rows stays short. Where a set comes with a test part,
that is the one; elsewhere rows are parted by their prompt. `val` is for every choice, `test` for tables alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from quality_tasks import SHARED, Row, divide, lines, write

VAL, TEST = 64, 96
GENERAL_CHUNKS, GENERAL_TOKENS = 48, 128
WINDOW = 700  # characters of a legal complaint, around the names

Rows = Iterator[tuple[str | None, Row]]


@dataclass(frozen=True)
class Task:
    """A set: `rows` yields (part, row), part None means that the prompt decides; `train` is how many are trained on."""

    rows: Callable[[], Rows]
    train: int


def _e2e() -> Rows:
    for row in lines("e2e_nlg/valid_clean.jsonl"):
        yield None, row


def _gsm8k() -> Rows:
    for part, name in ((None, "train"), ("test", "test")):
        for row in lines(f"gsm8k/{name}.jsonl"):
            if len(row["question"]) + len(row["answer"]) < 400:
                yield part, {"prompt": row["question"], "completion": row["answer"]}


def _dolly() -> Rows:
    for row in lines("dolly_3k/train.jsonl"):
        prompt = "\n\n".join(filter(None, (row["instruction"], row["input"])))
        if len(prompt) + len(row["output"]) < 400:
            yield None, {"prompt": prompt, "completion": row["output"]}


def _chat() -> Rows:
    for name in ("train", "valid"):
        for row in lines(f"chat_mlx_wwdc/{name}.jsonl"):
            if len(row["prompt"]) + len(row["completion"]) < 500:
                yield None, row


def _legal() -> Rows:
    """The stretch of a complaint in which all of the defendants are named; the task is to name them."""
    for name in ("train", "test"):
        for row in lines(f"legal_complaints/{name}.jsonl"):
            text, surnames = (
                row["prompt"],
                [who.split()[-1].lower() for who in row["completion"].split(",") if who.strip()],
            )
            places = [text.lower().find(surname) for surname in surnames]
            start = max(0, min(places) - 100)
            if min(places) >= 0 and max(places) < start + WINDOW:
                question = "Name the individual defendants.\n\n" + text[start : start + WINDOW]
                yield None, {"prompt": question, "completion": row["completion"]}


def _shakespeare() -> Rows:
    for part, name in ((None, "train"), ("test", "test")):
        for chunk in chunks(f"tinyshakespeare/{name}.txt", 400):
            yield part, {"text": chunk}


def chunks(path: str, characters: int) -> Iterator[str]:
    """Running text in pieces."""
    text = re.sub(r"[ \t]+", " ", (SHARED / "data" / path).read_text(encoding="utf-8"))
    for start in range(0, len(text) - characters, characters):
        yield text[start : start + characters].strip()


TASKS = {
    "e2e": Task(_e2e, 320),
    "gsm8k": Task(_gsm8k, 200),
    "dolly": Task(_dolly, 320),
    "chat": Task(_chat, 320),
    "legal": Task(_legal, 128),
    "shakespeare": Task(_shakespeare, 240),
}
LONG = {"e2e-long": Task(_e2e, 1600)}  # five times the steps: where do leads of short runs go?


def task_of(name: str) -> Task:
    """One of ours, or a file of rows with `prompt` and `completion`, or `text`: its name ends in .jsonl."""
    if not name.endswith(".jsonl"):
        return (TASKS | LONG)[name]
    text = Path(name).read_text(encoding="utf-8")
    return Task(lambda: ((None, json.loads(line)) for line in text.splitlines() if line.strip()), 320)


def _folder_of(name: str) -> str:
    """The task's name; of a file, what is in it, so that a changed one is read again."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16] if name.endswith(".jsonl") else name


def prepare(name: str, work: Path) -> Path:
    """Write train.jsonl, val.jsonl and test.jsonl of a task, if they are not there, and return their folder."""
    folder = work / "data" / _folder_of(name)
    if folder.is_dir():
        return folder
    task = task_of(name)
    parts = divide(task.rows(), {"train": 10**9, "val": 10**9, "test": 10**9})
    train = sorted(parts["train"], key=lambda row: hashlib.sha256(json.dumps(row).encode()).hexdigest())
    chosen = {"train": train[: task.train], "val": _spread(parts["val"])[:VAL], "test": _spread(parts["test"])[:TEST]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write(chosen, folder)


def general(work: Path) -> Path:
    """A file of general text, about which the model should know as much after a run as before it."""
    folder = work / "data" / "general"
    if folder.is_dir():
        return folder / "val.jsonl"
    long = [chunk for chunk in chunks("wikitext2/valid.txt", 6 * GENERAL_TOKENS) if len(chunk) > 5 * GENERAL_TOKENS]
    rows: list[Row] = [{"text": chunk} for chunk in long[:: len(long) // GENERAL_CHUNKS][:GENERAL_CHUNKS]]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write({"val": rows}, folder) / "val.jsonl"


def _spread(rows: list[Row]) -> list[Row]:
    """Rows of different prompts first."""
    seen: Counter[str] = Counter()
    keyed = []
    for place, row in enumerate(rows):
        prompt = row.get("prompt") or row["text"]
        keyed.append((seen[prompt], place))
        seen[prompt] += 1
    return [rows[place] for _, place in sorted(keyed)]
