"""What the tests of `dynlora eval` share: what a command left behind, finished runs, adapters of other tools."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pico import pico_recipe
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dynlora_cli.config.load import load_recipe


class Run(NamedTuple):
    """A finished run, its recipe file, and what it said."""

    folder: Path
    recipe: Path
    summary: dict[str, Any]


def finished_run(folder: Path, kind: str) -> Run:
    """A run of 12 steps on a tiny model, at a rate that changes something."""
    folder.mkdir()
    recipe = make_recipe(folder, "train.learning_rate=2e-2", kind=kind)
    summary, _ = train(recipe)
    path = folder / f"{kind}.yaml"
    path.write_text(path.read_text().replace("0.005", "0.02"))
    return Run(folder / "out", path, summary)


def finished_chat_run(folder: Path) -> Run:
    """A run on conversations of one or two turns."""
    rows = []
    for number in range(30):
        turns = [("user", f"sort {number}"), ("assistant", f"done {number}")] * (1 + number % 2)
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"train": [str(folder / "chat.jsonl")], "val_size": 0.2, "max_length": 96}
    path = pico_recipe(folder, dataset=dataset)
    summary, _ = train(load_recipe(path))
    return Run(folder / "out", path, summary)


def foreign(base: Path, folder: Path, *, classes: int | None = None, **config: Any) -> Path:
    """A LoRA that stock PEFT made on a base, with weights that matter."""
    auto, options = (AutoModelForCausalLM, {}) if classes is None else (AutoModelForSequenceClassification, {})
    options |= {} if classes is None else {"num_labels": classes}
    kind = "CAUSAL_LM" if classes is None else "SEQ_CLS"
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = get_peft_model(
            auto.from_pretrained(base, **options), LoraConfig(r=2, lora_alpha=4, task_type=kind, **config)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
