"""Step time and size under transformers' Trainer: components that go, PEFT's LoRA, and PEFT's AdaLoRA, which masks.

    python scripts/bench/trainers/trainers.py [--rounds 3]        # about a minute on an idle core

Every round trains all four on the same rows of builtin:stdlib-docs, with builtin:tiny, in another order. Two phases are
timed: before the first event, and after the last. Then: how large the models of TRL's DPO are with and without
`reference`. Writes trainers.jsonl, a line for each run, and trainers.md beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer

from dynlora_cli.data.builtin import rows
from dynlora_cli.models.find import BUILTIN
from dynlora_cli.trainers import DynamicRankCallback, attach

HERE = Path(__file__).parent
BASE = str(BUILTIN["builtin:tiny"])
STEPS, BATCH, LENGTH, BUDGET = 24, 4, 96, 8
START, END = 0.4, 0.6  # of the steps
SKIPPED = 3  # steps at the beginning of a phase that are not timed
RIVAL = "PEFT LoRA, 16"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock(TrainerCallback):
    """CPU seconds and wall seconds of every optimizer step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time(), time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.cpu.append(time.process_time() - self.began[0])
        self.wall.append(time.perf_counter() - self.began[1])


class Allocate(TrainerCallback):
    """What PEFT asks of people who train AdaLoRA: tell it about each step, before the gradient is gone."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.model.base_model.update_and_allocate(state.global_step + 1)


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def lora(rank: int) -> tuple[Any, list[Any]]:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    return peft.get_peft_model(base(), config), []


def adalora() -> tuple[Any, list[Any]]:
    config = peft.AdaLoraConfig(
        init_r=2 * BUDGET,
        target_r=BUDGET,
        tinit=int(START * STEPS),
        tfinal=STEPS - int(END * STEPS),  # PEFT counts it from the end
        deltaT=2,
        total_step=STEPS,
        target_modules=LINEAR,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base(), config)
    return model, [Allocate(model)]


def components() -> tuple[Any, list[Any]]:
    model = base()
    return model, [DynamicRankCallback(attach(model, BUDGET), start=START, end=END)]


METHODS = {
    "dynlora, 16 to 8": components,
    "PEFT LoRA, 16": lambda: lora(2 * BUDGET),
    "PEFT LoRA, 8": lambda: lora(BUDGET),
    "PEFT AdaLoRA, 16 to 8": adalora,
}


def encoded() -> list[dict[str, Any]]:
    """Rows of one length each, from the docstrings one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "\n".join(row["prompt"] + " " + row["completion"] for row in rows("train")[:2000])
    ids = tokenizer(text)["input_ids"]
    parts = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH, LENGTH)]
    return [{"input_ids": part, "labels": part} for part in parts[: STEPS * BATCH]]


def trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def measure(name: str, data: list[dict[str, Any]], folder: str) -> dict[str, Any]:
    """One run."""
    torch.manual_seed(0)
    model, callbacks = METHODS[name]()
    clock, before = Clock(), trained(model)
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=2e-3, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=STEPS, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks, clock])
    trainer.train()
    phases = {"before": slice(SKIPPED, int(START * STEPS)), "after": slice(int(END * STEPS) + SKIPPED, STEPS)}
    found: dict[str, Any] = {"method": name, "parameters_before": before, "parameters_after": trained(model)}
    for phase, steps in phases.items():
        found[f"cpu_{phase}"] = median(clock.cpu[steps])
        found[f"wall_{phase}"] = median(clock.wall[steps])
    states = trainer.optimizer.state.values()
    found["moments_after"] = sum(x.numel() for state in states for x in state.values() if torch.is_tensor(x) and x.ndim)
    return found


def held(*models: Any) -> int:
    """Bytes of all tensors, each counted once."""
    tensors = {}
    for model in models:
        for tensor in [] if model is None else [*model.parameters(), *model.buffers()]:
            tensors[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(tensors.values())


def references(folder: str) -> list[dict[str, Any]]:
    """What TRL's DPO holds: a second model, or our base."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    pairs = Dataset.from_list([{"prompt": f"{i}:", "chosen": " yes", "rejected": " no"} for i in range(8)])
    found = []
    for how in ("TRL loads a second model", "ref_model=attached.reference()"):
        model = base()
        attached = attach(model, BUDGET)
        reference = attached.reference() if "attached" in how else None
        arguments = DPOConfig(folder, report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = DPOTrainer(model, reference, args=arguments, train_dataset=pairs, processing_class=tokenizer)
        found.append({"reference": how, "bytes": held(trainer.model, trainer.ref_model), "bytes_model": held(model)})
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """The page: medians over the rounds, smallest and largest in brackets."""
    runs = [line for line in lines if "method" in line]
    rival = {run["round"]: run["cpu_before"] for run in runs if run["method"] == RIVAL}
    out = [
        "# Under transformers' Trainer\n",
        f"builtin:tiny, {BATCH} x {LENGTH} tokens a step, {STEPS} steps, one CPU thread, fp32. A step's CPU time relative to "
        f"that of {RIVAL} before the events in the same round ({1000 * median(rival.values()):.0f} ms), median over rounds "
        "(smallest to largest). Made by `trainers.py` from `trainers.jsonl`.\n",
        "| method | parameters at the start | at the end | moments at the end | step before events | step after events |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        mine = [run for run in runs if run["method"] == name]
        times = []
        for phase in ("before", "after"):
            values = sorted(run[f"cpu_{phase}"] / rival[run["round"]] for run in mine)
            times.append(f"{median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})")
        sizes = [f"{mine[0][key]:,}" for key in ("parameters_before", "parameters_after", "moments_after")]
        out.append(f"| {' | '.join([name, *sizes, *times])} |")
    out += [
        "",
        "What the tensors of TRL's DPO take, model and reference together:\n",
        "| reference | MB |",
        "|---|---|",
    ]
    out += [f"| {line['reference']} | {line['bytes'] / 1e6:.1f} |" for line in lines if "reference" in line]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data, names, lines = encoded(), list(METHODS), []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(rounds):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                lines.append({"round": index, **measure(name, data, folder)})
                print(json.dumps(lines[-1]), flush=True)
        lines += references(folder)
    (HERE / "trainers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (HERE / "trainers.md").write_text(table(lines), encoding="utf-8")
    print(table(lines))


if __name__ == "__main__":
    main()
