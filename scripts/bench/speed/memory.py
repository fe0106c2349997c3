"""What does a run need of memory, on the plain base, on 8 bits and on NF4? Told by `--dry-run` for published shapes.

    python scripts/bench/speed/memory.py               # Llama-3.2-1B and Llama-3.1-8B, table to memory.md

There are no weights: a dry run computes one step whose tensors have shapes and no numbers, and counts them (tests hold
it to 15 % of the measured peak). LoRA at twice a budget of 16, one row of 1024 tokens, gradient checkpointing, bf16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from speed import PUBLISHED
from transformers import AutoTokenizer, LlamaConfig

from dynlora_cli.models.find import BUILTIN

RESULTS = Path(__file__).with_suffix(".md")
BASES = {"plain": "", "8 bits": ", load_in_8bit: true", "NF4": ", load_in_4bit: true"}
OPTIMIZERS = ("adamw", "adamw_8bit")
PARTS = ("base", "adapter", "optimizer", "activations", "total")
RECIPE = """
model: {name_or_path: MODEL, dtype: bfloat16BASE}
dataset: {train: [{path: builtin:stdlib-docs}], max_length: 1024, packing: true}
rank: {budget: 16}
train: {micro_batch_size: 1, gradient_checkpointing: true, max_steps: 10, learning_rate: 1.0e-3, optimizer: OPTIMIZER}
"""


def make_folder(folder: Path, shape: str) -> None:
    """A model's folder without its weights."""
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    LlamaConfig(**PUBLISHED[shape], **heads, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"]).save_pretrained(folder)


def need(work: Path, shape: str, base: str, optimizer: str) -> dict[str, Any]:
    """Bytes of every part at the peak of a step."""
    recipe = work / "recipe.yaml"
    text = RECIPE.replace("MODEL", str(work / shape)).replace("BASE", BASES[base]).replace("OPTIMIZER", optimizer)
    recipe.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "dynlora_cli", "train", str(recipe), "--dry-run", "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(done.stdout)["plan"]["memory"]
    return {**found, "total": sum(found[part] for part in PARTS[:-1])}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    lines = ["# Memory that a run needs, GiB\n", "Made by `scripts/bench/speed/memory.py`; how: its first lines.\n"]
    lines += ["| shape | base | optimizer | " + " | ".join(PARTS) + " |", "|---" * (3 + len(PARTS)) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for shape in PUBLISHED:
            make_folder(Path(folder) / shape, shape)
            for base in BASES:
                for optimizer in OPTIMIZERS:
                    found = need(Path(folder), shape, base, optimizer)
                    sizes = [f"{found[part] / 2**30:.2f}" for part in PARTS]
                    lines.append("| " + " | ".join([shape, base, optimizer, *sizes]) + " |")
                    print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
