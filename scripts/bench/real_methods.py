"""One run of real.py: a tool's shipped defaults, LoRA of a sweep, or `dynlora train`, on a real model in bf16.

Stock PEFT runs in the loop of quality_loop.py, under autocast as the tools have it; adapters are fp32. `dynlora train`
runs as a user runs it: its recipe holds the model, the data and what the method's name says, nothing else. Every adapter is
saved, read back by PEFT, and measured by the same code.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from quality_loop import Course, measure, train_peft
from quality_methods import lora_config, rslora_config
from real_tasks import GENERAL_TOKENS, general, prepare
from real_tools import SEVEN, TOOLS, Tool, tool
from safetensors import safe_open

from dynlora_cli import api
from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.load import Data
from dynlora_cli.errors import MeasureError
from dynlora_cli.execution.mode import plan
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import Base
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.lr_schedule import rate_share
from dynlora_cli.training.setup import read_base, read_data

Result = dict[str, Any]
MODELS = Path(os.environ.get("DYNLORA_REAL_MODELS", "~/.cache/dynlora-models")).expanduser()
MODEL = Path(os.environ.get("DYNLORA_REAL_MODEL", MODELS / "SmolLM2-135M-Instruct")).expanduser()
SWEPT = {
    "lora": lora_config,
    "rslora": rslora_config,
    "dora": partial(lora_config, use_dora=True),
}
OURS = ("dynlora", "dynlora-auto")
STRETCHED = "+stretched"
autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


COMMIT = _commit()  # when the process began, whatever is checked out since


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        method: `lora`, `rslora`, `dora` at a rank and rate; a tool, as shipped or `+batch8`, or `+stretched`; `dynlora` (rank 0: as it
            comes), `dynlora-auto`. Ours may be followed by keys of the recipe (`dynlora dataset.val_size=0`), and end in @LABEL,
            for another state of the code.
        rank, rate: 0 where the method decides.
        stretch: how many times the rows are seen, of a stretched run.
    """

    task: str
    method: str
    rank: int
    rate: float
    seed: int
    stretch: float = field(default=1.0, compare=False)

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        return (self.task, self.method, self.rank, f"{self.rate:.3e}", self.seed)

    @property
    def name(self) -> str:
        return "-".join(str(part).replace("/", "_") for part in self.key)


def is_ours(method: str) -> bool:
    return method.split("@")[0].split()[0] in OURS


def run(job: Job, work: Path, keep: Path | None = None, beat: float = math.inf) -> Result:
    """Train once and measure; CPU seconds are of this process, whatever else the machine does.

    Args:
        keep: a folder in which the adapter stays, under the job's name.
        beat: a loss on `val`; a run that ends above it is not the one to be chosen, and nothing else is measured of it.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not MODEL.is_dir():
        raise SystemExit(
            f"{MODEL} is not there: put the model there, name its parent in DYNLORA_REAL_MODELS, or a model in DYNLORA_REAL_MODEL"
        )
    folder = work / "adapters" / job.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        result = (_train_ours if is_ours(job.method) else _train_stock)(job, work, folder)
    except MeasureError:  # diverged; a learning rate too far
        return {"loss": math.inf, "model": MODEL.name}
    gc.collect()
    result |= _measured(job, work, folder, beat)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(keep / job.name, ignore_errors=True)
        shutil.move(folder, keep / job.name)
    shutil.rmtree(folder, ignore_errors=True)
    return result | {
        "model": MODEL.name,
        "rows": rows_of(job, work),
        "commit": COMMIT,
        "torch_threads": torch.get_num_threads(),
    }


def rows_of(job: Job, work: Path) -> int:
    return len((prepare(job.task, work) / "train.jsonl").read_text(encoding="utf-8").splitlines())


# -- stock PEFT ------------------------------------------------------------------------------------------------------


def _train_stock(job: Job, work: Path, folder: Path) -> Result:
    """PEFT's LoRA as a tool configures it, or one of a sweep."""
    method = job.method.removesuffix(STRETCHED)
    swept = method in SWEPT
    shipped = Tool(job.rank, 2 * job.rank, job.rate, "") if swept else tool(method)
    with clock() as load:
        recipe = recipe_for(job, work, "val", shipped)
        data, base = _read(recipe)
        recipe = recipe_for(job, work, "val", in_eights(shipped, [len(row.lines[0]) for row in data.train]))
        torch.manual_seed(job.seed)
        model = peft.get_peft_model(base.model, _config(method, shipped))
    batches = make_batches(recipe, data.train, base, shuffle=True)
    steps = max(1, round(job.stretch * batches.steps_per_epoch))
    if swept:  # as dynlora's own: no step of rate zero, the most that the rate can give
        share = lambda step: rate_share(step, steps, recipe.train)  # noqa: E731
    else:
        shares = shipped.shares(steps)
        share = lambda step: shares[step - 1]  # noqa: E731
    course = Course(steps, shipped.rate, share, shipped.weight_decay, shipped.clip, shipped.betas)
    with clock() as train:
        train_peft(model, batches, course, autocast=autocast)
    model.save_pretrained(folder)
    return {
        "cpu_load": load(),
        "cpu_train": train(),
        "steps": steps,
        "rate_used": shipped.rate,
        "source": shipped.source,
    }


def in_eights(shipped: Tool, tokens: list[int]) -> Tool:
    """The same steps in forward passes of 8 rows, not packed: what a CPU does fastest, for everybody.

    A step's loss is the mean over its tokens, and packed rows do not see each other: packing and the size of a pass decide
    how many rows make a step, and nothing else of what is learned.

    Args:
        tokens: of each row.
    """
    rows = shipped.rows * shipped.accumulation
    if shipped.packed:  # as many rows as fill the lines of a step
        rows = math.ceil(len(tokens) / math.ceil(sum(tokens) / (rows * shipped.packed)))
    return replace(shipped, rows=8, accumulation=math.ceil(rows / 8), packed=0)


def _config(method: str, shipped: Tool) -> peft.LoraConfig:
    if method in SWEPT:
        return SWEPT[method](shipped.rank, target_modules=list(SEVEN), task_type="CAUSAL_LM")
    return peft.LoraConfig(
        r=shipped.rank,
        lora_alpha=shipped.alpha,
        lora_dropout=shipped.dropout,
        target_modules=list(shipped.targets),
        task_type="CAUSAL_LM",
    )


# -- dynlora train ---------------------------------------------------------------------------------------------------


def _train_ours(job: Job, work: Path, folder: Path) -> Result:
    """`dynlora train` with nothing set but model and data, and the budget or rate that the job names."""
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(MODEL), "dtype": "bfloat16"},
        "dataset": {"train": [{"path": str(prepare(job.task, work) / "train.jsonl")}]},
        "seed": job.seed,
        "output_dir": str(folder),
    }
    if job.rank or job.method.startswith("dynlora-auto"):
        recipe["rank"] = {"budget": "auto" if job.method.startswith("dynlora-auto") else job.rank}
    if job.rate:
        recipe["train"] = {"learning_rate": job.rate}
    started: list[float] = []

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            started.append(time.process_time())

    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = api.train(recipe, set=job.method.split("@")[0].split()[1:], overwrite=True, progress=hear)
    ended = time.process_time()
    return _spent(begun, started[0], ended, found.summary) | _ours_found(found.summary)


def _spent(begun: float, started: float, ended: float, summary: dict[str, Any]) -> Result:
    """CPU seconds: all of the command, of them those that went for the rate alone, and the rest.

    A run tells its own time for the rate by the clock; the share is taken to be the same of CPU seconds.
    """
    total = ended - begun
    race = (ended - started) * (summary["rate_seconds"] or 0.0) / summary["seconds"]
    return {"cpu_total": round(total, 1), "cpu_race": round(race, 1), "cpu_train": round(total - race, 1)}


def _ours_found(summary: dict[str, Any]) -> Result:
    """What the run found out for itself, from its summary."""
    kept = (
        "rates_tried",
        "learning_rate_from",
        "loss_before",
        "loss_after",
        "steps",
        "average_rank",
        "components",
        "components_start",
    )
    return {"summary": {key: summary[key] for key in kept if key in summary}, "rate_used": summary.get("learning_rate")}


# -- both ------------------------------------------------------------------------------------------------------------


def recipe_for(job: Job, work: Path, part: str, shipped: Tool | None = None) -> Recipe:
    """The recipe by which rows are read: those of `part` are measured on."""
    folder, stub = prepare(job.task, work), work / "recipe.yaml"
    if not stub.exists():
        stub.write_text("model: none\ndataset: none.jsonl\n", encoding="utf-8")
    val = general(work) if part == "general" else folder / f"{part}.jsonl"
    settings: dict[str, Any] = {
        "model.name_or_path": MODEL,
        "model.dtype": "bfloat16",
        "dataset": f"{{train: [{{path: {folder / 'train.jsonl'}}}], val: [{{path: {val}}}]}}",
        "seed": job.seed,
    }
    if part == "general":
        settings["dataset.max_length"] = GENERAL_TOKENS
        settings["dataset"] = f"{{train: [{{path: {val}}}], val: [{{path: {val}}}]}}"
    if shipped:
        settings |= {
            "dataset.train_on": shipped.train_on,
            "train.micro_batch_size": shipped.rows,
            "train.gradient_accumulation_steps": shipped.accumulation,
        }
    return load_recipe(stub, [f"{key}={value}" for key, value in settings.items()])


def _read(recipe: Recipe) -> tuple[Data, Base]:
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    return data, read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))


def _measured(job: Job, work: Path, folder: Path, beat: float) -> Result:
    """The saved adapter, read back by PEFT: its losses, size, and what the model has forgotten."""
    _, base = _read(recipe_for(job, work, "val"))
    result: Result = {"general_before": _general_before(base, work)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base.model, folder)
    for key, part in (("loss", "val"), ("test", "test"), ("general", "general")):
        with clock() as seconds:
            result |= measure(model, _batches(recipe_for(job, work, part), base), key, autocast=autocast)
        if part == "val":
            result["cpu_val"] = seconds()
            if result["loss"] > beat:
                break
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return result | {
        "parameters": parameters,
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
    }


_BEFORE: dict[Path, float] = {}


def _general_before(base: Base, work: Path) -> float:
    """The loss of the bare model on general text; the same for all runs of a process."""
    if work not in _BEFORE:
        recipe = recipe_for(Job("e2e", "", 0, 0, 0), work, "general")
        _BEFORE[work] = measure(base.model, _batches(recipe, base), "general", autocast=autocast)["general"]
    return _BEFORE[work]


def _batches(recipe: Recipe, base: Base) -> Batches:
    return make_batches(recipe, read_data(recipe, base.files).val, base, shuffle=False)


@contextmanager
def clock() -> Iterator[Any]:
    """CPU seconds of the block, once it is over."""
    begun, ended = time.process_time(), 0.0
    yield lambda: round(ended - begun, 1)
    ended = time.process_time()


assert set(TOOLS).isdisjoint(SWEPT)
