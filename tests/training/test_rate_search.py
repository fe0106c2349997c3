"""`train.learning_rate: auto`: short trials that leave nothing behind but a rate."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from numeric import same_loss
from tiny_run import assembled, lines, make_recipe, train

from dynlora_cli.errors import Interrupted, MeasureError, UsageError
from dynlora_cli.training import rate_search, step

AUTO = "train.learning_rate=auto"


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a few steps, where it does not matter which rate they find."""
    for name, value in {"STEPS": 5, "WARMUP": 1, "JUDGED": 2}.items():
        monkeypatch.setattr(rate_search, name, value)


@pytest.mark.slow
def test_the_best_rate_has_a_worse_neighbour_on_both_sides(tmp_path: Path):
    run = assembled(make_recipe(tmp_path, AUTO, "train.max_steps=40"), fill=False)
    losses, untrained = rate_search.search(run)
    best = min(losses, key=losses.__getitem__)
    assert losses[best / 2] > losses[best] < losses[best * 2]
    assert len(losses) <= 9
    assert losses[best] < untrained


@pytest.mark.slow
def test_the_search_starts_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for first in (2e-3 / 16, 2e-3 * 16):
        monkeypatch.setattr(rate_search, "FIRST", first)
        losses, _ = rate_search.search(assembled(make_recipe(tmp_path, AUTO, "train.max_steps=40"), fill=False))
        found.append(min(losses, key=losses.__getitem__))
    assert found[0] == pytest.approx(found[1], rel=1e-6) or max(found) == pytest.approx(2 * min(found), rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 3.0}, 2e-3),  # the neighbours alike
        ({5e-4: 4.0, 1e-3: 2.0, 2e-3: 2.0, 4e-3: 4.0}, 1e-3 * math.sqrt(2)),  # half-way between equals
        ({1e-3: 2.5, 2e-3: 2.0, 4e-3: 4.0}, 2e-3 * 2**-0.3),
        ({1e-3: 2.0, 2e-3: 2.0, 4e-3: 2.0}, 1e-3),  # flat
        ({1e-3: 2.03, 2e-3: math.inf}, 1e-3),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: math.inf}, 2e-3),
    ],
)
def test_the_rate_is_the_lowest_point_of_a_parabola(losses: dict[float, float], chosen: float):
    assert rate_search.choose(losses, 10.0) == pytest.approx(chosen)


def test_the_parabola_stays_near_the_best():
    """However lopsided the three losses are, no further than half-way to a neighbour."""
    for lower, higher in ((1.1, 1e6), (1e6, 1.1), (1.0 + 1e-9, 1.1)):
        rate = rate_search.choose({1e-3: lower, 2e-3: 1.0, 4e-3: higher}, 10.0)
        assert 2e-3 / math.sqrt(2) <= rate <= 2e-3 * math.sqrt(2)


def test_of_broken_models_none_is_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From 1e-3 up the model breaks, at 4e-3 a little less than at its neighbours: the search must not stop there."""
    run = assembled(make_recipe(tmp_path, AUTO, "train.max_steps=40"), fill=False)
    untrained = rate_search._untrained(run)
    broken = {5e-4: 0.8, 1e-3: 1.5, 2e-3: 1.7, 4e-3: 1.1, 8e-3: 1.3}

    def trial(run, rate, interrupted):
        return untrained * next((loss for known, loss in broken.items() if math.isclose(known, rate)), 0.9)

    monkeypatch.setattr(rate_search, "_trial", trial)
    assert rate_search.choose(*rate_search.search(run)) < 1e-3


@pytest.mark.slow
def test_where_nothing_is_learned_the_highest_rate_that_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A classifier may stand at chance for longer than a trial; the search must not go down to rates that do nothing."""
    recipe = make_recipe(tmp_path, AUTO, "train.max_steps=40")
    run = assembled(recipe, fill=False)
    untrained = rate_search._untrained(run)

    def trial(run, rate, interrupted):
        return untrained * (1 + 10 * rate)

    monkeypatch.setattr(rate_search, "_trial", trial)
    losses, _ = rate_search.search(run)
    assert rate_search.choose(losses, untrained) == pytest.approx(1e-3)
    assert len(losses) == 4
    _, events = train(recipe)
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert f"none ended below the {untrained:.3f} of no training" in note


def test_a_model_is_untrained_where_the_rate_is_nothing(tmp_path: Path):
    run = assembled(make_recipe(tmp_path, AUTO, "train.max_steps=40"), fill=False)
    assert rate_search._untrained(run) == same_loss(rate_search._trial(run, 0.0, lambda: False))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.usefixtures("brief")
def test_nothing_of_a_trial_stays(tmp_path: Path, dropout: float):
    run = assembled(make_recipe(tmp_path, AUTO, f"adapter.dropout={dropout}"), fill=False)
    values, random_state = run.trained.values.detach().clone(), torch.get_rng_state()
    first = rate_search.search(run)
    assert torch.equal(run.trained.values, values)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(tensor.any() for state in run.optimizer.state.values() for tensor in state.values())
    assert not run.trained.values.grad.any()
    assert rate_search.search(run) == first


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_run_uses_what_it_found_and_says_so(tmp_path: Path):
    summary, events = train(make_recipe(tmp_path, AUTO))
    rates = dict(summary["rates_tried"])
    assert summary["learning_rate"] == rate_search.choose(rates, math.inf)
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert f"learning rate {summary['learning_rate']:.1e}" in note
    record = json.loads((tmp_path / "out" / "dynlora.json").read_text(encoding="utf-8"))
    assert record["summary"]["learning_rate"] == summary["learning_rate"]
    fixed, _ = train(make_recipe(tmp_path, f"train.learning_rate={summary['learning_rate']}", out="fixed"))
    assert fixed["loss_after"] == summary["loss_after"]
    assert fixed["rates_tried"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_resumed_run_does_not_search_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, _ = train(make_recipe(tmp_path, AUTO, out="whole"))
    recipe = make_recipe(tmp_path, AUTO)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    monkeypatch.setattr(rate_search, "FIRST", 0.0)
    summary, _ = train(recipe, resume=True)
    assert summary["learning_rate"] == whole["learning_rate"]
    assert summary["loss_after"] == whole["loss_after"]
    assert lines(tmp_path / "out" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_classifier_and_all_weights(tmp_path: Path):
    for number, settings in enumerate((["rank.budget=2"], ["adapter.variant=full"])):
        summary, _ = train(make_recipe(tmp_path, AUTO, *settings, kind="bert", out=f"out{number}"))
        assert math.isfinite(summary["loss_after"])
        assert len(summary["rates_tried"]) >= 3


def test_ctrl_c_in_the_search_stops_at_once_and_a_fresh_start_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, backward, calls = make_recipe(tmp_path, AUTO), step.backward, []

    def press(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rate_search, "backward", press)
        with pytest.raises(Interrupted, match="looking for a learning rate"):
            train(recipe)
    assert len(calls) <= 4
    with pytest.raises(UsageError, match="no complete checkpoint"):
        train(recipe, resume=True)
    summary, _ = train(recipe, overwrite=True)
    assert summary["steps"] == 12


def test_where_every_rate_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rate_search, "_trial", lambda *arguments: math.inf)
    with pytest.raises(MeasureError, match="not finite at any learning rate") as stopped:
        train(make_recipe(tmp_path, AUTO))
    assert stopped.value.exit_code == 4
