"""Runs of one process, whose steps take turns, give bit for bit what each gives alone, and leave their models as before."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from tiny_run import make_recipe, train
from torch import nn

from dynlora_cli import plugins
from dynlora_cli.commands import train as train_command
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.errors import DynloraError
from dynlora_cli.execution.mode import Modes, plan
from dynlora_cli.kernels.linear_cross_entropy import ending
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.patched import Held, Patches, ignore_warnings
from dynlora_cli.models.quiet import quiet
from dynlora_cli.models.randomness import Randomness, seeded
from dynlora_cli.training.components import begin
from dynlora_cli.training.loop import held_out_loss
from dynlora_cli.training.setup import make_accelerator, make_run, read_base, read_data
from dynlora_cli.training.step import step

STEPS = 5  # components go after step 4
KINDS = {
    "fused": ("llama", []),
    "ordinary operations": ("llama", ["train.fused=false"]),
    "packed rows": ("llama", ["dataset.packing=true", "dataset.max_length=64"]),
    "dropout": ("gpt2", ["adapter.dropout=0.1"]),
    "bf16, checkpointing": ("llama", ["model.dtype=bfloat16", "train.gradient_checkpointing=true"]),
    "offloading": ("llama", ["train.gradient_checkpointing=offload"]),
    "a classifier": ("bert", ["train.fused=false"]),
    "all weights": ("gpt2", ["adapter.variant=full", "train.learning_rate=1e-4"]),
}
PATCHED = "forward", "_compiled_call_impl", "gradient_checkpointing", "_gradient_checkpointing_func", "fuse"


def own(model: nn.Module) -> dict[tuple[int, str], Any]:
    """What modules have of their own in the place of what their class gives them."""
    found = ((module, name, vars(module).get(name)) for module in model.modules() for name in PATCHED)
    return {(id(module), name): value for module, name, value in found if value is not None}


def hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def one_by_one(recipe: Recipe, found: dict[str, Any]) -> Iterator[None]:
    """A run that stops after every step for others to take theirs; what came of it is in `found`."""
    with quiet, plan(recipe.train) as modes:
        accelerator = make_accelerator(recipe, Path(recipe.output_dir), modes)
        files = BaseFiles.find(recipe.model)
        data = read_data(recipe, files)
        base = read_base(recipe, files, data, accelerator.device, Modes([], Patches()))
        before = own(base.model)
        modes.prepare(base.model)
        yield
        variant: Any = plugins.load("variants", recipe.adapter.variant)
        trained, start = begin(recipe, variant, base, data, accelerator)
        listening = hooks(base.model)
        modes.apply(base.model, trained)
        run = make_run(recipe, accelerator, base, data, trained, start, modes, save=lambda run: None)
        run.model.train()
        found["changed"] = own(run.model) != before
        losses = found["losses"] = []
        for number in range(STEPS):
            record = step(run, run.batches.step(*divmod(number, run.batches.steps_per_epoch)))
            losses.append((record["loss"], record["grad_norm"]))
            if number % 4 == 0:
                losses.append(held_out_loss(run))
            run.progress.step += 1
            yield
    found["weights"] = [parameter.detach().clone() for parameter in run.parameters]
    found["left"] = own(run.model).items() - before.items()
    found["gone"] = before.items() - own(run.model).items()
    found["hooks"] = hooks(run.model) == listening
    found["layers"] = [layer for layer in trained.layers.values() if layer.shared]
    found["ending"] = ending(run.model).fused, ending(run.model).judge


def take_turns(runs: list[Iterator[None]]) -> None:
    while runs:
        runs = [run for run in runs if next(run, "done") != "done"]


@pytest.mark.slow
def test_runs_that_take_turns_give_what_each_gives_alone(tmp_path):
    recipes = [
        make_recipe(tmp_path, *settings, kind=kind, out=str(number))
        for number, (kind, settings) in enumerate(KINDS.values())
    ]
    alone: list[dict[str, Any]] = [{} for _ in recipes]
    mixed: list[dict[str, Any]] = [{} for _ in recipes]
    for recipe, found in zip(recipes, alone, strict=True):
        torch.manual_seed(1)  # nobody's business
        take_turns([one_by_one(recipe, found)])
    assert alone[0]["changed"]
    state = torch.get_rng_state()
    take_turns([one_by_one(recipe, found) for recipe, found in zip(recipes, mixed, strict=True)])
    assert torch.equal(torch.get_rng_state(), state), "runs draw from numbers of their own"
    for kind, first, second in zip(KINDS, alone, mixed, strict=True):
        assert first["losses"] == second["losses"], kind
        for one, other in zip(first["weights"], second["weights"], strict=True):
            assert torch.equal(one, other), kind
        assert not second["left"], kind
        assert not second["gone"], kind
        assert second["hooks"], kind
        assert not second["layers"], kind
        assert second["ending"] == (True, None), kind


@pytest.mark.parametrize("fails", [False, True])
def test_a_whole_run_leaves_the_process_as_it_was(fails, tmp_path, monkeypatch):
    def state() -> list[Any]:
        theirs = transformers.logging
        return [
            torch.get_rng_state().tolist(),
            list(warnings.filters),
            (theirs.get_verbosity(), theirs.is_progress_bar_enabled()),
            dict(AcceleratorState._shared_state),
        ]

    models = []
    honest = train_command.fit

    def watched(run):
        models.append(run.model)
        assert any("forward" in vars(module) for module in run.model.modules())
        honest(run)
        if fails:
            raise DynloraError("no more")

    monkeypatch.setattr(train_command, "fit", watched)
    monkeypatch.setattr(quiet, "_holders", 0)  # `assembled` of other tests has not left it
    recipe = make_recipe(tmp_path, "train.gradient_checkpointing=true", "train.max_steps=2")
    before = state()
    try:
        train(recipe)
    except DynloraError:
        assert fails
    assert state() == before
    assert not [module for module in models[0].modules() if "forward" in vars(module)]
    assert not models[0].is_gradient_checkpointing


# -- the parts that make it so ---------------------------------------------------------------------------------------


def test_patches_are_undone_from_the_last_to_the_first():
    module, forward = nn.Linear(2, 2), nn.Linear.forward
    with suppress(ValueError), Patches() as patches:
        patches.set(module, "forward", len)
        patches.set(module, "forward", max)
        assert module.forward is max
        raise ValueError
    assert "forward" not in vars(module)
    assert module.forward.__func__ is forward


def test_a_setting_of_the_process_is_put_back_by_the_last_who_needs_it():
    def change():
        value.append(value[-1] + 1)
        return lambda: value.append(0)

    value = [0]
    held = Held(change)
    held.__enter__()
    held.__enter__()
    held.__exit__()
    assert value[-1] == 2
    held.__exit__()
    assert value[-1] == 0


def test_a_filter_of_warnings_takes_no_other_away():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        undo = ignore_warnings("of ours")
        warnings.filterwarnings("ignore", "of theirs")
        warnings.warn("of ours", stacklevel=1)
        undo()
        warnings.warn("of theirs", stacklevel=1)
        with pytest.raises(UserWarning):
            warnings.warn("of ours", stacklevel=1)


def test_a_filter_of_warnings_that_was_there_stands_where_it_stood():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "of both")
        warnings.filterwarnings("error", "of theirs")
        before = list(warnings.filters)
        undo = ignore_warnings("of both")
        assert list(warnings.filters) != before
        undo()
        assert list(warnings.filters) == before


def test_random_numbers_go_on_where_the_run_stopped():
    with seeded(5):
        wanted = torch.rand(4)
    random, before = Randomness(5, torch.device("cpu")), torch.get_rng_state()
    with random, random:
        first = torch.rand(2)
    torch.rand(7)
    with random:
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), wanted)
    torch.set_rng_state(before)
