"""Peak memory and step time of DPO beside TRL's DPOTrainer with PEFT: the same model, batch, rank and layers.

    python scripts/bench/preference/cost.py            # each in a process of its own; writes cost.jsonl

A Llama of 4 layers, 256 wide, with 49,152 words (SmolLM2's), random; 4 pairs of 128 tokens, half of each the answer;
LoRA of rank 8 in all linear layers, fp32, one thread. Peak: the most of the process's resident memory, less what it held
before the first step. TRL's reference is asked in every step, or before training (`precompute`), as ours is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).with_suffix(".jsonl")
PAIRS, TOKENS, RANK, WORDS, STEPS = 4, 128, 8, 49152, 2
KINDS = ("dynlora", "trl", "trl, precomputed")


def model_and_ids() -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), torch.randint(3, WORDS, (2 * PAIRS, TOKENS))


def peak_of(work: Any) -> tuple[int, float]:
    """Most of resident memory above that before it, bytes, and the median of the seconds of a step."""
    import psutil

    process, most, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    done.set()
    watcher.join()
    return most[0] - before, median(seconds)


def ours() -> Any:
    from types import SimpleNamespace

    import torch

    from dynlora_cli import plugins
    from dynlora_cli.config.options import options
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.lora.layer import ComponentLinear, switched_off
    from dynlora_cli.lora.pool import Pool

    model, ids = model_and_ids()
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            layers[name] = ComponentLinear(module, 2.0)
            setattr(model.get_submodule(parent), leaf, layers[name])
    pool = Pool(layers, dict.fromkeys(layers, RANK))
    optimizer = torch.optim.AdamW([pool.values], lr=1e-4)
    values = {key: option.default for key, option in options("objectives", "dpo").items()}
    objective = plugins.load("objectives", "dpo").Objective(SimpleNamespace(**values))
    labels = torch.full_like(ids, -100)
    labels[:, TOKENS // 2 - 1 : -1] = ids[:, TOKENS // 2 :]
    keys = [bytes([number]) for number in range(2 * PAIRS)]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs, labels, list(range(PAIRS)), ids.numel(), PAIRS, line_keys=keys)
    with switched_off(layers.values()):
        objective.remember(model, [batch])
    model.train()

    def step() -> None:
        (objective.loss(model, batch) / PAIRS).backward()
        optimizer.step()
        pool.zero_grad(optimizer)

    return step


def trls(*, precompute: bool) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    model, ids = model_and_ids()
    words = {f"w{number}": number for number in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w1", eos_token="w2"
    )
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model = trainer.model
    answers = torch.zeros_like(ids)
    answers[:, TOKENS // 2 :] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answers}
    if precompute:
        with torch.no_grad():
            chosen, rejected = trainer.compute_ref_log_probs(model, batch)
        batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        trainer.precompute_ref_logps = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> None:
        trainer._compute_loss(model, dict(batch), return_outputs=False).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    if len(sys.argv) > 1:
        kind = sys.argv[1]
        step = ours() if kind == "dynlora" else trls(precompute=kind != "trl")
        step()  # the first one allocates what stays
        peak, seconds = peak_of(step)
        print(json.dumps({"kind": kind, "peak_mib": round(peak / 2**20, 1), "cpu_seconds": round(seconds, 3)}))
        return
    with RESULTS.open("w", encoding="utf-8") as file:
        for kind in KINDS:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            done = subprocess.run(
                [sys.executable, __file__, kind], env=environment, capture_output=True, text=True, check=True
            )
            line = done.stdout.strip().splitlines()[-1]
            print(line, flush=True)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
