"""Healing under the adapter before the cut: the loss is what it says it is, and it is nearer to that adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora
from peft import PeftModel
from tiny_run import assembled, make_recipe, train, write_rows
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dynlora_cli.kernels.linear_cross_entropy import ending
from dynlora_cli.tasks.loss import logits_at_targets, summed_loss
from dynlora_cli.training.healing import teacher
from dynlora_cli.training.healing.teacher import Taught, ask, can_be_taught


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return assembled(make_recipe(tmp_path_factory.mktemp("run"), "train.max_steps=4"))


@pytest.fixture(scope="module")
def told(run):
    """What another adapter says: the run's own, moved a little."""
    random = torch.Generator().manual_seed(0)
    before = run.trained.values.detach().clone()
    with torch.no_grad():
        run.trained.values.add_(torch.randn(before.shape, generator=random), alpha=0.1)
        batches = [batch for number in range(run.batches.steps_per_epoch) for batch in run.batches.step(0, number)]
        found = ask(run.model, batches, run.accelerator.autocast)
        run.trained.values.copy_(before)
    return found


def gradient(run, loss):
    run.trained.zero_grad(run.optimizer)
    loss.backward()
    return run.trained.values.grad.clone()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_the_loss_and_its_gradient_are_the_formula(run, told, share, fused, monkeypatch):
    monkeypatch.setattr(ending(run.model), "fused", fused)
    batch = run.batches.step(0, 0)[0]
    loss = Taught(run.recipe.train, told, share).loss(run.model, batch)
    found = gradient(run, loss)
    logits_NV, targets_N = logits_at_targets(run.model, batch)
    log_NV = logits_NV.double().log_softmax(-1)
    token_NM = torch.cat([told[row].token_NM for row in batch.rows])
    value_NM = torch.cat([told[row].probability_NM for row in batch.rows]).double()
    own = F.nll_loss(log_NV, targets_N, reduction="sum")
    truth = (1 - share) * own - share * (value_NM * log_NV.gather(1, token_NM)).sum()
    exact = gradient(run, truth)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (found - exact).norm() < 1e-4 * exact.norm()
    if not share:
        assert loss.item() == pytest.approx(summed_loss(run.model, batch).item(), rel=1e-6)


def test_what_is_told_is_the_likeliest_of_the_vocabulary(run, told):
    assert {row for batch in run.batches.step(0, 0) for row in batch.rows} <= told.keys()
    some = next(iter(told.values()))
    assert some.token_NM.shape[1] == teacher.MOST
    assert bool((some.probability_NM.sum(-1) <= 1 + 1e-5).all())
    assert bool((some.probability_NM.diff(dim=-1) <= 0).all())


def test_rows_that_cannot_be_told_apart_are_not_taught(run):
    rows = run.data.train
    assert can_be_taught(run.task, rows)
    assert not can_be_taught(run.task, [rows[0], rows[0]])


@pytest.mark.slow
def test_a_cut_adapter_heals_nearer_to_what_it_was(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path, "train.learning_rate=5e-3", "rank.budget=6", "train.max_steps=40")
    train(recipe)
    source = Path(recipe.output_dir)
    plain = tmp_path / "plain"  # as somebody else's: no record of its run
    assert dynlora("export", "--adapter", source, "--to", "peft", "--out", plain).code == 0
    (plain / "dynlora.json").unlink(missing_ok=True)
    rows = write_rows(tmp_path / "few.jsonl")
    base = ("--base", recipe.model.name_or_path) if recipe.model.name_or_path else ()
    common = ("prune", "--adapter", plain, "--budget", "0.2", "--heal", "12", "--data", rows, *base)
    apart = {}
    for name, more in {"taught": (), "alone": ("--teacher", "0")}.items():
        answer = dynlora(*common, *more, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        assert ("under the adapter before the cut, 70%" in answer.err + answer.out) == (name == "taught")
        apart[name] = _distance(assembled(recipe), source, tmp_path / name)
    assert apart["taught"] < apart["alone"]


def _distance(run, one: Path, other: Path) -> float:
    """Mean KL of what two adapters say of the run's held-out rows, by PEFT."""
    batches = [b for number in range(run.val_batches.steps_per_epoch) for b in run.val_batches.step(0, number)]
    said = []
    for folder in (one, other):
        base = AutoModelForCausalLM.from_pretrained(run.recipe.model.name_or_path)
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            said.append(torch.cat([logits_at_targets(model, batch)[0].log_softmax(-1) for batch in batches]))
    return F.kl_div(said[1], said[0], log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--teacher", "0.5"), "--teacher is for healing"),
        (("--heal", "2", "--teacher", "1.5"), "--teacher"),
    ],
)
def test_a_teacher_of_nothing_is_refused(more, problem, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("prune", "--adapter", tmp_path, "--budget", "0.5", *more, "--out", tmp_path / "out")
    assert answer.code == 2
    assert problem in answer.err
