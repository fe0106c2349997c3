"""What tests of `dynlora adapt` share: a document, options of a short run, and models that read far enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = """# Velden

The lighthouse of Velden was built in 1871 on a grey rock. It is thirty eight metres high and its lamp turns once.

Ines Tolver was the last keeper and kept the light for many years. The ferry sails twice a day to the port of Kessel.
"""
SHORT = (
    "--questions", 4, "--answer-tokens", 8, "--set", "train.max_steps=3", "--set", "train.learning_rate=1e-2",
    "--set", "eval.samples=0", "--set", "train.micro_batch_size=4",
)  # fmt: skip


def with_long_context(folder: Path) -> Path:
    """The model, for texts of 1,024 tokens: its positions are rotary, so no weight changes."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "dynlora.json").read_text())
