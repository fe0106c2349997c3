"""How many tokens of a batch are padding? In random order, in dynlora's batches, and packed.

    python scripts/bench/speed/padding.py          # writes padding.md; takes half a minute and trains nothing

Tokens that are computed, padding included, for each real one, over an epoch. dynlora's own batches put rows of similar length
together (data/batches.py). Data and the tokenizer's model are in DYNLORA_SHARED (../shared).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dynlora_cli.config.load import load_recipe
from dynlora_cli.data.batches import Batches
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.quiet import quiet
from dynlora_cli.training.setup import read_data

SHARED = Path(os.environ.get("DYNLORA_SHARED", "../shared")).resolve()
SETS = {"e2e_nlg": "e2e_nlg/valid_clean.jsonl", "dolly_3k": "dolly_3k/train.jsonl"}


def computed(batches: Batches) -> int:
    """Tokens of an epoch, padding included."""
    return sum(batch.labels.numel() for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))


def line(name: str, max_length: int, rows: int) -> str:
    settings = f"{{train: [{{path: {SHARED / 'data' / SETS[name]}}}], max_length: {max_length}}}"
    recipe = load_recipe(
        Path("recipes/quickstart.yaml"), [f"model={SHARED / 'models' / 'stories3M'}", f"dataset={settings}"]
    )
    examples = read_data(recipe, BaseFiles.find(recipe.model)).train
    lengths = [len(example.input_ids) for example in examples]
    random.Random(0).shuffle(lengths)
    parts = [lengths[at : at + rows] for at in range(0, len(lengths), rows)]
    options = {"max_length": max_length, "pad_id": 0}
    numbers = [
        sum(max(part) * len(part) for part in parts),
        computed(Batches(examples, micro_batch_size=rows, **options)),
        computed(Batches(examples, micro_batch_size=max(1, rows // 4), packing=True, **options)),
    ]
    cells = " | ".join(f"{number / sum(lengths):.2f}" for number in numbers)
    return f"| {name} | {max_length} | {rows} | {sum(lengths) / len(lengths):.0f} | {cells} |"


def main() -> None:
    quiet.__enter__()
    head = [
        "set",
        "max_length",
        "rows of a batch",
        "mean length",
        "random order",
        "dynlora",
        "packed, a quarter as many rows",
    ]
    lines = ["# Padding: tokens computed for each real one\n", "Made by `scripts/bench/speed/padding.py`.\n"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [line(name, length, rows) for name in SETS for length in (256, 512) for rows in (4, 16)]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
