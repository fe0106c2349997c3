"""Preference tuning (DPO) with TRL, where each layer keeps a rank of its own and no second model is loaded.

python recipes/trainers/dpo.py [MODEL]      a folder or hub id; without one the built-in model, offline

Hardware: one CPU core. Time: 18 seconds of CPU. Result, at the log's first and last line: loss 0.20 -> 0.001 nats/pair.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import dynlora_cli
from dynlora_cli.trainers import DynamicRankCallback, attach

BUILT_IN = Path(dynlora_cli.__file__).parent / "assets" / "builtin_tiny"
name = sys.argv[1] if len(sys.argv) > 1 else str(BUILT_IN)
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")

things = ["tea", "rain", "snow", "bread", "music", "winter", "chess", "salt", "wool", "ink", "jazz", "clay"]
verbs = ["love", "like", "know", "sell"]
rows = [
    {"prompt": f"Do you {verb} {thing}?", "chosen": f" Yes, I {verb} {thing}.", "rejected": f" No {thing} at all!"}
    for verb in verbs
    for thing in things
]

options = {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 1e-3}

attached = attach(model, budget=4)
trainer = DPOTrainer(
    model,
    ref_model=attached.reference(),  # the base itself: shares every tensor with the model that trains
    args=DPOConfig("out/trl-dpo", report_to="none", bf16=torch.cuda.is_available(), **options),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[DynamicRankCallback(attached)],
)
trainer.train()
trainer.save_model()  # a plain PEFT adapter
print(attached)
