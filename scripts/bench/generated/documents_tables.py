"""generated.md, from the lines of documents.jsonl and from reading.md.

A share is of all questions of the documents together, a loss the nats of all answers over their tokens. What is given
behind ± is the standard error over documents (over all of their seeds), of the difference to the base on the same document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quality_tables import table

Record = dict[str, Any]
BASE = "base"
ALONE = {
    "base": "base",
    "prompt": "document in the prompt",
    "distilled": "**distilled** (`dynlora adapt`)",
    "other": "another document's adapter",
    "text": "fine-tuned on the text",
    "chunks": "distilled, chunks added",
}
SETS = {
    "xquad": "passages of Wikipedia",
    "covidqa": "beginnings of articles, several chunks",
    "pubmedqa": "abstracts; the answer is the conclusion, which is not in them",
}
PAGE = "generated.md"


def write(folder: Path) -> None:
    """The page beside the lines."""
    (folder / PAGE).write_text(made(folder), encoding="utf-8")


def made(folder: Path) -> str:
    """The page, from the lines and from what was written about them in reading.md."""
    path, reading = folder / "documents.jsonl", folder / "reading.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    said = reading.read_text(encoding="utf-8") if reading.exists() else ""
    return page([json.loads(line) for line in text.splitlines()], said)


def page(lines: Sequence[Record], reading: str = "") -> str:
    """All tables; `reading` is what a person has written about them."""
    parts = [
        "# Adapters from documents\n",
        f"Made by `scripts/bench/generated/generated.py table` from documents.jsonl: {len(lines)} lines, "
        "SmolLM2-135M-Instruct in bf16 on one thread of a shared CPU. What is measured and how: documents.py, "
        "documents_sets.py. `contains`: a right answer is in the greedy answer of 24 tokens, word by word; "
        "`exact`: it is nothing else; `F1`: over words, as SQuAD's; `loss`: nats per token of the right answer; "
        "`wikitext`: nats per token of general text. Questions of the sets are for measuring alone.\n",
        reading,
    ]
    for set_ in (name for name in SETS if any(line["set"] == name for line in lines)):
        own = [line for line in lines if line["set"] == set_]
        many = len({line["document"] for line in own})
        parts += [f"## {set_}: {SETS[set_]} ({many} documents)\n", alone(own)]
        if any(" " in line["method"] for line in own):
            parts += [f"### Several documents of {set_} in one adapter\n", several(own)]
    return "\n".join(part for part in parts if part)


def alone(lines: Sequence[Record]) -> str:
    """One line a method."""
    rows = []
    for method, title in ALONE.items():
        found = [line for line in lines if line["method"] == method]
        if found:
            rows.append([title, *quality(found, base_of(lines)), *cost(found)])
    header = ["", "documents x seeds", "contains", "exact", "F1", "loss", "difference to base", "wikitext"]
    return table([*header, "CPU seconds", "kB", "rows", "steps"], rows)


def several(lines: Sequence[Record]) -> str:
    """The same of adapters that hold several documents, beside each document's own on the same documents."""
    rows = []
    for method in sorted({line["method"] for line in lines if " " in line["method"]}):
        found = [line for line in lines if line["method"] == method]
        way, many = method.rsplit(" ", 1)
        rows.append([f"{way}, {many} documents", *quality(found, base_of(lines)), *cost(found)[:2]])
    for method in ("distilled", "base"):
        if found := [line for line in lines if line["method"] == method]:
            rows.append([f"each by itself: {ALONE[method]}", *quality(found, base_of(lines)), *cost(found)[:2]])
    header = ["", "documents x seeds", "contains", "exact", "F1", "loss", "difference to base", "wikitext"]
    return table([*header, "CPU seconds", "kB"], rows)


def base_of(lines: Iterable[Record]) -> dict[str, float]:
    """The base's loss by document."""
    return {line["document"]: line["loss"] / line["tokens"] for line in lines if line["method"] == BASE}


def quality(found: Sequence[Record], base: Mapping[str, float]) -> list[str]:
    """Cells of what was measured."""
    questions, tokens = total(found, "questions"), total(found, "tokens")
    seeds, many = len({line["seed"] for line in found}), len({line["document"] for line in found})
    shares = [f"{100 * total(found, key) / questions:.0f} %" for key in ("contains", "exact", "f1")]
    generals = [line["general"] for line in found if "general" in line]
    return [
        f"{many} x {seeds}",
        *shares,
        f"{total(found, 'loss') / tokens:.3f}",
        difference(found, base),
        f"{mean(generals):.3f}" if generals else "",
    ]


def difference(found: Sequence[Record], base: Mapping[str, float]) -> str:
    """Of the loss to the base's, mean over documents, and its standard error; of the base itself nothing."""
    if found[0]["method"] == BASE:
        return ""
    by_document: dict[str, list[float]] = {}
    for line in found:
        if line["document"] in base:
            loss = line["loss"] / line["tokens"]
            by_document.setdefault(line["document"], []).append(loss - base[line["document"]])
    values = [mean(each) for each in by_document.values()]
    if len(values) < 2:
        return f"{values[0]:+.3f}" if values else ""
    return f"{mean(values):+.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def cost(found: Sequence[Record]) -> list[str]:
    """Cells of what an adapter takes: CPU seconds, kB, rows, steps."""

    def average(key: str, scale: float = 1.0) -> str:
        values = [line[key] * scale for line in found if key in line]
        return f"{mean(values):.0f}" if values else ""

    return [average("cpu"), average("bytes", 1e-3), average("rows"), average("steps")]


def total(found: Iterable[Record], key: str) -> float:
    return float(sum(line[key] for line in found))
