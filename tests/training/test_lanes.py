"""A pass for the rows of several runs: each run gets the gradient that it would get alone, and nothing of the others."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from numeric import rounding
from tiny_run import assembled, make_recipe

from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.load import load_base
from dynlora_cli.training.lanes import batch as lanes_batch
from dynlora_cli.training.lanes.base import SharedBase, refuse_dependent_rows
from dynlora_cli.training.lanes.batch import joined, together
from dynlora_cli.training.lanes.joint import Asked, Joint
from dynlora_cli.training.step import backward

# Roundings on the way to a gradient, as in test_loop.py.
ROUNDING = rounding(torch.float32, 2 * round((2 * 2 * 2 * (32 + 64)) ** 0.5))
RUNS = (
    ["rank.init=8"],
    ["rank.init=3", "rank.budget=2", "adapter.alpha=5", "train.micro_batch_size=3", "seed=1"],
    ["adapter.target_modules=[q_proj, up_proj]", "seed=2"],
)


@pytest.fixture(autouse=True)
def all_in_one_pass(monkeypatch):
    """However different their widths are."""
    monkeypatch.setattr(lanes_batch, "MOST_PADDED", 100.0)


def plain(recipe):
    files = BaseFiles.find(recipe.model)
    cpu = torch.device("cpu")
    return load_base(recipe.model, files, files.tokenizer, device=cpu, labels=None, seed=0).model


def started(folder, *settings, runs=RUNS):
    """The joint model of some runs, and what each of them asks at its first step, the n-th run at its n-th step."""
    recipes = [make_recipe(folder, *own, *settings, out=str(place)) for place, own in enumerate(runs)]
    found = dict(enumerate(map(assembled, recipes)))
    joint = Joint(plain(recipes[0]), found)
    return joint, [Asked(lane, run, run.batches.step(0, lane)[0], 7.0 + lane) for lane, run in found.items()]


def gradients(asked):
    taken = [each.run.trained.values.grad.clone() for each in asked]
    for each in asked:
        each.run.trained.values.grad.zero_()
        each.run.random.restart(0)
    return taken


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["dataset.packing=true"],
        ["train.gradient_checkpointing=true"],
        ["train.fused=false"],
        ["adapter.variant=dora"],
        ["adapter.variant=sora"],
        ["adapter.dropout=0.3"],
    ],
    ids=str,
)
def test_a_joint_pass_gives_each_run_its_own_gradient(tmp_path, settings):
    joint, asked = started(tmp_path, *settings)
    gradients(asked)
    losses = joint.answer(asked)
    together_ = gradients(asked)
    for each, loss, found in zip(asked, losses, together_, strict=True):
        with each.run.random.exchanged():
            alone = backward(each.run, each.batch, each.supervised)
        assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
        assert apart(found, each.run.trained.values.grad) < ROUNDING
        assert not each.run.trained.graphs, "components may be removed after the pass"


def test_what_diverges_in_one_run_reaches_no_other(tmp_path):
    joint, asked = started(tmp_path)
    joint.answer(asked)
    before = gradients(asked)
    with torch.no_grad():
        asked[1].run.trained.values.fill_(math.inf)
    losses = joint.answer(asked)
    after = gradients(asked)
    assert [math.isfinite(loss) for loss in losses] == [True, False, True]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])


def test_a_run_that_is_alone_computes_as_it_does_alone(tmp_path):
    joint, asked = started(tmp_path)
    gradients(asked)
    (loss,) = joint.answer(asked[:1])
    (found,) = gradients(asked[:1])
    alone = backward(asked[0].run, asked[0].batch, asked[0].supervised)
    assert torch.equal(loss, alone)
    assert torch.equal(found, asked[0].run.trained.values.grad)


def test_components_may_go_between_passes(tmp_path):
    joint, asked = started(tmp_path)
    pool = asked[0].run.trained
    values_P = torch.randn(2 * sum(map(pool.cost, pool.layers)), generator=torch.Generator().manual_seed(0)) / 20
    pool.adopt(values_P, dict.fromkeys(pool.layers, 2))
    gradients(asked)
    joint.answer(asked)
    found = gradients(asked)[0]
    backward(asked[0].run, asked[0].batch, asked[0].supervised)
    assert apart(found, pool.values.grad) < ROUNDING


def test_a_fault_of_the_pass_is_told_to_each_run_of_it(tmp_path):
    joint, asked = started(tmp_path)
    wrong = replace(
        asked[0].batch, inputs={**asked[0].batch.inputs, "input_ids": asked[0].batch.inputs["input_ids"] + 9999}
    )
    faults = joint.answer([asked[0]._replace(batch=wrong), *asked[1:]])
    assert all(isinstance(fault, IndexError) for fault in faults)


def test_rows_of_no_known_run_are_refused(tmp_path):
    joint, asked = started(tmp_path)
    name = next(iter(asked[0].run.trained.layers))
    with joint._placed(asked), pytest.raises(DynloraError, match="whose they are is not known"):
        joint.model.get_submodule(name)(torch.rand(3, 32))


def test_batches_of_far_different_widths_go_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes_batch, "MOST_PADDED", 1.5)
    batches = assembled(make_recipe(tmp_path, "train.micro_batch_size=1")).batches
    by_width = sorted((batches._batch([((row,), 0)]) for row in range(30)), key=lambda batch: batch.tokens)
    short, long = by_width[0], by_width[-1]
    assert long.tokens > 3 * short.tokens
    assert together([short, long, short]) == [[1], [0, 2]]
    assert together([long, *[long] * 20, short]) == [list(range(22))], "where it costs next to nothing"


def test_packed_and_padded_batches_go_apart(tmp_path):
    padded = assembled(make_recipe(tmp_path)).batches.step(0, 0)[0]
    packed = assembled(make_recipe(tmp_path, "dataset.packing=true")).batches.step(0, 0)[0]
    assert sorted(together([padded, packed, padded])) == [[0, 2], [1]]


def test_a_joined_batch_holds_every_target_once(tmp_path):
    run = assembled(make_recipe(tmp_path))
    parts = [run.batches.step(0, index)[0] for index in range(3)]
    whole = joined(parts)
    targets = torch.cat([part.labels.flatten()[part.places] for part in parts])
    assert torch.equal(whole.labels.flatten()[whole.places], targets)
    assert (whole.tokens, whole.supervised) == (sum(p.tokens for p in parts), sum(p.supervised for p in parts))


def test_the_base_is_loaded_once_and_its_weights_are_shared(tmp_path):
    recipe = make_recipe(tmp_path)
    files, loads = BaseFiles.find(recipe.model), []

    def load(*given, **how):
        loads.append(how["seed"])
        return load_base(*given, **how)

    shared = SharedBase(load)
    how = {"device": torch.device("cpu"), "labels": None}
    one, other = (shared.load(recipe.model, files, files.tokenizer, **how, seed=seed) for seed in (0, 1))
    assert loads == [0]
    assert one.model is not other.model
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(mine is yours for mine, yours in pairs)
    mine = one.model.get_submodule("model.layers.0")
    assert mine is not other.model.get_submodule("model.layers.0")


@pytest.mark.parametrize(("key", "value"), [("attention_dropout", 0.1), ("rope_parameters", {"rope_type": "dynamic"})])
def test_models_whose_rows_depend_on_each_other_are_refused(tmp_path, key, value):
    model = plain(make_recipe(tmp_path))
    refuse_dependent_rows(model)
    setattr(model.config, key, value)
    with pytest.raises(UsageError, match="do not share passes"):
        refuse_dependent_rows(model)


def test_what_has_ended_is_forgotten(tmp_path):
    joint, asked = started(tmp_path)
    joint.keep({0, 2})
    assert all(1 not in layer.layers for layer in joint.layers)
    assert all(isinstance(loss, torch.Tensor) for loss in joint.answer([asked[0], asked[2]]))
