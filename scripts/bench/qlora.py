"""What does a quantized base cost in loss, and save in memory? The same run on the plain base, on NF4 and on 8 bits.

    python scripts/bench/qlora.py --shared ../shared     # 3 seeds of each on E2E NLG, appended to qlora.jsonl; table to stdout
    python scripts/bench/qlora.py --table                # only the table of what is there

`dynlora train` on a 3 M Llama, same rows, steps and rate for all three. Memory is that of the base's tensors as they
lie in the process, scales and all; embedding and head, which are never quantized, are counted apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

RESULTS = Path(__file__).with_suffix(".jsonl")
BASES = {"plain": (), "nf4": ("model.load_in_4bit=true",), "int8": ("model.load_in_8bit=true",)}
SEEDS = 3
RECIPE = """
model: {name_or_path: SHARED/models/stories3M}
dataset: {train: [{path: SHARED/data/e2e_nlg/valid_clean.jsonl}], val_size: 0.05, max_length: 128}
rank: {budget: 2}
train: {micro_batch_size: 8, max_steps: STEPS, learning_rate: 4.0e-3}
eval: {max_samples: 200}
"""


def resident_bytes(recipe_path: Path, overrides: list[str]) -> dict[str, int]:
    """Bytes of the base's linear layers, and of its tables and its head."""
    from dynlora_cli.config.load import load_recipe
    from dynlora_cli.execution.mode import plan
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.models.targets import find_targets
    from dynlora_cli.training.setup import read_base, read_data

    recipe = load_recipe(recipe_path, overrides)
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    model = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train)).model
    layers = find_targets(model, "all-linear")
    linear = sum(_bytes(module) for module in layers.values())
    apart = {id(p): p.nbytes for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()
    apart |= {id(p): p.nbytes for p in head.parameters()}
    return {"layers": linear, "tables": sum(apart.values())}


def _bytes(module: nn.Module) -> int:
    """A layer's weight with the scales it is stored by."""
    weight: Any = module.weight
    size = sum(parameter.nbytes for parameter in module.parameters())
    if (state := getattr(weight, "quant_state", None)) is not None:
        nested = state.state2
        size += state.absmax.nbytes + (nested.absmax.nbytes + nested.code.nbytes if nested else 0)
    if getattr(weight, "SCB", None) is not None:
        size += weight.SCB.nbytes
    return size


def run(work: Path, shared: Path, base: str, seed: int, steps: int) -> dict[str, Any]:
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE.replace("SHARED", str(shared.resolve())).replace("STEPS", str(steps)), encoding="utf-8")
    overrides = [*BASES[base], f"seed={seed}", f"output_dir={work / 'out'}"]
    sets = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "dynlora_cli", "train", str(recipe), "--overwrite", "--json", *sets]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    summary = json.loads(done.stdout)
    kept = {key: summary[key] for key in ("loss_before", "loss_after", "parameters", "seconds", "peak_memory_bytes")}
    return {"base": base, "seed": seed, "steps": steps, **kept, **resident_bytes(recipe, overrides)}


def table() -> str:
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    plain = {line["seed"]: line for line in lines if line["base"] == "plain"}
    rows = [
        "| base | loss after training | against plain | bytes of the layers | of tables and head |",
        "|---|---|---|---|---|",
    ]
    for base in BASES:
        here = [line for line in lines if line["base"] == base and line["seed"] in plain]
        if here:
            changes = [100 * (line["loss_after"] / plain[line["seed"]]["loss_after"] - 1) for line in here]
            size = here[0]["layers"] / plain[here[0]["seed"]]["layers"]
            rows.append(
                f"| {base} | {mean(line['loss_after'] for line in here):.4f} ({len(here)}) | "
                f"{mean(changes):+.2f} % ({min(changes):+.2f} to {max(changes):+.2f}) | {size:.1%} | {here[0]['tables']:,} |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("DYNLORA_SHARED", "../shared")))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--table", action="store_true", help="only show what was measured before")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(SEEDS):
                for base in BASES:
                    found = run(Path(folder), options.shared, base, seed, options.steps)
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(found) + "\n")
    print(table())


if __name__ == "__main__":
    main()
