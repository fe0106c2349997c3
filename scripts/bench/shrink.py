"""Does a step get faster as components are pruned? Reads the answer from the metrics of a real run.

    python scripts/bench/shrink.py                 # 3 runs, appended to scripts/bench/shrink.jsonl, table to stdout
    python scripts/bench/shrink.py --table         # only the table of what is there

A Llama of hidden size 512 with random weights (8 layers, 27 M parameters) is trained through the command line from 128
components a layer down to an average of 4, with its pruning spread over the middle of the run. Rows are
packed, so every step has about the same number of tokens. Step times are those of metrics.jsonl: medians over the steps
before the first event, between the third and the fourth, and after the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dynlora_cli.models.find import BUILTIN

HERE = Path(__file__).parent
RESULTS = HERE / "shrink.jsonl"
STEPS = 80
RECIPE = f"""
model: {{name_or_path: MODEL}}
dataset: {{train: [{{path: builtin:stdlib-docs}}], max_length: 128, packing: true}}
rank: {{init: 128, budget: 4}}
pruning: {{start: 0.25, end: 0.75, events: 6}}
train: {{micro_batch_size: 4, max_steps: {STEPS}, log_steps: 1, learning_rate: 1.0e-3}}
eval: {{max_samples: 8}}
output_dir: OUT
"""


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"]).save_pretrained(folder)


def run_once(work: Path) -> dict:
    model, out = work / "model", work / "out"
    (work / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(model)).replace("OUT", str(out)))
    command = [sys.executable, "-m", "dynlora_cli", "train", str(work / "recipe.yaml"), "--overwrite"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = {line["step"]: line for line in lines if line["event"] == "train"}
    phases = {"before": range(3, 20), "half-way": range(42, 48), "after": range(62, STEPS + 1)}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{
            name: {
                "components": metrics[steps[-1]]["components"],
                "step_seconds": median(metrics[step]["step_seconds"] for step in steps),
            }
            for name, steps in phases.items()
        },
    }


def table() -> str:
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = [
        "| | components | seconds per step | relative to before: median (min to max) |",
        "|---|---|---|---|",
    ]
    for name in ("before", "half-way", "after"):
        ratios = [run[name]["step_seconds"] / run["before"]["step_seconds"] for run in runs]
        seconds = median(run[name]["step_seconds"] for run in runs)
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {runs[-1][name]['components']} | {seconds:.2f} | {spread} |")
    return "\n".join([*lines, "", f"{len(runs)} runs, {runs[-1]['threads']} threads, torch {runs[-1]['torch']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only show what was measured before")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as work:
            make_model(Path(work) / "model")
            for _ in range(args.runs):
                with RESULTS.open("a") as results:
                    results.write(json.dumps(run_once(Path(work))) + "\n")
    print(table())


if __name__ == "__main__":
    main()
