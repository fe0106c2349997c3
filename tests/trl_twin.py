"""TRL's own trainers on a tiny model with PEFT's LoRA, and our components with the same numbers: one batch through both.

twin         a model with components, the pool, and the same model with PEFT's LoRA inside a trainer of TRL; fp64
pair_batch   a batch of ours, of prompts with two answers each
of_trl       its lines as TRL's collators make them
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from pico import pico_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora_cli.data.batches import Batch
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool

RANK, SCALE = 3, 2.0
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
# Prompt, an answer, another answer; of different lengths.
TEXTS = (
    ("what is two and two", " four", " five or six"),
    ("name a colour", " blue, said the cat", " no"),
    ("a", " b", " c d e f"),
)


@dataclass
class Twin:
    """The same model twice.

    Attributes:
        model, pool: ours.
        trainer: TRL's, whose model is PEFT's.
        tokenizer: of both.
    """

    model: Any
    pool: Pool
    trainer: Any
    tokenizer: Any

    def both_losses(self, ours: Tensor, theirs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The losses, and the gradients of every A and B in turn."""
        self.pool.values.grad.zero_()
        parameters = dict(self.trainer.model.named_parameters())
        for parameter in parameters.values():
            parameter.grad = None
        ours.backward()
        theirs.backward()
        found = [(ours.detach(), theirs.detach())]
        for name, layer in self.pool.layers.items():
            for leaf, key in ((layer.a_CI, "lora_A"), (layer.b_OC, "lora_B")):
                found.append((leaf.grad.clone(), parameters[f"base_model.model.{name}.{key}.default.weight"].grad))
        return found


def twin(folder: Path, kind: str, **options: Any) -> Twin:
    """Two models whose components and LoRA weights are the same random numbers.

    Args:
        folder: for the model and what TRL writes.
        kind: dpo, kto or orpo.
        options: of the trainer's configuration.
    """
    path = pico_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, other = (AutoModelForCausalLM.from_pretrained(path).double() for _ in range(2))
    trainer = _trainer(kind, other, tokenizer, folder, options)
    generator = torch.Generator().manual_seed(3)
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(TARGETS)):
            parent, _, leaf = name.rpartition(".")
            layers[name] = ComponentLinear(module, SCALE)
            setattr(model.get_submodule(parent), leaf, layers[name])
    pool = Pool(layers, dict.fromkeys(layers, RANK))
    pool.adopt(torch.empty(pool.parameters, dtype=torch.float64).uniform_(-0.3, 0.3, generator=generator), pool.counts)
    with torch.no_grad():
        for name, layer in layers.items():
            inside = trainer.model.base_model.model.get_submodule(name)
            inside.lora_A["default"].weight.data = layer.a_CI.detach().clone()
            inside.lora_B["default"].weight.data = layer.b_OC.detach().clone()
    model.train()
    trainer.model.train()
    return Twin(model, pool, trainer, tokenizer)


def _trainer(kind: str, model: Any, tokenizer: Any, folder: Path, options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    rows = [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in TEXTS]
    common = {"output_dir": str(folder / "trl"), "report_to": [], "use_cpu": True, "bf16": False}
    lora = LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            makers, common = (ORPOConfig, ORPOTrainer), {**common, "gradient_checkpointing": False}
        elif kind == "kto":
            makers = KTOConfig, KTOTrainer
            rows = [{"prompt": p, "completion": good, "label": True} for p, good, _ in TEXTS]
            rows += [{"prompt": p, "completion": bad, "label": False} for p, _, bad in TEXTS]
            common = {**common, "train_sampling_strategy": "sequential", "gradient_checkpointing": False}
        else:
            makers, common = (DPOConfig, DPOTrainer), {**common, "gradient_checkpointing": False}
        config, maker = makers
        return maker(
            model=model,
            args=config(**common, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )


def pair_batch(tokenizer: Any, texts: Any = TEXTS) -> Batch:
    """Chosen lines, then rejected ones."""
    lines = [(prompt, answer) for side in (1, 2) for prompt, answer in ((text[0], text[side]) for text in texts)]
    return batch_of(tokenizer, lines, rows=len(texts))


def batch_of(tokenizer: Any, lines: list[tuple[str, str]], rows: int, **extra: Tensor) -> Batch:
    """Lines of a prompt and an answer, padded on the right; the targets are the answers' tokens."""
    ids = [(tokenizer(prompt).input_ids, tokenizer(answer).input_ids) for prompt, answer in lines]
    width = max(len(prompt) + len(answer) for prompt, answer in ids)
    inputs = torch.full((len(ids), width), tokenizer.pad_token_id)
    labels, mask = torch.full((len(ids), width), -100), torch.zeros(len(ids), width, dtype=torch.long)
    for line, (prompt, answer) in enumerate(ids):
        length = len(prompt) + len(answer)
        inputs[line, :length], mask[line, :length] = torch.tensor(prompt + answer), 1
        labels[line, len(prompt) - 1 : length - 1] = torch.tensor(answer)
    keys = [f"{prompt}|{answer}".encode() for prompt, answer in lines]
    given = {"input_ids": inputs, "attention_mask": mask}
    return Batch(given, labels, list(range(rows)), int(mask.sum()), rows, line_keys=keys, extra=extra)


def of_trl(batch: Batch) -> dict[str, Tensor]:
    """Ids, mask and where the answers are, as TRL's collators give them."""
    answers = torch.zeros_like(batch.labels)
    answers[:, 1:] = (batch.labels[:, :-1] != -100).long()
    return {**batch.inputs, "completion_mask": answers}
