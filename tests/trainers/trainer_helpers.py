"""A tiny model under transformers' own Trainer, with and without components that go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dynlora_cli.trainers import Attached, DynamicRankCallback, attach

STEPS = 12
EVENTS = {"start": 0.25, "end": 0.75, "events": 3}  # after steps 5, 7 and 9


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of 2 layers, 32 wide; the same weights each time."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():  # larger than at birth, so that there is something to learn
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def rows(count: int = 96, length: int = 12) -> list[dict[str, list[int]]]:
    """Random tokens to learn by heart; some of the last ones are no targets."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (count, length), generator=generator).tolist()
    return [
        {"input_ids": row, "attention_mask": [1] * length, "labels": [*row[: length - i % 4], *[-100] * (i % 4)]}
        for i, row in enumerate(ids)
    ]


def arguments(folder: Path, **changed: Any) -> TrainingArguments:
    """12 steps of 4 rows on the CPU; every step is logged, nothing is saved."""
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 5e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "seed": 7, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**(given | changed))


def trainer_of(
    folder: Path, *, model: Any = None, budget: Any = 2, pruned: bool = True, attaching: Any = None, **changed: Any
) -> tuple[Trainer, Attached, DynamicRankCallback]:
    """A trainer on a tiny Llama with 8 components per layer; its callback is left out where it is not `pruned`."""
    model = model or tiny_llama()
    pruning = changed.pop("pruning", EVENTS)
    options = changed.pop("options", {})
    attached = attach(model, budget, **({"init": 8} | (attaching or {})))
    callback = DynamicRankCallback(attached, **pruning)
    callbacks = [*([callback] if pruned else []), *options.pop("callbacks", [])]
    trainer = Trainer(
        attached.outer, arguments(folder, **changed), train_dataset=rows(), callbacks=callbacks, **options
    )
    return trainer, attached, callback


def losses(trainer: Trainer) -> list[float]:
    """The loss of every step that was logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
