"""The methods of quality.py: one run of each, over the same batches with the same loop.

A rival is stock PEFT on the same base; its loop (quality_loop.py) is dynlora's without rank control: the same batches in
the same order, token-normalised loss, clipping, schedule and AdamW. dynlora's own runs go through `loop.fit`.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
from quality_loop import Course, measure, train_peft
from quality_tasks import base_name, find_task, model_path, prepare
from torch import nn
from transformers import PreTrainedModel

from dynlora_cli.config.load import load_recipe
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.load import Data
from dynlora_cli.errors import MeasureError
from dynlora_cli.execution.mode import plan
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start
from dynlora_cli.lora.variants import lora
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.load import Base
from dynlora_cli.training import loop
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.components import attach, plan_ranks
from dynlora_cli.training.lr_schedule import rate_share
from dynlora_cli.training.setup import make_accelerator, make_run, read_base, read_data

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training run: everything that its result depends on."""

    task: str
    method: str
    budget: int
    rate: float
    seed: int

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        return (self.task, self.method, self.budget, f"{self.rate:.3e}", self.seed)


@dataclass
class Ground:
    """What the runs of a task share with one seed: recipe, rows, base, and the batches of both."""

    recipe: Recipe
    data: Data
    base: Base
    train: Batches
    val: Batches
    test: Batches
    earlier: list[Result]


def run(job: Job, work: Path, earlier: list[Result]) -> Result:
    """Train once; the held-out loss (val and test), parameters, seconds of training and the ranks found.

    Args:
        earlier: lines of quality.jsonl; where a method uses the ranks that another one found, they are there.
    """
    torch.manual_seed(job.seed)
    ground = lay_ground(job, work, earlier)
    try:
        return METHODS[job.method.split()[0]](job, ground)
    except MeasureError:  # diverged; a learning rate too far
        return {"loss": math.inf}


def lay_ground(job: Job, work: Path, earlier: list[Result]) -> Ground:
    recipe = recipe_for(job, work, "val", settings_of(job.method))
    # An open budget holds rows out of its training rows.
    files = BaseFiles.find(recipe.model)
    data = (
        read_data(recipe, files) if job.method.split()[0] == "dynlora-auto" else _rows(base_name(job.task), work, "val")
    )
    base = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))
    testing = _rows(base_name(job.task), work, "test").val
    batches = [make_batches(recipe, rows, base, shuffle=rows is data.train) for rows in (data.train, data.val, testing)]
    return Ground(recipe, data, base, *batches, earlier)


def recipe_for(job: Job, work: Path, part: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a task, as a user would write it."""
    task, folder = find_task(job.task), prepare(job.task, work)
    path = work / "recipe.yaml"
    if not path.exists():
        path.write_text("model: builtin:tiny\ndataset: none.jsonl\n", encoding="utf-8")
    settings = {
        "model.name_or_path": model_path(task.model),
        "model.task": "sequence-classification" if task.classify else "causal-lm",
        "dataset": f"{{train: [{{path: {folder / 'train.jsonl'}}}], val: [{{path: {folder / f'{part}.jsonl'}}}]}}",
        "dataset.max_length": task.max_length,
        "rank.budget": job.budget,
        "train.max_steps": task.steps,
        "train.micro_batch_size": task.batch,
        "train.learning_rate": f"{job.rate:.6f}" if job.rate else "auto",
        "train.save_steps": 1_000_000,
        "seed": job.seed,
    }
    return load_recipe(path, [f"{key}={value}" for key, value in settings.items()] + list(overrides))


@lru_cache(maxsize=4)
def _rows(task: str, work: Path, part: str) -> Data:
    recipe = recipe_for(Job(task, "lora", 1, 1e-3, 0), work, part)
    return read_data(recipe, BaseFiles.find(recipe.model))


# -- dynlora ---------------------------------------------------------------------------------------------------------


def dynlora(job: Job, ground: Ground) -> Result:  # noqa: ARG001 - one signature for all methods
    """A run of ours, as the recipe says."""
    recipe, base = ground.recipe, ground.base
    pool, start = attach(base, recipe.adapter, recipe.rank, recipe.seed)
    assert pool is not None and start is not None  # noqa: PT018
    return _fit(ground, pool, start)


def dora_size(job: Job, ground: Ground) -> Result:
    """A run of ours with the parameters of DoRA, which has one magnitude per output more than LoRA of the same rank."""
    targets, start = plan_ranks(ground.recipe.adapter, ground.recipe.rank, ground.base)
    size = start.budget + sum(linear_shape(module)[1] for module in targets.values())
    rank = ground.recipe.rank.model_copy(update={"budget": f"{size / 1000}k"})
    return dynlora(job, replace(ground, recipe=ground.recipe.model_copy(update={"rank": rank})))


def fixed_map(job: Job, ground: Ground, *, shuffled: bool = False) -> Result:
    """The ranks that dynlora found with this seed, from the first step to the last.

    Args:
        shuffled: dealt out anew among layers of the same shape, so that the size stays.
    """
    targets, start = plan_ranks(ground.recipe.adapter, ground.recipe.rank, ground.base)
    wanted = (job.task, "dynlora", job.budget, job.seed)
    found = [r for r in ground.earlier if (r["task"], r["method"], r["budget"], r["seed"]) == wanted and "ranks" in r]
    if not found:
        raise SystemExit(f"no run of {wanted} in quality.jsonl: run dynlora first")
    counts: dict[str, int] = dict(min(found, key=lambda record: record["loss"])["ranks"])
    if shuffled:
        draw, groups = random.Random(job.seed), defaultdict(list)
        for name, module in targets.items():
            groups[linear_shape(module)].append(name)
        for names in groups.values():
            counts |= zip(names, draw.sample([counts[name] for name in names], len(names)), strict=True)
    size = sum(counts[name] * sum(linear_shape(module)) for name, module in targets.items())
    fixed = Start(counts, size, size, start.average_rank)
    pool = lora.attach(ground.base.model, targets, fixed, ground.recipe.adapter, ground.recipe.seed)
    return _fit(ground, pool, fixed)


def _fit(ground: Ground, pool: Pool, start: Start) -> Result:
    recipe, unmeasured = ground.recipe, replace(ground.data, val=[])
    modes = plan(recipe.train)
    accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
    modes.apply(ground.base.model, pool)
    training = make_run(recipe, accelerator, ground.base, unmeasured, pool, start, modes, save=lambda _: None)
    training.control.loss_now = None
    started = time.perf_counter()
    loop.fit(training)
    result = _result(ground.base.model, ground, pool.parameters, time.perf_counter() - started)
    return result | {"ranks": dict(pool.counts), "rate_used": training.progress.learning_rate}


# -- stock PEFT ------------------------------------------------------------------------------------------------------


def rival(job: Job, ground: Ground, config: Callable[..., peft.PeftConfig], times: int = 1) -> Result:
    """A method of stock PEFT at `times` the budget's rank."""
    model, targets = _wrap(job, ground, config, times * job.budget)
    started = time.perf_counter()
    _train_rival(model, ground, job.budget * sum(sum(linear_shape(module)) for module in targets.values()))
    seconds = time.perf_counter() - started
    return _result(model, ground, _parameters(model, ground.base.head), seconds)


def compressed(job: Job, ground: Ground) -> Result:
    """LoRA of 4x the rank, cut by PEFT's own `convert_to_lora` to the budget or just below it."""
    model, targets = _wrap(job, ground, lora_config, 4 * job.budget)
    started = time.perf_counter()
    _train_rival(model, ground)
    per_rank = sum(sum(linear_shape(module)) for module in targets.values())
    low, high, found = 0.02, 1.0, None
    for _ in range(7):  # the largest share of energy that fits
        share = (low + high) / 2
        cut_config, state = peft.convert_to_lora(model, rank=share)
        size = sum(tensor.numel() for tensor in state.values())
        if size <= job.budget * per_rank:
            low, found = share, (cut_config, state, size)
        else:
            high = share
    seconds = time.perf_counter() - started
    if found is None:
        return {"loss": math.inf}
    cut_config, state, size = found
    plain = model.unload()
    again = peft.get_peft_model(plain, cut_config)
    peft.set_peft_model_state_dict(again, state)
    return _result(again, ground, size, seconds)


def lora_config(rank: int, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, **more)


def rslora_config(rank: int, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=16, use_rslora=True, **more)


def eva_config(rank: int, **more: Any) -> peft.LoraConfig:
    return lora_config(rank, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0), **more)


def adalora_config(rank: int, *, steps: int, **more: Any) -> peft.AdaLoraConfig:
    """Scale-matched: PEFT divides by the rank at the start, so alpha is twice that; the paper's 1.5x at the start."""
    start = math.ceil(1.5 * rank)
    return peft.AdaLoraConfig(
        init_r=start,
        target_r=rank,
        lora_alpha=2 * start,
        tinit=steps // 10,
        tfinal=steps // 2,
        deltaT=max(1, steps // 50),
        total_step=steps,
        **more,
    )


def _wrap(job: Job, ground: Ground, config: Callable[..., Any], rank: int) -> tuple[Any, dict[str, nn.Module]]:
    """The base in PEFT's clothes; a classifier's head trains too."""
    model, head = ground.base.model, ground.base.head
    targets, _ = plan_ranks(ground.recipe.adapter, ground.recipe.rank, ground.base)
    more: dict[str, Any] = {"target_modules": list(targets)}
    if "steps" in config.__annotations__:
        more["steps"] = find_task(job.task).steps
    torch.manual_seed(job.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config(rank, **more))
        if config is eva_config:
            _eva_start(wrapped, ground)
    for name, parameter in wrapped.named_parameters():
        if head and f".{head}." in name:
            parameter.requires_grad_(True)
    return wrapped, targets


def _eva_start(model: Any, ground: Ground) -> None:
    """EVA's principal directions, from training rows in training order."""
    batches = ground.train
    # Labels tell PEFT which tokens count; those of a classifier stand for whole rows.
    labelled = ground.base.head is None
    loader = [
        {**batch.inputs, "labels": batch.labels} if labelled else batch.inputs
        for index in range(min(50, batches.steps_per_epoch))
        for batch in batches.step(0, index)
    ]
    peft.initialize_lora_eva_weights(
        model,
        loader,
        forward_fn=lambda m, inputs: m(**{k: v for k, v in inputs.items() if k != "labels"}),
        prepare_layer_inputs_fn=_at_tokens,
        show_progress_bar=False,
    )


def _at_tokens(layer_input: Any, tokens_N2: torch.Tensor, _name: str) -> torch.Tensor:
    """A layer's inputs at the tokens that count, [N, I]; a pooler has one input per row, and all of them count."""
    x = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    return x[tokens_N2.T.unbind()] if x.ndim == 3 else x.contiguous()


def _train_rival(model: Any, ground: Ground, budget: int = 0) -> None:
    """The loop with the recipe's settings; `budget` is the number of parameters that AdaLoRA may keep."""
    options = ground.recipe.train
    steps, rate = options.max_steps, options.learning_rate
    assert steps is not None
    assert rate != "auto"
    course = Course(
        steps, rate, lambda step: rate_share(step, steps, options), options.weight_decay, options.max_grad_norm
    )
    if not isinstance(model.peft_config["default"], peft.AdaLoraConfig):
        train_peft(model, ground.train, course)
        return

    def allocate(done: int) -> None:
        model.base_model.rankallocator.target_bgt = _components_for(model, budget)
        model.base_model.update_and_allocate(done)

    train_peft(model, ground.train, course, penalty=lambda: _orthogonality(model), stepped=allocate)


def _components_for(model: Any, budget: int) -> int:
    """How many components AdaLoRA may keep, so that they hold `budget` numbers.

    It counts components, whatever they cost, and prefers the expensive ones: left alone it ends with a quarter more
    parameters than LoRA of the same average rank.
    """
    alive = parameters = 0
    for module in model.modules():
        if hasattr(module, "lora_E"):
            here = int((module.lora_E["default"] != 0).sum())
            alive, parameters = alive + here, parameters + here * (module.in_features + module.out_features + 1)
    return budget * alive // parameters if alive else 1


def _orthogonality(model: Any) -> torch.Tensor:
    """AdaLoRA's penalty, which PEFT adds only where the model computes its loss itself."""
    norms = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            norms.append(torch.linalg.norm(gram - torch.eye(len(gram))))
    weight: float = model.peft_config["default"].orth_reg_weight
    return weight * torch.stack(norms).mean()


def _parameters(model: Any, head: str | None) -> int:
    """Numbers of the adapter that are alive; those that AdaLoRA masked do not count."""
    config = model.peft_config["default"]
    pattern = getattr(config, "rank_pattern", None)
    if isinstance(config, peft.AdaLoraConfig) and pattern:
        total = 0
        for name, module in model.named_modules():
            if hasattr(module, "lora_E"):
                key = next(k for k in pattern if k.startswith(name.removeprefix("base_model.model.") + ".lora_E"))
                total += sum(pattern[key]) * (module.in_features + module.out_features + 1)
        return total
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not (head and f".{head}." in n))


def _result(model: PreTrainedModel, ground: Ground, parameters: int, seconds: float) -> Result:
    result: Result = {"parameters": parameters, "seconds": round(seconds, 2)}
    for key, batches in (("loss", ground.val), ("test", ground.test)):
        result |= measure(model, batches, key, classify=ground.base.head is not None)
    return result


def settings_of(method: str) -> tuple[str, ...]:
    """What a method sets in the recipe: `dynlora pruning.policy=random rank.init=8`."""
    name, *settings = method.split()
    return (*settings, "rank.budget=auto") if name == "dynlora-auto" else tuple(settings)


METHODS: dict[str, Callable[[Job, Ground], Result]] = {
    "lora": partial(rival, config=lora_config),
    "rslora": partial(rival, config=rslora_config),
    "dora": partial(rival, config=partial(lora_config, use_dora=True)),
    "adalora": partial(rival, config=adalora_config),
    "eva": partial(rival, config=eva_config),
    "lora-4x": partial(rival, config=lora_config, times=4),
    "lora-4x-cut": compressed,
    "dynlora": dynlora,
    "dynlora-auto-rate": dynlora,
    "dynlora-auto": dynlora,
    "dynlora-dora-size": dora_size,
    "dynlora-map": fixed_map,
    "dynlora-map-shuffled": partial(fixed_map, shuffled=True),
}
