"""Tiny runs of models of vectors: rows of queries and passages, and recipes on a Bert or Llama of 2 layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import WORDS, model_folder

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe


def pairs(count: int = 24, *, negatives: int = 0) -> list[dict[str, Any]]:
    """Queries about passages, two for each passage; wrong passages are of other words."""
    rows = []
    for index in range(count):
        passage = index // 2
        words = [WORDS[(passage * 5 + place) % len(WORDS)] for place in range(2 + passage % 4)]
        wrong = [" ".join(reversed(words)) + f" {number}" for number in range(negatives)]
        row = {"query": f"{words[index % 2]} {passage}?", "passage": f"{passage} {' '.join(words)}"}
        rows.append(row | ({"negatives": wrong} if wrong else {}))
    return rows


def scored(count: int = 24) -> list[dict[str, Any]]:
    """Pairs of texts, with the share of words that they have in common."""
    rows = []
    for index in range(count):
        first = {WORDS[(index + place) % len(WORDS)] for place in range(3)}
        second = {WORDS[(index * 2 + place) % len(WORDS)] for place in range(3)}
        score = len(first & second) / len(first | second)
        rows.append({"sentence1": " ".join(sorted(first)), "sentence2": " ".join(sorted(second)), "score": score})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def vector_recipe(
    folder: Path, *overrides: str, rows: list[dict[str, Any]] | None = None, kind: str = "bert", task: str = "embedding"
) -> Recipe:
    """A recipe of 8 steps on 4 rows each, pruned from 8 to 2 components per layer.

    Args:
        folder: for the model, the rows and the run folder `out`.
        overrides: as of `--set`.
        rows: by default `pairs`.
        kind: of the model: bert or llama.
        task: embedding or reranker.
    """
    recipe = {
        "model": {"name_or_path": str(model_folder(folder, kind)), "task": task},
        "dataset": {
            "train": [{"path": str(written(folder / "rows.jsonl", pairs() if rows is None else rows))}],
            "val_size": 0.25,
            "max_length": 64,
        },
        "rank": {"init": 8, "budget": 2},
        "pruning": {"start": 0.2, "end": 0.7, "events": 2},
        "train": {"max_steps": 8, "micro_batch_size": 4, "learning_rate": 5e-3, "log_steps": 1},
        "output_dir": str(folder / "out"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return load_recipe(path, overrides)
