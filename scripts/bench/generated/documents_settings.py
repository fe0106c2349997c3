"""Which settings of context distillation teach a passage best: on passages of xquad that are kept out of every table.

    python scripts/bench/generated/generated.py settings                              # all ways, three passages
    python scripts/bench/generated/generated.py settings --ways "as shipped;48 questions"

The model writes questions about a passage once; every way trains on these rows, or on the first half of them. A line of
documents_settings.jsonl is one passage under one way: sums over its questions, as in documents.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from documents_runs import ASKED, MODEL_DTYPE, Adapters, Record
from documents_sets import Document, documents

RESULTS = Path(__file__).with_suffix(".jsonl")
QUESTIONS = 48


class Way(NamedTuple):
    """How a passage is learned: what differs from the tool's own way."""

    half: bool = True  # of the questions
    steps: int = 42
    rate: float = 1e-3
    budget: float = 2
    objective: str = "context-distillation"
    adapter: Record | None = None


WAYS = {
    "as shipped": Way(),
    "48 questions": Way(half=False),
    "84 steps": Way(steps=84),
    "48 questions, 84 steps": Way(half=False, steps=84),
    "rate 2e-3": Way(rate=2e-3),
    "rate 5e-4": Way(rate=5e-4),
    "rank 8": Way(budget=8),
    "answers alone": Way(objective="sft"),
    "answers alone, rate 3e-4": Way(objective="sft", rate=3e-4),
    "MLP alone": Way(adapter={"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
}


def run(work: Path, ways: list[str], passages: int, seed: int = 0) -> None:
    """Every way on every passage; what is there is not run again."""
    from documents_judge import Judge

    judge, adapters = Judge(), Adapters(work)
    for document in documents("xquad", passages, tried=True):
        for way in ("base", "prompt", *ways):
            lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
            done = [tuple(json.loads(line)[key] for key in ("document", "way", "seed")) for line in lines]
            if (document.name, way, seed) in done:
                continue
            folder, cost = (None, {}) if way in ("base", "prompt") else trained(adapters, document, WAYS[way], seed)
            with judge.adapter(folder):
                found = judge.measure(document.questions, document.text if way == "prompt" else "")
                if way != "prompt":
                    found["general"] = judge.general()
            line = {"document": document.name, "way": way, "seed": seed, **found, **cost}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{document.name:5} {way:26} loss {found['loss'] / found['tokens']:.3f}", flush=True)


def trained(adapters: Adapters, document: Document, way: Way, seed: int) -> tuple[Path, dict[str, Any]]:
    """The adapter of one way, and what it cost."""
    rows = questions(adapters, document, seed)
    if way.half:
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = rows.with_name(f"{rows.stem}-half.jsonl")
        rows.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    source = {"path": str(rows), "format": "grounded"}
    train = {"objective": way.objective, "micro_batch_size": 8, "learning_rate": way.rate}
    name = f"way-{document.name}-{list(WAYS.values()).index(way)}-{seed}"
    more = {"rank": {"budget": way.budget}, "adapter": way.adapter or {}}
    return adapters.trained(name, [source], seed, way.steps, train=train, **more)


def questions(adapters: Adapters, document: Document, seed: int) -> Path:
    """The rows that `dynlora adapt` trains on; an eighth of its questions is held out."""
    options = ["--questions", str(QUESTIONS), *ASKED[2:], "--set", f"model.dtype={MODEL_DTYPE}"]
    options += ["--set", "train.max_steps=1"]
    return adapters.adapted(f"asked-{document.name}-{seed}", document, options, seed)[0] / "rows.jsonl"
