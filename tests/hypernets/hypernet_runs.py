"""Runs that train a hypernetwork, small enough for tests.

hypernet_recipe   three tasks of one repeated word, two descriptions each
document_recipe   adapters from the contexts of rows
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import grounded_rows, model_folder

from dynlora_cli.config.load import check_recipe
from dynlora_cli.config.recipe import Recipe

WORDS = ("ones", "twos", "threes")
STEPS = 12


def texts_of(word: str) -> list[str]:
    return [f"Answer with {word}.", f"Write {word} again and again, whatever is asked."]


def write_task(folder: Path, word: str) -> Path:
    """Rows whose prompts are those of the other tasks, too: the description alone says what to answer."""
    path = folder / f"{word}.jsonl"
    rows = [{"prompt": f"say {i}: ", "completion": f"{word} " * (1 + i % 4)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hypernet_recipe(
    folder: Path, *overrides: str, variant: str = "text-gated", out: str = "out", **keys: Any
) -> Recipe:
    """A recipe of 12 steps of 6 rows.

    Args:
        folder: for the model, the rows and the run folder.
        overrides: as of `--set`.
        variant: that writes adapters.
        out: the run folder's name.
        keys: sections in place of those here.
    """
    tasks = [{"descriptions": texts_of(word), "dataset": str(write_task(folder, word))} for word in WORDS]
    recipe: dict[str, Any] = {
        "model": str(model_folder(folder)),
        "tasks": tasks,
        "dataset": {"val_size": 0.2, "max_length": 96},
        "adapter": {"variant": variant, "latent_size": 16, "hidden_size": 24},
        "rank": {"init": 4, "budget": 2},
        "train": {"max_steps": STEPS, "micro_batch_size": 6, "learning_rate": 1e-2, "log_steps": 1},
        "eval": {"steps": 4},
        "output_dir": str(folder / out),
    }
    return check_recipe({**recipe, **keys}, overrides)


def document_recipe(folder: Path, *overrides: str, out: str = "out") -> Recipe:
    """12 steps of 6 rows; contexts are of two or three chunks, of which each gets 4 components in a layer."""
    values: dict[str, Any] = {
        "model": str(model_folder(folder)),
        "dataset": {"train": [str(grounded_rows(folder))], "val_size": 0.25, "max_length": 96},
        "adapter": {
            "variant": "doc-to-lora",
            "target_modules": ["down_proj"],
            "chunk": 6,
            "latent_size": 16,
            "latents": 3,
            "head_size": 8,
        },
        "rank": {"init": 4, "budget": 2},
        "train": {
            "objective": "context-distillation",
            "answer_share": 0.5,
            "max_steps": 12,
            "micro_batch_size": 6,
            "learning_rate": 3e-3,
            "log_steps": 1,
        },
        "eval": {"steps": 4},
        "output_dir": str(folder / out),
    }
    return check_recipe(values, overrides)
