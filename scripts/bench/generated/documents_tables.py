"""generated.md, from the lines of documents.jsonl and from reading.md.

A share is of all questions of the documents together, a loss the nats of all answers over their tokens. What is given
behind ± is the standard error over documents (over all of their seeds), of the difference to the base on the same document.
`of the way`: the mean difference, where that of the document in the prompt is 100 %, on the same documents.
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
HEADER = [
    "",
    "documents x seeds",
    "contains",
    "exact",
    "F1",
    "made up",
    "loss",
    "difference to base",
    "of the way",
    "wikitext",
]


def write(folder: Path) -> None:
    """The page beside the lines."""
    (folder / PAGE).write_text(made(folder), encoding="utf-8")


def made(folder: Path) -> str:
    """The page, from the lines and from what was written about them in reading.md."""
    reading = folder / "reading.md"
    text = reading.read_text(encoding="utf-8") if reading.exists() else ""
    return page(lines_of(folder / "documents.jsonl"), text, lines_of(folder / "documents_settings.jsonl"))


def lines_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def page(lines: Sequence[Record], reading: str = "", settings: Sequence[Record] = ()) -> str:
    """All tables; `reading` is what a person has written about them."""
    parts = [
        "# Adapters from documents\n",
        f"Made by `scripts/bench/generated/generated.py table` from documents.jsonl: {len(lines)} lines, "
        "SmolLM2-135M-Instruct in bf16 on one thread of a shared CPU. What is measured and how: documents.py, "
        "documents_sets.py. `contains`: a right answer is in the greedy answer of 24 tokens, word by word; "
        "`exact`: it is nothing else; `F1`: over words, as SQuAD's; `made up`: the answer has a number that text and question do not have; `loss`: nats per token of the right answer; "
        "`of the way`: from the base's loss to that with the document in the prompt; "
        "`wikitext`: nats per token of general text. Questions of the sets are for measuring alone.\n",
        reading,
    ]
    for set_ in (name for name in SETS if any(line["set"] == name for line in lines)):
        own = [line for line in lines if line["set"] == set_]
        many = len({line["document"] for line in own})
        parts += [f"## {set_}: {SETS[set_]} ({many} documents)\n", alone(own)]
        if any(" " in line["method"] for line in own):
            parts += [f"### Several documents of {set_} in one adapter\n", several(own)]
    if settings:
        parts += ["## Ways that were tried, on passages of xquad that are in no other table\n", tried(settings)]
    return "\n".join(part for part in parts if part)


def alone(lines: Sequence[Record]) -> str:
    """One line a method."""
    rows = []
    for method, title in ALONE.items():
        found = [line for line in lines if line["method"] == method]
        if found:
            rows.append([title, *quality(found, lines), *cost(found)])
    return table([*HEADER, "CPU seconds", "kB", "rows", "steps"], rows)


def several(lines: Sequence[Record]) -> str:
    """The same of adapters that hold several documents, beside each document's own on the same documents."""
    rows = []
    for method in sorted({line["method"] for line in lines if " " in line["method"]}):
        found = [line for line in lines if line["method"] == method]
        way, many = method.rsplit(" ", 1)
        rows.append([f"{way}, {many} documents", *quality(found, lines), *cost(found)[:2]])
    for method in ("distilled", "base"):
        if found := [line for line in lines if line["method"] == method]:
            rows.append([f"each by itself: {ALONE[method]}", *quality(found, lines), *cost(found)[:2]])
    return table([*HEADER, "CPU seconds", "kB"], rows)


def tried(lines: Sequence[Record]) -> str:
    """One line a way of documents_settings.py."""
    lines = [{**line, "method": line["way"]} for line in lines]
    rows = []
    for way in dict.fromkeys(line["way"] for line in lines):
        found = [line for line in lines if line["way"] == way]
        seconds, kb, _, steps = cost(found)
        rows.append([ALONE.get(way, way), *quality(found, lines), seconds, kb, steps])
    return table([*HEADER, "CPU seconds of training", "kB", "steps"], rows)


def losses_of(lines: Iterable[Record], method: str) -> dict[str, float]:
    """A method's loss by document, nats per token."""
    return {line["document"]: line["loss"] / line["tokens"] for line in lines if line["method"] == method}


def quality(found: Sequence[Record], lines: Sequence[Record]) -> list[str]:
    """Cells of what was measured of one method; `lines` are those of all methods."""
    differences = differences_to_base(found, lines)
    questions, tokens = total(found, "questions"), total(found, "tokens")
    seeds, many = len({line["seed"] for line in found}), len({line["document"] for line in found})
    shares = [f"{100 * total(found, key) / questions:.0f} %" for key in ("contains", "exact", "f1")]
    made_up = [line for line in found if "made_up" in line]
    shares.append(f"{100 * total(made_up, 'made_up') / total(made_up, 'questions'):.0f} %" if made_up else "")
    generals = [line["general"] for line in found if "general" in line]
    return [
        f"{many} x {seeds}",
        *shares,
        f"{total(found, 'loss') / tokens:.3f}",
        said(list(differences.values())),
        of_the_way(differences, lines) if found[0]["method"] not in (BASE, "other") else "",
        f"{mean(generals):.3f}" if generals else "",
    ]


def differences_to_base(found: Sequence[Record], lines: Sequence[Record]) -> dict[str, float]:
    """Of the losses to the base's by document, mean over seeds; of the base itself nothing."""
    base, by_document = losses_of(lines, BASE), dict[str, list[float]]()
    for line in found:
        if line["document"] in base and line["method"] != BASE:
            by_document.setdefault(line["document"], []).append(line["loss"] / line["tokens"] - base[line["document"]])
    return {document: mean(each) for document, each in by_document.items()}


def of_the_way(differences: Mapping[str, float], lines: Sequence[Record]) -> str:
    """The mean difference, as a share of that which the document in the prompt makes."""
    base, prompt = losses_of(lines, BASE), losses_of(lines, "prompt")
    both = [document for document in differences if document in prompt]
    whole = sum(prompt[document] - base[document] for document in both)
    return f"{100 * sum(differences[document] for document in both) / whole:.0f} %" if whole else ""


def said(values: Sequence[float]) -> str:
    """A mean, and its standard error where there are several values."""
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
