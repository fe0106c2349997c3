"""What others ship for LoRA fine-tuning, in numbers: an example recipe, or what their code does where nothing is set.

Rows are read once and in one order by everybody, so the epochs that a tool ships (1 to 3, Unsloth Studio's cap of 30 steps) are
one pass here. 8-bit AdamW is plain AdamW on a CPU. A last step that is not full is taken, not dropped. Tinker also trains
the unembedding, which this model shares with its embedding: left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import get_scheduler

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Tool:
    """The shipped defaults of a tool.

    Attributes:
        warmup: a share of the steps, rounded up as transformers does; or a number of steps.
        axolotls: the share is rounded down and 1 becomes 2, as axolotl has it.
        rows, accumulation: rows (packed: lines of `packed` tokens) of a forward pass, and passes of a step.
        packed: 0: rows are not packed.
        source: repository and file.
    """

    rank: int
    alpha: int
    rate: float
    source: str
    dropout: float = 0.0
    targets: tuple[str, ...] = SEVEN
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: float | int = 0
    axolotls: bool = False
    rows: int = 8
    accumulation: int = 1
    packed: int = 0
    train_on: Literal["auto", "all"] = "auto"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0

    def shares(self, steps: int) -> list[float]:
        """The rate of every step as a share of the highest, by the schedules of transformers."""
        if isinstance(self.warmup, int):
            warmup = self.warmup
        else:
            warmup = (math.floor if self.axolotls else math.ceil)(self.warmup * steps)
            warmup = 2 if self.axolotls and warmup == 1 else warmup
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = get_scheduler(self.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        found = []
        for _ in range(steps):
            found.append(float(scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return found


TINKER_RATE = 5e-4 * (2000 / 576) ** 0.781  # get_lr of hyperparam_utils.py for a Llama of hidden size 576
TOOLS = {
    "axolotl": Tool(
        16, 32, 2e-4, "axolotl-ai-cloud/axolotl examples/llama-3/lora-1b.yml",
        dropout=0.05, warmup=0.1, axolotls=True, rows=2, accumulation=2, packed=2048,
    ),
    "llamafactory": Tool(
        8, 16, 1e-4, "hiyouga/LLaMA-Factory examples/train_lora/qwen3_lora_sft.yaml", warmup=0.1, rows=1, accumulation=8
    ),
    "ms-swift": Tool(
        8, 32, 1e-4, "modelscope/ms-swift swift/arguments/tuner_args.py, swift/trainers/arguments.py",
        dropout=0.05, rows=1, accumulation=16, weight_decay=0.1, betas=(0.9, 0.95),
    ),
    "unsloth": Tool(
        16, 16, 2e-4, "unslothai/unsloth studio/backend/assets/configs/model_defaults/default.yaml",
        schedule="linear", warmup=0.1, rows=2, accumulation=4, weight_decay=0.001,
    ),
    "torchtune": Tool(
        64, 128, 3e-4, "pytorch/torchtune recipes/configs/llama3_2/1B_lora_single_device.yaml",
        targets=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        warmup=100, rows=4, accumulation=8, train_on="all", weight_decay=0.01, clip=None,
    ),
    "trl": Tool(
        16, 32, 2e-5, "huggingface/trl trl/trainer/model_config.py, sft_config.py",
        dropout=0.05, targets=("q_proj", "v_proj"), schedule="linear",
    ),
    "tinker": Tool(
        32, 32, 2e-4, "thinking-machines-lab/tinker-cookbook tinker_cookbook/recipes/sl_basic.py",
        schedule="linear", rows=8, accumulation=16, betas=(0.9, 0.95), clip=None,
    ),
}  # fmt: skip
TOOLS["tinker-get-lr"] = replace(TOOLS["tinker"], rate=round(TINKER_RATE, 6))
OUR_BATCH = "+batch8"
"""What a tool's name ends with where it has our batch: 8 rows a step, not packed; the rest is its own."""


def tool(name: str) -> Tool:
    """A tool as shipped, or with our batch."""
    shipped = TOOLS[name.removesuffix(OUR_BATCH)]
    return replace(shipped, rows=8, accumulation=1, packed=0) if name.endswith(OUR_BATCH) else shipped


def needs_our_batch(name: str) -> bool:
    """Whether its own batch is another one."""
    return (TOOLS[name].rows * TOOLS[name].accumulation, TOOLS[name].packed) != (8, 0)
