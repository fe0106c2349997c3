"""Runs small enough to be trained in tests: tiny models with a tokenizer, frozen rows, recipes, and what came of them.

model_folder    a Llama, GPT-2 or Bert of 2 layers, 32 wide, on disk; the same weights on every machine
make_recipe     a checked recipe on such a model and tests/fixtures rows made here, 12 steps
train           `train.run`, with the events it told
assembled       the parts of a run, for tests of single steps
in_double       the same in fp64
grounded_recipe a run of context distillation, on `grounded_rows`
make_library    three adapters, each of rows of its own; router_recipe: of a router over them
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from data_helpers import CHATML, byte_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dynlora_cli.commands import train as train_command
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.execution.mode import plan
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.components import attach
from dynlora_cli.training.run import Run
from dynlora_cli.training.setup import make_accelerator, make_run, read_base, read_data

WORDS = ["count", "sort", "reverse", "print", "join", "split", "copy", "words", "lines", "numbers", "names", "every"]
# What differs between two runs of the same recipe.
TIMES = {"seconds", "step_seconds", "tokens_per_second", "memory_bytes"}


def model_folder(folder: Path, kind: str = "llama") -> Path:
    """Write the model and its tokenizer to `folder`/`kind`.

    Weights are uniform, since torch draws uniform numbers alike on every CPU, and normal ones not.
    """
    path = folder / kind
    if path.is_dir():
        return path
    tokenizer = byte_tokenizer()
    size, ids = len(tokenizer), {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    small = {"vocab_size": size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**small, **ids, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=128)
        )
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**ids, vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    else:
        model = BertForSequenceClassification(
            BertConfig(**small, intermediate_size=64, max_position_embeddings=128, pad_token_id=1)
        )
        del model.classifier  # a pretrained encoder has none
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.uniform_(-0.2, 0.2, generator=generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, count: int = 40, *, labelled: bool = False) -> Path:
    """Prompt/completion rows of very different lengths, or texts with a label; no two prompts are the same."""
    lines = []
    for index in range(count):
        words = [WORDS[(index * 7 + place * 5) % len(WORDS)] for place in range(1 + index % 9)]
        text, many = f"{index}: {' '.join(words)}", len(words) > 4
        if labelled:
            lines.append({"text": f"{'many' if many else 'few'} {text}", "label": "many" if many else "few"})
        else:
            lines.append({"prompt": f"{text} -> ", "completion": " ".join(sorted(words))})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_recipe(folder: Path, *overrides: str, kind: str = "llama", out: str = "out") -> Recipe:
    """A recipe of 12 steps of 2x2 rows that prunes from 8 to 2 components per layer after steps 4, 6 and 8.

    Args:
        folder: for the model, the rows, the recipe and the run folder.
        overrides: as of `--set`.
        kind: of the model.
        out: the run folder's name.
    """
    classify = kind == "bert"
    recipe = {
        "model": {
            "name_or_path": str(model_folder(folder, kind)),
            "task": "sequence-classification" if classify else "causal-lm",
        },
        "dataset": {
            "train": [{"path": str(write_rows(folder / f"{kind}.jsonl", labelled=classify))}],
            "val_size": 0.2,
            "max_length": 96,
        },
        "rank": {"init": 8, "budget": 2},
        "pruning": {"start": 0.17, "end": 0.67, "events": 3},
        "train": {
            "max_steps": 12,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "log_steps": 1,
        },
        "eval": {"steps": 4},
        "output_dir": str(folder / out),
    }
    path = folder / f"{kind}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return load_recipe(path, overrides)


def train(recipe: Recipe, *, interrupt_at: int | None = None, **options: Any) -> tuple[dict[str, Any], list[dict]]:
    """The summary and all events of a run.

    Args:
        recipe: of the run.
        interrupt_at: press Ctrl-C when this step is about to run.
        options: of `train.run`.
    """
    events: list[dict] = []

    def listen(event: dict[str, Any]) -> None:
        events.append(event)
        done = {"tick": event.get("step"), "note": None, "eval": 0 if event.get("step") == 0 else None}
        if interrupt_at is not None and done.get(event["event"]) == interrupt_at - 1:
            os.kill(os.getpid(), signal.SIGINT)

    return train_command.run(recipe, listener=listen, **options), events


def assembled(recipe: Recipe, *, fill: bool = True) -> Run:
    """The parts of a run on which `step.step` can be called; nothing is written, nor compiled, captured or sharded.

    Args:
        recipe: of the run.
        fill: give B random values, so that A has a gradient too.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # as a run does; pytest puts the filters back
    modes = plan(recipe.train).for_short_runs()
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, accelerator.device, modes)
    trained, start = attach(base, recipe.adapter, recipe.rank, recipe.seed)
    if trained.layers and fill:
        with torch.no_grad():
            trained.values.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    modes.apply(base.model, trained)
    events: list[dict] = []
    run = make_run(recipe, accelerator, base, data, trained, start, modes, save=lambda run: None)
    run.emit = events.append
    run.model.train()
    return run


def in_double(recipe: Recipe) -> Run:
    """The same in fp64, and by ordinary operations: the truth for losses and gradients."""
    run = assembled(recipe.model_copy(update={"train": recipe.train.model_copy(update={"fused": False})}))
    run.model.eval().double()
    old = run.trained.values
    run.trained.adopt(old.detach().double(), run.trained.counts)
    for group in run.optimizer.param_groups:
        group["params"] = [run.trained.values if parameter is old else parameter for parameter in group["params"]]
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file without what depends on the clock."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


# -- rows with a context ---------------------------------------------------------------------------------------------

MARK = "@"  # stands in every context, and in no prompt or answer


def grounded_rows(folder: Path, count: int = 24) -> Path:
    """Contexts of three lengths, and answers of four."""
    path = folder / "grounded.jsonl"
    rows = [
        {
            "context": f"{MARK} the word of {number % 6} is {['cat', 'dog', 'fox'][number % 3]}"
            + " mat" * (number % 3),
            "prompt": f"what is {number}? ",
            "completion": "the cat sat on"[: 3 + 3 * (number % 4)],
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def grounded_recipe(folder: Path, *overrides: str, out: str = "out", turns: bool = False) -> Recipe:
    """As `make_recipe`, of context distillation; the model has no chat template, unless `turns`."""
    template = [f"dataset.chat_template={json.dumps(CHATML)}"] if turns else []
    where = f"dataset.train=[{grounded_rows(folder)}]"
    return make_recipe(folder, where, "train.objective=context-distillation", *template, *overrides, out=out)


# -- routers over a library of adapters ------------------------------------------------------------------------------

NAMES = ("ones", "twos", "threes")


def write_rows_of(folder: Path, name: str) -> Path:
    """Rows whose prompts and completions repeat one word."""
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": f"{name} {i}: ", "completion": f"{name} " * (1 + i % 4)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_library(folder: Path, *overrides: str) -> list[Path]:
    """Three adapters of the tiny llama, in folders of their names; ranks and targets differ."""
    own: dict[str, list[str]] = {"ones": [], "twos": ["adapter.target_modules=attention"], "threes": ["rank.budget=3"]}
    for name in NAMES:
        rows = write_rows_of(folder, name)
        train(make_recipe(folder, f"dataset.train=[{rows}]", *own[name], *overrides, out=name))
    return [folder / name for name in NAMES]


def router_recipe(folder: Path, variant: str, *overrides: str, out: str = "router") -> Recipe:
    """A recipe of 12 steps of a router over the adapters of `make_library`, on the rows of their own runs."""
    recipe: dict[str, Any] = {
        "model": str(model_folder(folder)),
        "dataset": "builtin:library",
        "adapter": {"variant": variant, "library": [str(folder / name) for name in NAMES]},
        "train": {"max_steps": 12, "micro_batch_size": 4, "learning_rate": 1e-2, "log_steps": 1},
        "eval": {"steps": 4},
        "output_dir": str(folder / out),
    }
    path = folder / f"{out}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return load_recipe(path, overrides)
