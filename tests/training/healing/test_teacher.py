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

from dynlora_cli.data.mix import Span
from dynlora_cli.kernels import linear_cross_entropy
from dynlora_cli.kernels.linear_cross_entropy import ending
from dynlora_cli.tasks.distillation import MOST, Taught
from dynlora_cli.tasks.loss import logits_at_targets, summed_loss
from dynlora_cli.training.batches import make_batches
from dynlora_cli.training.healing.teacher import ask, learns_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return assembled(make_recipe(tmp_path_factory.mktemp("run"), "train.max_steps=4"))


@pytest.fixture
def moved(run):
    """The adapter before: the run's own, moved a little."""
    before = run.trained.values.detach().clone()
    with torch.no_grad():
        run.trained.values.add_(torch.randn(before.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    yield
    run.trained.values.data.copy_(before)


@pytest.fixture
def told(run, moved):
    return ask(run.model, _in_order(run.batches), run.accelerator.autocast)


def _in_order(batches):
    return [batch for number in range(batches.steps_per_epoch) for batch in batches.step(0, number)]


def gradient(run, loss):
    run.trained.zero_grad(run.optimizer)
    loss.backward()
    return run.trained.values.grad.clone()


@pytest.mark.parametrize("ending_of", ["whole", "chunks", "logits"])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_the_loss_and_its_gradient_are_the_formula(run, told, share, ending_of, monkeypatch):
    monkeypatch.setattr(ending(run.model), "fused", ending_of != "logits")
    if ending_of == "chunks":
        monkeypatch.setattr(linear_cross_entropy, "CHUNK", 1)
        monkeypatch.setattr(linear_cross_entropy, "LEAST_ROWS", 3)
        monkeypatch.setattr(linear_cross_entropy.chunks, "__defaults__", (3,))
    batch = run.batches.step(0, 0)[0]
    loss = Taught(run.recipe.train, told, share).loss(run.model, batch)
    found = gradient(run, loss)
    logits_NV, targets_N = logits_at_targets(run.model, batch)
    log_NV = logits_NV.double().log_softmax(-1)
    token_NM = torch.cat([told[row].token_nM for row in batch.rows]).long()
    value_NM = torch.cat([told[row].probability_nM for row in batch.rows]).double()
    own = F.nll_loss(log_NV, targets_N, reduction="sum")
    truth = (1 - share) * own - share * (value_NM * log_NV.gather(1, token_NM)).sum()
    exact = gradient(run, truth)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert (found - exact).norm() < 1e-4 * exact.norm()
    if not share:
        assert loss.item() == pytest.approx(summed_loss(run.model, batch).item(), rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_is_told_of_its_own_targets_in_whichever_batch_it_stands(run, told, moved, packing):
    """What was told of rows in one order is what the model says of them in another, packed or not."""
    recipe = run.recipe.model_copy(update={"dataset": run.recipe.dataset.model_copy(update={"packing": packing})})
    batches = make_batches(recipe, list(reversed(run.data.train)), run.base, shuffle=False)
    for batch in _in_order(batches):
        with torch.no_grad():
            logits_NV, _ = logits_at_targets(run.model, batch)
        value_NM = logits_NV.softmax(-1).gather(1, torch.cat([told[row].token_nM for row in batch.rows]).long())
        expected = torch.cat([told[row].probability_nM for row in batch.rows]).float()
        torch.testing.assert_close(value_NM, expected, atol=1e-5, rtol=1e-3)


def test_what_is_told_is_the_likeliest_of_the_vocabulary(run, told):
    rows = [row for batch in run.batches.step(0, 0) for row in batch.rows]
    assert all(row in told for row in rows)
    some = told[rows[0]]
    assert some.token_nM.shape[1] == MOST
    assert bool((some.probability_nM.float().sum(-1) <= 1 + 1e-3).all())  # each is rounded to 11 bits
    assert bool((some.probability_nM.diff(dim=-1) <= 0).all())


def test_only_rows_that_come_up_are_looked_at(run):
    def looked_at(batches, steps):
        return {example.row for example in batches.shown(steps)}

    trained = {row for number in range(2) for batch in run.batches.step(0, number) for row in batch.rows}
    assert looked_at(run.batches, 2) == trained
    assert len(trained) == 8 < len(run.data.train)
    half = [Span("rows", len(run.data.train), len(run.data.train) // 2)]  # dataset.train: weight 0.5
    weighted = make_batches(run.recipe, run.data.train, run.base, shuffle=True, spans=half)
    once, twice = (looked_at(weighted, passes * weighted.steps_per_epoch) for passes in (1, 2))
    assert 2 * len(once) == len(twice) == len(run.data.train)


def test_only_what_is_learned_token_by_token_is_taught():
    assert learns_tokens("causal-lm")
    assert learns_tokens("seq2seq-lm")
    assert not learns_tokens("causal-lm", "dpo")
    assert not learns_tokens("sequence-classification")
    assert not learns_tokens("reranker")
    assert not learns_tokens("embedding")


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
    common = ("prune", "--adapter", plain, "--budget", "0.2", "--heal", "60", "--data", rows, *base)
    apart = {}
    for name, more in {"taught": ("--teacher", "1"), "alone": ()}.items():
        answer = dynlora(*common, *more, "--out", tmp_path / name)
        assert answer.code == 0, answer.err
        assert ("under the adapter before the cut, 100%" in answer.err + answer.out) == (name == "taught")
        apart[name] = _distance(assembled(recipe), source, tmp_path / name)
    assert apart["taught"] < apart["alone"]


def _distance(run, one: Path, other: Path) -> float:
    """Mean KL of what two adapters say of the run's held-out rows, by PEFT."""
    batches, said = _in_order(run.val_batches), []
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
