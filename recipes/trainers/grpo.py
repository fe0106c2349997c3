"""Reinforcement learning (GRPO) with TRL and a reward in Python, where each layer keeps a rank of its own.

python recipes/trainers/grpo.py [MODEL]     a folder or hub id; without one the built-in model, offline

Hardware: one CPU core. Time: 32 seconds of CPU. Result, at the log's first and last line: reward -4.048 -> -3.139.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import dynlora_cli
from dynlora_cli.trainers import DynamicRankCallback, attach

BUILT_IN = Path(dynlora_cli.__file__).parent / "assets" / "builtin_tiny"
name = sys.argv[1] if len(sys.argv) > 1 else str(BUILT_IN)
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")


def short_words(completions, **_):
    """Rewards answers in words of few letters."""
    return [-sum(map(len, text.split())) / max(1, len(text.split())) for text in completions]


rows = [{"prompt": f"The {noun} was"} for noun in ["house", "garden", "king", "ship", "night", "road", "letter", "dog"]]
sampling = {"num_generations": 8, "max_completion_length": 12, "beta": 0.02}
options = {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-3}

attached = attach(model, budget=4)
trainer = GRPOTrainer(
    model,
    short_words,
    args=GRPOConfig("out/trl-grpo", report_to="none", bf16=torch.cuda.is_available(), **options, **sampling),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[DynamicRankCallback(attached)],
)
attached.share(trainer.ref_model)  # with beta > 0, TRL has loaded the base a second time: give that memory back
trainer.train()
trainer.save_model()  # a plain PEFT adapter
print(attached)
