"""Whole runs of dpo, orpo and kto: the reference, going on, and what the choice of components is made by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numeric import same_curve
from preference_runs import looks, preference_recipe
from test_checkpoint import assert_same_run, interrupt
from tiny_run import assembled, in_double, make_recipe, train

from dynlora_cli.lora.layer import switched_off
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.tasks.preference import sequence_logps
from dynlora_cli.training.before.references import remember_references
from dynlora_cli.training.step import backward

LOG_2 = 0.6931471805599453


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_a_run_learns_what_is_preferred(tmp_path, objective):
    _, events = train(preference_recipe(tmp_path, objective=objective))
    first, *_, last = looks(events)
    assert last["loss"] < first["loss"]
    assert last["margin"] > first["margin"]
    if objective != "orpo":  # the model is its own reference yet, to the last bit
        assert first["margin"] == first["reward_chosen"] == first["reward_rejected"] == 0
        assert first["accuracy"] == 0.5
        assert first["loss"] == pytest.approx(LOG_2 if objective == "dpo" else 0.5, abs=1e-7)
    window = [event for event in events if event["event"] == "train"][-1]
    assert {"accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected"} <= window.keys()
    assert any(event["event"] == "prune" for event in events)


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        (["adapter.dropout=0.1"], "dpo"),
        pytest.param([], "kto", marks=pytest.mark.slow),
        pytest.param([], "orpo", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, settings, objective):
    """Stopped in the first epoch and in the second, whose rows the reference has seen."""
    more = [*settings, "train.max_steps=20"]
    train(preference_recipe(tmp_path, *more, objective=objective, out="straight"))
    for stop in (5, 14):
        recipe = preference_recipe(tmp_path, *more, objective=objective, out=f"stopped{stop}")
        interrupt(recipe, stop)
        train(recipe, resume=True)
        assert_same_run(tmp_path / "straight", tmp_path / f"stopped{stop}")


def test_later_epochs_do_not_ask_the_reference(tmp_path, monkeypatch):
    """One pass for each micro-batch, whatever the epoch; none at all of the base alone once training has begun."""
    run = assembled(preference_recipe(tmp_path, "dataset.val_size=0", "eval.steps=null"), fill=False)
    passes = []
    run.model.register_forward_hook(lambda *_: passes.append(any(x.off for x in run.trained.layers.values())))
    remember_references(run)
    asked = len(passes)
    assert asked == run.batches.steps_per_epoch * 2
    assert all(passes)
    for epoch in range(2):
        for batch in run.batches.step(epoch, 0):
            backward(run, batch, 4)
    assert passes[asked:] == [False] * 4
    remember_references(run)
    assert len(passes) == asked + 4


def test_what_a_run_will_not_see_is_not_asked_about(tmp_path):
    run = assembled(preference_recipe(tmp_path, "train.max_steps=2", "dataset.val_size=0", "eval.steps=null"))
    remember_references(run)
    assert len(run.objective.references) < 2 * 12


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_off_in_the_reference(tmp_path, dropout):
    run = assembled(preference_recipe(tmp_path, f"adapter.dropout={dropout}"), fill=False)
    run.model.config.attention_dropout = dropout
    for module in run.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    remember_references(run)
    batch = run.batches.step(0, 0)[0]
    run.model.eval()
    with torch.no_grad():
        logps_L, _ = sequence_logps(run.model, batch)
    assert torch.equal(run.objective.references.of(batch, logps_L), logps_L)


def test_the_reference_of_a_pissa_start_is_the_base(tmp_path):
    run = assembled(preference_recipe(tmp_path, "adapter.init_weights=pissa"))
    batch = run.batches.step(0, 0)[0]
    with switched_off(run.trained.layers.values()), torch.no_grad():
        base_L, _ = sequence_logps(run.model.eval(), batch)
    with torch.no_grad():
        now_L, _ = sequence_logps(run.model, batch)
    remember_references(run)
    assert torch.equal(run.objective.references.of(batch, base_L), base_L)
    assert not torch.equal(base_L, now_L), "components that were filled with numbers do something"


@pytest.mark.slow
@pytest.mark.parametrize("old", ["tune", "freeze", "magnitudes"])
def test_the_reference_stays_the_adapter_that_a_run_goes_on_from(tmp_path, old):
    """Though its components train, go and are turned."""
    train(make_recipe(tmp_path, "train.learning_rate=2e-2", out="v1"))
    where = f"adapter.from={tmp_path / 'v1'}"
    recipe = preference_recipe(tmp_path, where, f"adapter.old={old}", "rank.budget=3", "rank.init=6", out="v2")
    _, events = train(recipe)
    first, *_, last = looks(events)
    assert first["loss"] == pytest.approx(LOG_2, abs=1e-6)
    assert last["loss"] < first["loss"]
    assert any(event["event"] == "prune" for event in events)
    # Of v1, which the first look measured: so it was not the base, and nothing that came later.
    assert last["reward_chosen"] == pytest.approx(0.1 * (last["logp_chosen"] - first["logp_chosen"]), rel=1e-4)
    base = looks(train(preference_recipe(tmp_path, "train.max_steps=1", out="base"))[1])[0]
    assert abs(base["logp_chosen"] - first["logp_chosen"]) > 1


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_components_are_scored_by_the_objectives_own_gradient(tmp_path, objective):
    """dL/dg of gates that stand before every component, of the objective's loss, in fp64."""
    run = in_double(preference_recipe(tmp_path, objective=objective))
    remember_references(run)
    batch = run.batches.step(0, 0)[0]
    backward(run, batch, batch.supervised)
    scores_K = run.trained.gate_gradient_K()
    gates = [torch.ones(layer.count, dtype=torch.float64, requires_grad=True) for layer in run.trained.layers.values()]
    for layer, gate in zip(run.trained.layers.values(), gates, strict=True):
        layer.gate = gate
    loss = run.objective.loss(run.model, batch) / batch.supervised
    truth_K = torch.cat(torch.autograd.grad(loss, gates))
    torch.testing.assert_close(scores_K, truth_K, rtol=1e-8, atol=1e-10)
    for layer in run.trained.layers.values():
        layer.gate = None
    run.trained.values.grad.zero_()
    summed_loss(run.model, replace(batch, judge=None)).backward()
    other_K = run.trained.gate_gradient_K()
    alike = torch.nn.functional.cosine_similarity(scores_K, other_K, 0)
    assert alike < 0.99, "those of a cross-entropy are others"


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize("setting", ["train.fused=false", "train.gradient_checkpointing=true"])
def test_how_the_steps_are_run_changes_nothing(tmp_path, objective, setting):
    plain, other = (
        train(preference_recipe(tmp_path, *more, objective=objective, out=out))[0]
        for out, more in (("plain", ()), ("other", (setting,)))
    )
    assert other["loss_after"] == same_curve(plain["loss_after"])
    assert other["ranks"] == plain["ranks"]


def test_accumulated_pairs_count_as_pairs_of_one_batch(tmp_path):
    found = []
    for size, steps in ((4, 1), (1, 4)):
        more = f"train.micro_batch_size={size}", f"train.gradient_accumulation_steps={steps}"
        found.append(train(preference_recipe(tmp_path, *more, out=f"by{size}"))[0])
    assert found[0]["loss_after"] == same_curve(found[1]["loss_after"])
    assert found[0]["ranks"] == found[1]["ranks"]


def test_a_rate_that_is_searched_for_leaves_no_numbers_of_its_trials(tmp_path):
    summary, events = train(preference_recipe(tmp_path, "train.learning_rate=auto", "train.log_steps=1"))
    assert summary["learning_rate"] > 0
    first = next(event for event in events if event["event"] == "train")
    assert first["margin"] == pytest.approx(0, abs=1e-5), "the first step is made before anything is learned"
