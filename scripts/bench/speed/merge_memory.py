"""Does merging need more memory than the largest tensor? Measured on a model of several GB in many shards.

    python scripts/bench/speed/merge_memory.py [--gigabytes 4]     # appended to scripts/bench/speed/merge_memory.jsonl

Makes a Llama of random bf16 weights shard by shard (it never is in memory as a whole either), a random adapter of mixed
rank on all its linear layers, and runs `dynlora merge` on them in a process of its own. The peak is that process's
largest resident set, imports and the final check of the merged model included. The bound: three times the largest
tensor plus 600 MB. The throughput is compared with that of a plain copy of the same files, before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from dynlora_cli.adapters.write import lora_config, write_adapter
from dynlora_cli.models.find import BUILTIN

HERE = Path(__file__).parent
RESULTS = HERE / "merge_memory.jsonl"
HIDDEN, INNER, VOCABULARY = 2048, 8192, 32_000
# The peak is read inside the process: what its parent tells of a child begins with the parent's own size.
MERGE = """
import atexit, sys
from pathlib import Path
from dynlora_cli.cli.app import main
status = lambda: next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
atexit.register(lambda: Path(sys.argv[-1]).write_text(status().split()[1]))
main(sys.argv[1:-1])
"""
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER


def make_model(folder: Path, gigabytes: float) -> LlamaConfig:
    """A base in one shard per block."""
    blocks = max(1, round((gigabytes * 1e9 / 2 - 2 * VOCABULARY * HIDDEN) / LAYER))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=blocks,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUILTIN["builtin:tiny"]).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    shards = [{"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}]
    placed, total = {}, 0
    for block in range(-1, blocks + 1):
        name = f"model-{block + 2:05d}-of-{blocks + 2:05d}.safetensors"
        if block == -1:
            tensors = shards[0]
        elif block == blocks:
            tensors = {"lm_head.weight": draw(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN).bfloat16()}
        else:
            shapes = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
            shapes |= {
                "mlp.gate_proj": (INNER, HIDDEN),
                "mlp.up_proj": (INNER, HIDDEN),
                "mlp.down_proj": (HIDDEN, INNER),
            }
            tensors = {f"model.layers.{block}.{key}.weight": draw(*shape) for key, shape in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{block}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


def make_adapter(folder: Path, base: Path, config: LlamaConfig) -> None:
    """Random factors of rank 1 to 16."""
    generator = torch.Generator().manual_seed(1)
    tensors, ranks = {}, {}
    for block in range(config.num_hidden_layers):
        for place, leaf in enumerate(("q", "k", "v", "o", "gate", "up", "down")):
            name = f"model.layers.{block}.{'self_attn' if place < 4 else 'mlp'}.{leaf}_proj"
            d_in = INNER if leaf == "down" else HIDDEN
            d_out = INNER if leaf in ("gate", "up") else HIDDEN
            ranks[name] = rank = 1 + (block * 7 + place * 5) % 16
            for part, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                values = torch.randn(*shape, generator=generator) * 0.02
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    folder.mkdir(parents=True)
    write_adapter(folder, lora_config(ranks, base_model=str(base), revision=None, task="causal-lm"), tensors)


def copied(work: Path) -> float:
    """Seconds of a plain copy of the base, in memory that has been free for as long as a merge takes to begin.

    A virtual machine gives free memory back after a while, and to get it again takes longer than to fill it.
    """
    time.sleep(8)
    started = time.perf_counter()
    shutil.copytree(work / "base", work / "copy")
    seconds = time.perf_counter() - started
    shutil.rmtree(work / "copy")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--work", type=Path, help="where the models go; a temporary folder by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work_name:
        work = Path(work_name)
        config = make_model(work / "base", options.gigabytes)
        make_adapter(work / "adapter", work / "base", config)
        files = list((work / "base").glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        copying = [copied(work)]
        arguments = ["merge", "--adapter", str(work / "adapter"), "--out", str(work / "merged"), "--json"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", MERGE, *arguments, str(work / "peak")],
            check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        seconds = time.perf_counter() - started
        peak = int((work / "peak").read_text()) * 1024
        answer = json.loads(done.stdout)
        shutil.rmtree(work / "merged")
        copying.append(copied(work))
    largest = 2 * VOCABULARY * HIDDEN
    row = {
        "date": time.strftime("%Y-%m-%d"),
        "model_bytes": size,
        "shards": len(files),
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "bound_bytes": 3 * largest + 600_000_000,
        "merge_and_check_seconds": round(seconds, 1),
        "write_seconds": round(answer["write_seconds"], 1),
        "copy_seconds": [round(seconds, 1) for seconds in copying],
        "kl": answer["check"]["kl"],
    }
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))
    if peak > row["bound_bytes"]:
        sys.exit("the peak is above the bound")


if __name__ == "__main__":
    main()
