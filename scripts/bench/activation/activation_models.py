"""The models of activation.py: one small adapter for each update, one for all, and what they lose on every request.

Everything is kept in a folder, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from activation_data import SHARED, Row

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import train as train_command
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.sections import Dataset
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.load import load_data
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.merging.method import side_by_side
from dynlora_cli.tasks import task as tasks

MODEL = SHARED / "models" / "stories3M"
RANK, RATE, BATCH, EPOCHS, MOST_STEPS, MAX_LENGTH = 2, 3e-3, 8, 4, 100, 128
LONGEST = 400  # tokens of a row that is measured
JOINT, SUM, MEAN, BASE = "one for all", "merged (sum)", "merged (mean)", "base"


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({k: row[k] for k in ("prompt", "completion")}) + "\n" for row in rows))
    return path


def steps_of(rows: Sequence[Row]) -> int:
    """Four passes, where that is no more than 100 steps: a small topic would be learned by heart."""
    return min(MOST_STEPS, max(1, len(rows) * EPOCHS // BATCH))


def train(folder: Path, rows: Sequence[Row], rank: int, steps: int, seed: int, *, elastic: bool = False) -> Path:
    """A run of dynlora; one that is there already is left as it is."""
    out = folder / "run"
    if (out / "adapter_model.safetensors").is_file():
        return out
    recipe = {
        "model": {"name_or_path": str(MODEL), "dtype": "float32"},
        "dataset": {
            "train": [str(write_rows(folder / "train.jsonl", rows))],
            "val_size": 0.0,
            "max_length": MAX_LENGTH,
        },
        "rank": {"init": 2 * rank, "budget": rank, "elastic": elastic},
        "train": {"max_steps": steps, "micro_batch_size": BATCH, "learning_rate": RATE, "save_steps": 10_000},
        "output_dir": str(out),
        "seed": seed,
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    train_command.run(load_recipe(path), overwrite=True)
    return out


def train_all(work: Path, subjects: dict[str, dict[str, list[Row]]], seed: int) -> dict[str, Path]:
    """An adapter for each update, and one of as many parameters as all of them, trained on all rows for as many steps."""
    runs = {}
    for name, parts in subjects.items():
        runs[name] = train(work / name, parts["train"], RANK, steps_of(parts["train"]), seed)
    rows = [row for parts in subjects.values() for row in parts["train"]]
    steps = sum(steps_of(parts["train"]) for parts in subjects.values())
    runs[JOINT] = train(work / "joint", rows, RANK * len(subjects), steps, seed)
    return runs


class Losses:
    """Per-row losses of the base with an adapter on it."""

    def __init__(self, adapter: Adapter) -> None:
        self.place = find_base(adapter)
        self.tokenizer = read_tokenizer(adapter, self.place)
        self.base = base_in_memory(adapter, self.place, self.tokenizer)

    def examples(self, path: Path, rows: Sequence[Row]) -> list[Any]:
        own = {"train": [{"path": str(write_rows(path, rows))}], "val_size": 0.0, "max_length": LONGEST}
        dataset = Dataset.model_validate(own)
        data = load_data(dataset, self.tokenizer, task=tasks.of(self.place.options), seed=0)
        assert [one.row for one in data.train] == list(range(len(rows))), "a row was dropped"
        return data.train

    def of(self, examples: Sequence[Any], adapter: Adapter | None) -> tuple[np.ndarray, np.ndarray]:
        """Summed loss and targets of each row, in nats; rows of like length share a batch."""
        order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
        batches = Batches.in_order(
            [examples[number] for number in order], micro_batch_size=32, max_length=LONGEST,
            pad_id=int(self.tokenizer.pad_token_id),
        )  # fmt: skip
        each = (batch for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
        if adapter is None:
            sums = row_sums(self.base.model, each)
        else:
            with attached(self.base.model, adapter):
                sums = row_sums(self.base.model, each)
        place = np.argsort(order)
        return sums.loss_R[place], sums.targets_R[place]


def measure(work: Path, runs: dict[str, Path], rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Summed losses of every row by model, and `targets`; measured once and kept."""
    kept = work / "losses.npz"
    if kept.is_file():
        with np.load(kept) as found:
            return dict(found)
    adapters = {name: read_adapter(folder) for name, folder in runs.items()}
    losses = Losses(adapters[JOINT])
    examples = losses.examples(work / "rows.jsonl", rows)
    found = {}
    found[BASE], found["targets"] = losses.of(examples, None)
    own = [adapter for name, adapter in adapters.items() if name != JOINT]
    for name, adapter in (adapters | {SUM: together(own, 1.0), MEAN: together(own, 1 / len(own))}).items():
        found[name], _ = losses.of(examples, adapter)
        print(f"  {name}: {found[name].sum() / found['targets'].sum():.4f}", flush=True)
    np.savez(kept, **found)
    return found


def together(adapters: Sequence[Adapter], weight: float) -> Adapter:
    """The weighted sum of updates, exactly."""
    names = {name for adapter in adapters for name in adapter.layers}
    layers = {n: side_by_side([(weight, a.layers[n]) for a in adapters if n in a.layers]) for n in sorted(names)}
    return replace(adapters[0], layers=layers, record={})
