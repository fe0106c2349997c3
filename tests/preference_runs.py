"""Rows of preferences, and recipes of runs that learn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import make_recipe

from dynlora_cli.config.recipe import Recipe


def rows(folder: Path, kind: str = "dpo", count: int = 40) -> Path:
    """Answers of different lengths; the chosen ones have a word of their own."""
    path = folder / f"{kind}.jsonl"
    made = []
    for number in range(count):
        prompt = f"count to {number}: "
        good, bad = "one " + "two " * (number % 3), "no " * (1 + number % 4)
        if kind == "kto":
            made += [{"prompt": prompt, "completion": (good, bad)[number % 2], "label": number % 2 == 0}]
        else:
            made += [{"prompt": prompt, "chosen": good, "rejected": bad}]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def preference_recipe(folder: Path, *overrides: str, objective: str = "dpo", out: str = "out") -> Recipe:
    """As `make_recipe`, on rows of the kind that the objective learns from."""
    kind = "kto" if objective == "kto" else "dpo"
    where = f"dataset.train=[{{path: {rows(folder, kind)}, format: {'kto' if kind == 'kto' else 'preference'}}}]"
    return make_recipe(folder, where, f"train.objective={objective}", "eval.samples=0", *overrides, out=out)


def looks(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations among the events of a run."""
    return [event for event in events if event["event"] == "eval"]
