"""Supervised fine-tuning with TRL, where each layer keeps a rank of its own.

python recipes/trainers/sft.py [MODEL]      a folder or hub id; without one the built-in model, offline

Hardware: one CPU core. Time: 19 seconds of CPU. Result, at the log's first and last line: loss 2.91 -> 0.01 nats/token.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import dynlora_cli
from dynlora_cli.trainers import DynamicRankCallback, attach

BUILT_IN = Path(dynlora_cli.__file__).parent / "assets" / "builtin_tiny"
name = sys.argv[1] if len(sys.argv) > 1 else str(BUILT_IN)
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")

words = ["apple", "river", "seven", "cloud", "stone", "green", "mouse", "paper"]
pairs = [(a, b) for a in words for b in words if a != b]
rows = [{"prompt": f"Join {a} and {b}:", "completion": f" {a}-{b}"} for a, b in pairs]

options = {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 3e-3}

attached = attach(model, budget=4)  # the base is frozen, every linear layer gets rank-1 components
trainer = SFTTrainer(
    model,
    args=SFTConfig("out/trl-sft", report_to="none", bf16=torch.cuda.is_available(), **options),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[DynamicRankCallback(attached)],  # from a quarter to half of the steps, components go
)
trainer.train()
trainer.save_model()  # a plain PEFT adapter
print(attached)
