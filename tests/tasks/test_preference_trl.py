"""Losses and gradients of dpo, orpo and kto are those of TRL's own trainers, on the same batch and the same numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trl_twin import TEXTS, batch_of, of_trl, pair_batch, twin

from dynlora_cli import plugins
from dynlora_cli.config.options import options
from dynlora_cli.lora.layer import switched_off

pytestmark = pytest.mark.slow

LOSSES = {
    "sigmoid": 0.0,
    "hinge": 0.0,
    "ipo": 0.0,
    "robust": 0.2,
    "exo_pair": 0.01,
    "nca_pair": 0.0,
    "bco_pair": 0.0,
    "sppo_hard": 0.0,
    "apo_zero": 0.0,
    "apo_down": 0.0,
    "discopop": 0.0,
    "sigmoid_norm": 0.0,
}


def objective(name, **given):
    values = {key: option.default for key, option in options("objectives", name).items()} | given
    return plugins.load("objectives", name).Objective(SimpleNamespace(**values))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory):
    return twin(tmp_path_factory.mktemp("dpo"), "dpo")


@pytest.fixture(scope="module")
def kto(tmp_path_factory):
    return twin(tmp_path_factory.mktemp("kto"), "kto")


@pytest.fixture(scope="module")
def orpo(tmp_path_factory):
    return twin(tmp_path_factory.mktemp("orpo"), "orpo")


def ours(one, pair, batch):
    """The mean over the rows of a batch; the reference is the same model with its components off."""
    if one.needs_reference:
        with switched_off(pair.pool.layers.values()):
            one.remember(pair.model, [batch])
    return one.loss(pair.model, batch) / len(batch.rows)


def assert_same(pairs):
    """Of the largest number of each tensor: TRL's log-probabilities are fp32, whatever the model is."""
    for found, wanted in pairs:
        largest = wanted.abs().max().item()
        assert largest > 0, "a test of zeros would tell nothing"
        assert (found - wanted).abs().max().item() <= 1e-5 * largest


def metrics(trainer):
    return {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


@pytest.mark.parametrize("kind", LOSSES)
def test_dpo(dpo, kind):
    trainer, batch = dpo.trainer, pair_batch(dpo.tokenizer)
    beta = 0.02 if kind == "discopop" else 0.4  # which divides by 0.05, and TRL's roundings are 20 times what they were
    trainer.loss_types, trainer.label_smoothing, trainer.beta = [kind], LOSSES[kind], beta
    one = objective("dpo", loss_type=kind, label_smoothing=LOSSES[kind], beta=beta)
    assert_same(
        dpo.both_losses(ours(one, dpo, batch), trainer._compute_loss(trainer.model, of_trl(batch), False)),
    )
    theirs, found = metrics(trainer), one.take(lambda *numbers: list(numbers))
    assert found["accuracy"] == pytest.approx(theirs["rewards/accuracies"])
    assert found["margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-5)
    for side in ("chosen", "rejected"):
        assert found[f"reward_{side}"] == pytest.approx(theirs[f"rewards/{side}"], rel=1e-5)
        assert found[f"logp_{side}"] == pytest.approx(theirs[f"logps/{side}"], rel=1e-5)


def test_the_list_of_losses_is_whole():
    module = plugins.load("objectives", "dpo")
    assert set(module.LOSSES) == set(LOSSES) == set(options("objectives", "dpo")["loss_type"].choices)


def test_dpo_beside_supervised_fine_tuning(dpo):
    trainer, batch = dpo.trainer, pair_batch(dpo.tokenizer)
    trainer.loss_types, trainer.loss_weights, trainer.label_smoothing, trainer.beta = (
        ["sigmoid", "sft"],
        [1, 0.7],
        0,
        0.1,
    )
    try:
        theirs = trainer._compute_loss(trainer.model, of_trl(batch), False)
    finally:
        trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    assert_same(dpo.both_losses(ours(objective("dpo", sft_weight=0.7), dpo, batch), theirs))


def test_sigmoid_with_label_smoothing(dpo):
    """TRL has it no more with `sigmoid`; of a single pair its `aot`, which sorts pairs first, is the same."""
    trainer, batch = dpo.trainer, pair_batch(dpo.tokenizer, TEXTS[:1])
    trainer.loss_types, trainer.label_smoothing, trainer.beta = ["aot"], 0.3, 0.4
    one = objective("dpo", label_smoothing=0.3, beta=0.4)
    assert_same(dpo.both_losses(ours(one, dpo, batch), trainer._compute_loss(trainer.model, of_trl(batch), False)))


@pytest.mark.parametrize("kind", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [[True, False, True, False], [False] * 4])
def test_kto(kto, kind, labels):
    trainer = kto.trainer
    rows = [(text[0], text[side]) for text in TEXTS[:2] for side in (1, 2)]
    others = [(prompt, rows[number - 1][1]) for number, (prompt, _) in enumerate(rows)]
    batch = batch_of(kto.tokenizer, rows + others, rows=4, desirable_B=torch.tensor(labels))
    trainer.loss_type, trainer.calculate_KL, trainer.beta = kind, kind == "kto", 0.3
    trainer.desirable_weight, trainer.undesirable_weight = 1.5, 0.8
    both = of_trl(batch)
    given = {name: tensor[:4] for name, tensor in both.items()} | {f"KL_{name}": t[4:] for name, t in both.items()}
    one = objective("kto", loss_type=kind, beta=0.3, desirable_weight=1.5, undesirable_weight=0.8)
    mine = ours(one, kto, batch)
    assert_same(
        kto.both_losses(mine, trainer._compute_loss(trainer.model, {**given, "label": torch.tensor(labels)}, False))
    )
    theirs, found = metrics(trainer), one.take(lambda *numbers: list(numbers))
    assert found["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    assert found["reward_rejected"] == pytest.approx(theirs["rewards/rejected"], rel=1e-5)
    assert ("reward_chosen" in found) == any(labels)
    if any(labels):
        assert found["margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-5)


def test_the_kl_divergence_of_kto_is_not_always_zero(kto):
    """Else the test above would say nothing of it."""
    rows = [(prompt, answer) for prompt, answer, _ in TEXTS[:2]]
    for swap in (1, -1):
        with torch.no_grad():
            kto.pool.values.mul_(swap)
        batch = batch_of(kto.tokenizer, rows + rows[::-1], rows=2, desirable_B=torch.tensor([True, False]))
        one = objective("kto")
        ours(one, kto, batch)
        if one.take(lambda *numbers: list(numbers))["kl"] > 0:
            return
    raise AssertionError("neither sign gives a divergence")


def test_orpo(orpo):
    trainer, batch = orpo.trainer, pair_batch(orpo.tokenizer)
    pairs = len(batch.rows)
    answers = of_trl(batch)["completion_mask"].bool()
    labels = torch.where(answers, batch.inputs["input_ids"], -100)
    given = {}
    for side, lines in (("chosen", slice(None, pairs)), ("rejected", slice(pairs, None))):
        given |= {f"{side}_{name}": tensor[lines] for name, tensor in batch.inputs.items()}
        given[f"{side}_labels"] = labels[lines]
    trainer.beta = 0.4
    one = objective("orpo", beta=0.4)
    mine = ours(one, orpo, batch)
    loss, theirs = trainer.get_batch_loss_metrics(trainer.model, given)
    assert_same(orpo.both_losses(mine, loss))
    found = one.take(lambda *numbers: list(numbers))
    assert found["log_odds"] == pytest.approx(theirs["log_odds_chosen"], rel=1e-5)
    assert found["sft_loss"] == pytest.approx(theirs["nll_loss"], rel=1e-5)
    assert found["margin"] == pytest.approx(theirs["rewards/margins"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(theirs["rewards/accuracies"])
