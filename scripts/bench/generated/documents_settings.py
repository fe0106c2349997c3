"""Which settings of context distillation teach a passage best: on passages of xquad that are kept out of every table.

    python scripts/bench/generated/generated.py settings                              # all ways, two passages
    python scripts/bench/generated/generated.py settings --ways "as shipped;84 steps"

The model writes questions about a passage once; every way trains on these rows, or on the first half of them. A line of
documents_settings.jsonl is one passage under one way: sums over its questions, as in documents.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from documents_runs import ASKED, MODEL_DTYPE, Adapters, Record
from documents_sets import Document, documents

from dynlora_cli.documents.requests import invented

RESULTS = Path(__file__).with_suffix(".jsonl")
QUESTIONS = 48


class Way(NamedTuple):
    """How a passage is learned: what is set, and 21 questions or twice as many."""

    half: bool = True  # of the questions
    checked: bool = False  # without answers that have a number which the passage does not have
    steps: int = 42
    rate: float = 2e-3
    budget: float = 2
    objective: str = "context-distillation"
    adapter: Record | None = None


WAYS = {
    "as shipped": Way(),
    "rate 1e-3": Way(rate=1e-3),
    "rate 4e-3": Way(rate=4e-3),
    "rate 1e-3, 48 questions": Way(half=False, rate=1e-3),
    "48 questions": Way(half=False),
    "checked": Way(checked=True),
    "84 steps": Way(steps=84),
    "rank 8": Way(budget=8),
    "answers alone": Way(objective="sft"),
    "answers alone, rate 5e-4": Way(objective="sft", rate=5e-4),
    "MLP alone": Way(adapter={"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
}


def run(work: Path, ways: list[str], passages: list[int], seed: int = 0) -> None:
    """Every way on the passages of these numbers; what is there is not run again."""
    from documents_judge import Judge

    judge, adapters = Judge(), Adapters(work)
    found = documents("xquad", max(passages) + 1, tried=True)
    for document in (found[number] for number in passages):
        for way in ("base", "prompt", *ways):
            lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
            done = [tuple(json.loads(line)[key] for key in ("document", "way", "seed")) for line in lines]
            if (document.name, way, seed) in done:
                continue
            folder, cost = (None, {}) if way in ("base", "prompt") else trained(adapters, document, way, seed)
            with judge.adapter(folder):
                measured = judge.measure(document.questions, document.text, in_prompt=way == "prompt")
                if way != "prompt":
                    measured["general"] = judge.general()
            line = {"document": document.name, "way": way, "seed": seed, **measured, **cost}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{document.name:5} {way:26} loss {measured['loss'] / measured['tokens']:.3f}", flush=True)


def trained(adapters: Adapters, document: Document, name: str, seed: int) -> tuple[Path, dict[str, Any]]:
    """The adapter of one way, and what it cost."""
    rows, way = questions(adapters, document, seed), WAYS[name]
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    if way.half:
        lines = lines[: len(lines) // 2]
    if way.checked:
        found = map(json.loads, lines)
        lines = [
            json.dumps(row) + "\n" for row in found if not invented(row["completion"], row["context"], row["prompt"])
        ]
    rows = rows.with_name(f"rows-{'half' if way.half else 'all'}{'-checked' if way.checked else ''}.jsonl")
    rows.write_text("".join(lines), encoding="utf-8")
    source = {"path": str(rows), "format": "completion" if way.objective == "sft" else "grounded"}
    train = {"objective": way.objective, "micro_batch_size": 8, "learning_rate": way.rate}
    folder = f"way-{document.name}-{'-'.join(name.replace(',', '').split())}-{seed}"
    more = {"rank": {"budget": way.budget}, "adapter": way.adapter or {}}
    return adapters.trained(folder, [source], seed, way.steps, train=train, **more)


def questions(adapters: Adapters, document: Document, seed: int) -> Path:
    """The rows that `dynlora adapt` trains on; an eighth of its questions is held out."""
    options = ["--questions", str(QUESTIONS), *ASKED[2:], "--set", f"model.dtype={MODEL_DTYPE}"]
    options += ["--set", "train.max_steps=1"]
    return adapters.adapted(f"asked-{document.name}-{seed}", document, options, seed)[0] / "rows.jsonl"
