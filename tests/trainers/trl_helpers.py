"""TRL's trainers on a tiny Llama: seconds each, offline. `TRAINERS[name](folder, model, ...)` is a trainer, ready to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pico import pico_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

ROWS = [
    {"prompt": f"count {i}", "chosen": f" is number {i} of {i % 5}", "rejected": f" none, {i % 3} " * (1 + i % 2)}
    for i in range(24)
]
PLAIN = {"bf16": False, "gradient_checkpointing": False}  # TRL's own defaults are both on


def load(folder: Path, kind: str = "sft") -> Any:
    """The model that a trainer of this kind takes; the same weights each time."""
    if not (folder / "pico").is_dir():
        pico_model(folder)
    if kind != "reward":
        return AutoModelForCausalLM.from_pretrained(folder / "pico", dtype=torch.float32)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "pico", num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def _arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **PLAIN,
        **more,
    }


def _common(folder: Path, callbacks: list[Any]) -> dict[str, Any]:
    return {
        "processing_class": AutoTokenizer.from_pretrained(folder / "pico"),
        "callbacks": callbacks,
    }


def sft(
    folder: Path, model: Any, callbacks: list[Any], out: str = "out", peft_config: Any = None, **more: Any
) -> SFTTrainer:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    arguments = SFTConfig(max_length=64, **_arguments(folder / out, **more))
    common = {**_common(folder, callbacks), "peft_config": peft_config}
    return SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), **common)


def dpo(
    folder: Path, model: Any, callbacks: list[Any], out: str = "out", ref_model: Any = None, **more: Any
) -> DPOTrainer:
    arguments = DPOConfig(max_length=64, **_arguments(folder / out, **more))
    rows = Dataset.from_list(ROWS)
    return DPOTrainer(model, ref_model, args=arguments, train_dataset=rows, **_common(folder, callbacks))


def kto(
    folder: Path, model: Any, callbacks: list[Any], out: str = "out", ref_model: Any = None, **more: Any
) -> KTOTrainer:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": i % 2 == 1}
        for i, row in enumerate(ROWS)
    ]
    arguments = KTOConfig(max_length=64, **_arguments(folder / out, **more))
    return KTOTrainer(
        model, ref_model, args=arguments, train_dataset=Dataset.from_list(rows), **_common(folder, callbacks)
    )


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward: how often the letter e stands in an answer."""
    return [float(text.count("e") + len(set(text)) / 10) for text in completions]


def grpo(folder: Path, model: Any, callbacks: list[Any], out: str = "out", **more: Any) -> GRPOTrainer:
    more = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, **more}
    arguments = GRPOConfig(**_arguments(folder / out, **more))
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    return GRPOTrainer(model, letters, args=arguments, train_dataset=rows, **_common(folder, callbacks))


def rloo(folder: Path, model: Any, callbacks: list[Any], out: str = "out", **more: Any) -> RLOOTrainer:
    more = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, **more}
    arguments = RLOOConfig(**_arguments(folder / out, **more))
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    common = _common(folder, callbacks)
    return RLOOTrainer(model, reward_funcs=letters, args=arguments, train_dataset=rows, **common)


def reward(folder: Path, model: Any, callbacks: list[Any], out: str = "out", **more: Any) -> RewardTrainer:
    arguments = RewardConfig(max_length=64, **_arguments(folder / out, **more))
    rows = Dataset.from_list(ROWS)
    return RewardTrainer(model, args=arguments, train_dataset=rows, **_common(folder, callbacks))


TRAINERS: dict[str, Callable[..., Any]] = {"sft": sft, "dpo": dpo, "grpo": grpo, "kto": kto, "reward": reward}
DRAWING = {"grpo": grpo, "rloo": rloo}  # answers are drawn while training


def losses(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
