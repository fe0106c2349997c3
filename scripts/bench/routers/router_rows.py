"""The rows of the routers' study: eight tasks, two pairs of neighbours, and requests that no adapter is about.

A task is a folder with train.jsonl, val.jsonl and test.jsonl of prompt and completion. Adapters train on `train`; `val` is
what a library calibrates with, and served the choice of learning rates; `test` served the tables alone. Where a set comes
with a test part, that is the one; elsewhere a tenth of the prompts is. Rows with the same prompt are in the same part.

A router sees the prompt alone. No prompt names its task, and all end alike, with a line break: neither a word such as
"Question:" nor its absence gives a task away. Texts have their first part as prompt. Prompts and completions are cut at a
word, so that a step is cheap.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
ROWS = {"train": 800, "val": 100, "test": 100}
STRANGERS_ROWS = 40
PROMPT, COMPLETION = 240, 240  # characters at most
PASSAGE = 120  # characters of a text that are its prompt, and as many go on

Row = dict[str, Any]
Rows = Iterator[tuple[str | None, str, Row]]  # a part (None: the group decides), a group that stays together, and a row

TASKS = ("e2e", "svamp", "gsm8k", "dolly", "chat", "shakespeare", "wikitext", "questions")
PAIRS = {"areas": ("e2e_centre", "e2e_riverside"), "kinds": ("dolly_facts", "dolly_ideas")}
STRANGERS = ("stories", "law", "finance", "strategy")


def _lines(path: str) -> Iterator[Row]:
    with (SHARED / "data" / path).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _cut(text: str, most: int) -> str:
    """At most so many characters, to the end of a word."""
    text = text.strip()
    if len(text) <= most:
        return text
    space = text.rfind(" ", 0, most + 1)
    return text[:space].rstrip() if space > 0 else text[:most]


def _row(prompt: str, completion: str) -> Row:
    return {"prompt": _cut(prompt, PROMPT) + "\n", "completion": _cut(completion, COMPLETION)}


def _e2e() -> Rows:
    for part, name in ((None, "valid_clean"), ("test", "test_clean")):
        for row in _lines(f"e2e_nlg/{name}.jsonl"):
            yield part, row["prompt"], _row(row["prompt"], row["completion"])


def _svamp() -> Rows:
    for part, name in ((None, "train_mawps_asdiv"), ("test", "test_svamp")):
        for row in _lines(f"svamp_asdiv_mawps/{name}.jsonl"):
            yield part, row["Question"], _row(row["Question"], f"{row['Equation']} with {row['Numbers']}")


def _gsm8k() -> Rows:
    for part, name in ((None, "train"), ("test", "test")):
        for row in _lines(f"gsm8k/{name}.jsonl"):
            if len(row["question"]) <= PROMPT and len(row["answer"]) <= COMPLETION:  # cut, they would make no sense
                yield part, row["question"], _row(row["question"], row["answer"])


def _dolly() -> Iterator[tuple[str, Row]]:
    """Category and row."""
    for row in _lines("dolly_3k/train.jsonl"):
        prompt = " ".join(filter(None, (row["instruction"], row["input"])))
        if len(prompt) <= PROMPT and row["output"].strip():
            yield row["category"], _row(prompt, row["output"])


def _chat() -> Rows:
    for name in ("train", "valid"):
        for row in _lines(f"chat_mlx_wwdc/{name}.jsonl"):
            yield None, row["prompt"], _row(row["prompt"], row["completion"])


def _passages(*files: tuple[str | None, str]) -> Rows:
    """Two parts of like length, at ends of words. Marks that only WikiText has are taken out."""
    for part, name in files:
        text = (SHARED / "data" / name).read_text(encoding="utf-8")
        text = re.sub(r"\s+", " ", re.sub(r"<unk>| @(?=[-,.]@)|(?<=@[-,.])@ |=", "", text)).strip()
        while len(text) > 2 * PASSAGE:
            prompt = _cut(text, PASSAGE)
            text = text[len(prompt) :].lstrip()
            completion = _cut(text, PASSAGE)
            text = text[len(completion) :].lstrip()
            yield part, prompt, _row(prompt, completion)


def _questions() -> Rows:
    """Short answers to questions about passages that are not shown; those of a passage stay together."""
    for row in _lines("xquad_en/queries.jsonl"):
        yield None, row["passage_id"], _row(row["question"], row["answers"][0])


def _plain(rows: Callable[[], Iterator[tuple[str, Row]]], kinds: tuple[str, ...] = ()) -> Callable[[], Rows]:
    return lambda: ((None, row["prompt"], row) for kind, row in rows() if not kinds or kind in kinds)


def _area(words: str) -> Callable[[], Rows]:
    return lambda: (one for one in _e2e() if f"area[{words}]" in one[2]["prompt"])


def _strategy() -> Iterator[tuple[str, Row]]:
    for row in _lines("strategyqa/train.jsonl"):
        yield "", _row(row["question"], "Yes" if row["answer"] else "No")


def _finance() -> Iterator[tuple[str, Row]]:
    for row in _lines("financial_phrasebank/train.jsonl"):
        yield "", _row(row["text"], row["label"])


def _law() -> Iterator[tuple[str, Row]]:
    for row in _lines("legal_complaints/train.jsonl"):
        text = " ".join(row["prompt"].split())
        prompt = _cut(text, PASSAGE)
        yield "", _row(prompt, text[len(prompt) : 2 * PASSAGE])


SOURCES: dict[str, Callable[[], Rows]] = {
    "e2e": _e2e,
    "svamp": _svamp,
    "gsm8k": _gsm8k,
    "dolly": _plain(_dolly),
    "chat": _chat,
    "shakespeare": lambda: _passages((None, "tinyshakespeare/train.txt"), ("test", "tinyshakespeare/test.txt")),
    "wikitext": lambda: _passages((None, "wikitext2/valid.txt"), ("test", "wikitext2/test.txt")),
    "questions": _questions,
    "e2e_centre": _area("city centre"),
    "e2e_riverside": _area("riverside"),
    "dolly_facts": _plain(_dolly, ("open_qa",)),
    "dolly_ideas": _plain(_dolly, ("general_qa", "brainstorming")),
    "stories": lambda: _passages(("test", "tinystories_sample/tinystories.txt")),
    "law": _plain(_law),
    "finance": _plain(_finance),
    "strategy": _plain(_strategy),
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
    """Rows of each part, each prompt once there but in `train`, in an order that the prompts decide."""
    found: dict[str, list[Row]] = {part: [] for part in ROWS}
    rows = [(_digest(row["prompt"]), _digest(group), part, row) for part, group, row in source if row["completion"]]
    tested = {digest for digest, _, part, _ in rows if part == "test"}
    seen: set[tuple[str, int]] = set()
    for digest, group, given, row in sorted(rows, key=lambda item: (item[0], json.dumps(item[3]))):
        part = given or _part(group, bool(tested))
        again = part != "train" and (part, digest) in seen
        if (part == "test" or digest not in tested) and not again and len(found[part]) < ROWS[part]:
            found[part].append(row)
            seen.add((part, digest))
    return found


def read(name: str, part: str, work: Path, most: int | None = None) -> list[Row]:
    """Rows of a part."""
    path = prepare(name, work) / f"{part}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:most]


def _digest(text: str) -> int:
    """A number from a text: equal texts stay together, and the order is mixed."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def _part(digest: int, has_test: bool) -> str:
    tenth = digest * 7919 % 10
    return "val" if tenth == 0 else "test" if tenth == 1 and not has_test else "train"
