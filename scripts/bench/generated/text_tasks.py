"""Forty-nine small text tasks that a model of 3 M parameters can learn, each with twelve descriptions.

A prompt never says what is asked: the same kind of line occurs with many tasks, and only the description tells them
apart. Forty-one tasks are seen in training; eight are held out as a whole, some of them with close relatives among the
seen ones, `initials` with none. Of each seen task's descriptions, two are held out.

An input text is in the same part (train, val, test) whatever the task: the hash of it decides. So a row of `test` was
not seen with another answer either. `val` serves every choice, `test` only the tables.

An answer ends with a line break, which the model knows: its end-of-text token it has never seen, and learns so slowly that
it would be most of the loss of an answer of one word. So that token is trained, but not measured.

`make(folder)` writes FOLDER/TASK/{train,val,test}.jsonl and TASK/descriptions.txt (the ten that training may see). The
rows of `test` are in test-0.jsonl and test-1.jsonl as well: each half is asked with one of two descriptions.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from text_rows import RECIPES

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
MODEL = SHARED / "models" / "stories3M"
DESCRIPTIONS = Path(__file__).with_name("text_descriptions.yaml")
Row = dict[str, str]
ROWS = {"train": 480, "val": 24, "test": 48}
LONGEST = 64  # tokens of a row, with those at its ends
KEPT_BACK = 2  # descriptions of each task
HELD_OUT = ("second-word", "last-two-words", "initials", "slot-rating", "text-food", "stars", "smaller", "inaugural")
NONSENSE = (  # sentences that describe no task
    "The harbour was full of fog, and nobody had fed the cats.",
    "Granite is harder than marble, but it is more difficult to carve.",
    "My uncle sold his bicycle in the autumn of that year.",
    "Penguins, unlike puffins, live on the southern half of the globe.",
)


@dataclass(frozen=True)
class Task:
    """A task with its texts.

    Attributes:
        seen: descriptions that training may draw from.
        kept_back: the others.
    """

    name: str
    seen: tuple[str, ...]
    kept_back: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return self.name in HELD_OUT


@cache
def tasks() -> dict[str, Task]:
    """All tasks by name."""
    written = yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))
    return {name: _task(name, texts) for name, texts in written.items()}


def seen() -> list[str]:
    return [name for name in tasks() if name not in HELD_OUT]


def _task(name: str, texts: list[str]) -> Task:
    kept = set(random.Random(name).sample(range(len(texts)), KEPT_BACK))
    parts = [tuple(text for index, text in enumerate(texts) if (index in kept) is back) for back in (False, True)]
    return Task(name, *parts)


def shuffled(name: str, count: int = KEPT_BACK) -> list[str]:
    """Descriptions of other seen tasks, drawn for this one."""
    draw, others = random.Random(f"{name} shuffled"), [other for other in seen() if other != name]
    return [draw.choice(tasks()[other].seen) for other in draw.sample(others, count)]


def random_words(name: str, count: int = KEPT_BACK) -> list[str]:
    """As many words as a description has, from all descriptions, in no order: no sentence and no task."""
    draw = random.Random(f"{name} words")
    words = sorted({word.strip(".,:?") for task in tasks().values() for text in task.seen for word in text.split()})
    return [" ".join(draw.sample(words, 8)) for _ in range(count)]


def part_of(text: str) -> str:
    """Where an input belongs: a tenth of them to test, a twentieth to val."""
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    return "test" if share < 10 else "val" if share < 15 else "train"


def rows_of(name: str, fits: Callable[[str], bool] | None = None) -> dict[str, list[Row]]:
    """The rows of a task by part; no prompt twice.

    Args:
        name: of the task.
        fits: tells of a row's text whether it is short enough; None: all are.
    """
    draw, found, known = random.Random(f"{name} rows"), {part: [] for part in ROWS}, set()
    pairs = list(RECIPES[name]())
    draw.shuffle(pairs)
    for prompt, answer in pairs:
        part = part_of(prompt)
        if len(found[part]) < ROWS[part] and prompt not in known and (fits is None or fits(prompt + answer)):
            known.add(prompt)
            found[part].append({"prompt": f"{prompt}\n", "completion": f"{answer}\n"})
    return found


def write(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def described(rows: list[Row], texts: Sequence[str], seed: int) -> list[Row]:
    """The rows with a description before each prompt, drawn by the seed."""
    draw = random.Random(seed)
    return [{**row, "prompt": f"{draw.choice(texts)}\n{row['prompt']}"} for row in rows]


def make(folder: Path) -> None:
    """Write what is missing."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def fits(text: str) -> bool:
        return len(tokenizer(text)["input_ids"]) <= LONGEST - 4

    for name, task in tasks().items():
        place = folder / name
        if (place / "descriptions.txt").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        for part, rows in rows_of(name, fits).items():
            write(place / f"{part}.jsonl", rows)
            if part == "test":
                for half in range(KEPT_BACK):
                    write(place / f"test-{half}.jsonl", rows[half::KEPT_BACK])
        (place / "descriptions.txt").write_text("\n".join(task.seen) + "\n", encoding="utf-8")
