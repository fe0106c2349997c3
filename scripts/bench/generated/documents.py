"""What a document is worth as an adapter: `dynlora adapt --document`, against the base, the prompt, and plain fine-tuning.

Every line of documents.jsonl is one document (or several) under one method with one seed:

    base        the base alone
    prompt      the base with the document in its prompt: what distillation can reach
    distilled   with the document's adapter, which `dynlora adapt` made with nothing set but its size
    other       with the adapter of the next document: must be where the base is
    text        with an adapter that was fine-tuned on the text, as many steps, the same size
    added       with the exact sum of all documents' adapters, each whole or at a weight;  joint: with one adapter trained on all their rows
    chunks      with one adapter whose chunks were trained one by one and added

The questions of the sets are asked at the end and seen nowhere before. Numbers are sums over a document's questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from documents_sets import Document, documents

RESULTS = Path(__file__).with_suffix(".jsonl")
WEIGHTS = (0.3, 0.1)  # of each document's adapter in a sum; 1 as well
KEY = ("set", "document", "method", "seed")
Record = dict[str, Any]


class Bench:
    """Lines that are there already, and a judge that is loaded when the first is missing."""

    def __init__(self, work: Path, settings: Sequence[str] = (), results: Path = RESULTS) -> None:
        from documents_runs import Adapters

        self.results, self.adapters = results, Adapters(work, settings=settings)
        self.lines = {tuple(line[key] for key in KEY): line for line in read(results)}
        self._judge: Any = None

    @property
    def judge(self) -> Any:
        if self._judge is None:
            from documents_judge import Judge

            self._judge = Judge()
        return self._judge

    def has(self, document: Document, method: str, seed: int) -> bool:
        return (document.set, document.name, method, seed) in self.lines

    def line(
        self, document: Document, method: str, seed: int, adapter: Path | None = None, cost: Record | None = None
    ) -> None:
        """Measure and append; `general` is measured where an adapter was made, and of the base once."""
        if self.has(document, method, seed):
            return
        with self.judge.adapter(adapter):
            found = self.judge.measure(document.questions, document.text, in_prompt=method == "prompt")
            if cost is not None or method == "base":
                found["general"] = self.judge.general()
        line = {"set": document.set, "document": document.name, "method": method, "seed": seed, **found}
        line |= {"characters": len(document.text), **(cost or {})}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines[tuple(line[key] for key in KEY)] = line
        loss = found["loss"] / found["tokens"]
        shown = f"{found['contains']:.0f} of {found['questions']:.0f}"
        print(f"{document.set:9} {document.name:9} {method:10} seed {seed}  {shown}  loss {loss:.3f}", flush=True)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def without_adapters(bench: Bench, set_: str, many: int) -> None:
    """The base, and the base with the document in its prompt."""
    for document in documents(set_, many):
        bench.line(document, "base", 0)
        bench.line(document, "prompt", 0)


def one_by_one(bench: Bench, set_: str, many: int, seed: int) -> None:
    """Each document by itself; the control is the adapter of the document after it."""
    found = documents(set_, many)
    for number, document in enumerate(found):
        folder, cost = bench.adapters.distilled(document, seed)
        bench.line(document, "distilled", seed, folder, cost)
        if number:
            bench.line(found[number - 1], "other", seed, folder)
    if len(found) > 1:
        bench.line(found[-1], "other", seed, bench.adapters.distilled(found[0], seed)[0])


def on_the_text(bench: Bench, set_: str, many: int, seed: int) -> None:
    """Plain fine-tuning on each document's text, for as many steps as its distillation took."""
    for document in documents(set_, many):
        steps = bench.adapters.distilled(document, seed)[1]["steps"]
        bench.line(document, "text", seed, *bench.adapters.text(document, seed, steps))


def together(bench: Bench, set_: str, many: int, seed: int, *, joint: bool) -> None:
    """All documents in one adapter: the sum of theirs, or one that was trained on all rows."""
    found = documents(set_, many)
    made = [bench.adapters.distilled(document, seed) for document in found]
    folders, steps = [folder for folder, _ in made], sum(cost["steps"] for _, cost in made)
    ways = [("added", bench.adapters.added(folders, seed))]
    ways += [(f"added at {weight}", bench.adapters.added(folders, seed, weight)) for weight in WEIGHTS]
    if joint:
        ways.append(("joint", bench.adapters.joint(folders, seed, steps)))
    for method, (folder, cost) in ways:
        for document in found:
            bench.line(document, f"{method} {many}", seed, folder, cost)


def by_chunks(bench: Bench, set_: str, many: int, seed: int) -> None:
    """Long documents whose chunks were trained one by one."""
    for document in documents(set_, many):
        folder, cost = bench.adapters.distilled(document, seed, add_chunks=True)
        bench.line(document, "chunks", seed, folder, cost)
