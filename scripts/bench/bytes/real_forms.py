"""What rounding costs adapters of a real model: rows of `e2e` that quality.py keeps for tests, SmolLM2-135M-Instruct in bf16.

    python scripts/bench/bytes/real_forms.py NAME=FOLDER...      # adapters of that model; lines go to by_bytes.jsonl

The model's folder is in DYNLORA_REAL_MODELS.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from by_bytes import RESULTS
from bytes_forms import through
from quality_tasks import prepare

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.load import check_recipe
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.execution.mode import plan
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.rounding.floats import changed
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.setup import read_base, read_data

MODEL = Path(os.environ.get("DYNLORA_REAL_MODELS", Path.home() / ".cache" / "dynlora-models")) / "SmolLM2-135M-Instruct"
FORMS = ("float32", "bf16", "fp8", "nf4", "int4", "int3")
ROWS = 60


def main() -> None:
    torch.set_num_threads(1)
    rows = prepare("e2e", Path("out/bytes").resolve())
    recipe = check_recipe(
        {
            "model": {"name_or_path": str(MODEL), "dtype": "bfloat16"},
            "dataset": {"train": [{"path": str(rows / "train.jsonl")}], "val": [{"path": str(rows / "test.jsonl")}], "max_length": 256},
            "train": {"micro_batch_size": 4},
            "eval": {"max_samples": ROWS},
        },
        ["output_dir=out/bytes/real"],
        None,
    )  # fmt: skip
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))
    batches = make_batches(recipe, data.val[:ROWS], base, shuffle=False)
    for name, folder in (word.split("=", 1) for word in sys.argv[1:]):
        adapter = read_adapter(Path(folder))
        before = [(f.a_CI, f.b_OC) for f in adapter.layers.values()]
        for form in FORMS:
            rounded, size = through(adapter, form)
            lost = changed(before, [(f.a_CI, f.b_OC) for f in rounded.layers.values()])
            with attached(base.model, rounded):
                loss = row_sums(
                    base.model, (b for i in range(batches.steps_per_epoch) for b in batches.step(0, i))
                ).loss
            line = {"what": "real", "adapter": name, "parameters": adapter.parameters, "form": form, "bytes": size}
            line |= {"changed": round(lost, 5), "test": round(loss, 5), "rows": ROWS}
            print(line, flush=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
