"""`train.learning_rate: auto`: trials of which the best becomes the run, and what the others may cost."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from tiny_run import assembled, lines, make_recipe, train

from dynlora_cli.errors import Interrupted, MeasureError, UsageError
from dynlora_cli.training import step
from dynlora_cli.training.rate import race
from dynlora_cli.training.rate.prior import prior
from dynlora_cli.training.rate.standing import Standing
from dynlora_cli.training.run import Progress
from dynlora_cli.training.step import advance

AUTO, LONG = "train.learning_rate=auto", ("train.max_steps=140", "eval.steps=70", "train.warmup_steps=1")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the 12 steps that recipes of tests have are long enough for trials of 2."""
    monkeypatch.setattr(race, "SHORTEST", 2)
    monkeypatch.setattr(race, "SHARE", 0.9)


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every optimizer step from now on, those of trials too."""
    taken, one = [], step._step

    def count(run, *arguments):
        taken.append(run.progress.step + 1)
        return one(run, *arguments)

    monkeypatch.setattr(step, "_step", count)
    return taken


# -- what it may cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [2, 12, 30, 60, 100, 139, 140, 200, 800, 3000])
def test_three_trials_fit_into_a_tenth_of_the_run(total: int, tmp_path: Path):
    settings = [AUTO, f"train.max_steps={total}", "eval.steps=null", "dataset.val_size=0", "pruning.start=0.25"]
    run = assembled(make_recipe(tmp_path, *settings, "train.warmup_steps=2"))
    terms = race._terms(run)
    assert not terms.steps or race.SHORTEST <= terms.steps <= race.LONGEST
    assert terms.thrown_away(3 if terms.compares else 1) <= max(0.1 * total, terms.judged / 3)
    assert (bool(terms.steps), terms.compares) == (total >= 30, total >= 140)
    assert terms.kept


def test_within_the_warm_up_rates_are_not_compared_but_the_guess_is_checked(tmp_path: Path):
    """There a rate that is too high for the run is the fastest."""
    for total in (60, 200, 2000):
        settings = (AUTO, f"train.max_steps={total}", "eval.steps=null", "pruning.start=0.25")
        terms = race._terms(assembled(make_recipe(tmp_path, *settings)))
        assert (terms.steps, terms.compares, terms.kept) == (7, False, True)  # of 8 in an epoch
        assert terms.thrown_away(1) <= 0.1 * total


def test_where_its_state_may_not_be_kept_all_trials_are_thrown_away(tmp_path: Path):
    long = "train.max_steps=400 train.warmup_steps=2"
    assert race._terms(assembled(make_recipe(tmp_path, AUTO, *long.split(), "eval.steps=100"))).kept
    for settings in (["eval.steps=3"], ["train.save_steps=2"], ["pruning.start=0"], ["adapter.variant=full"]):
        terms = race._terms(assembled(make_recipe(tmp_path, AUTO, *long.split(), *settings), fill=False))
        assert not terms.kept
        assert terms.steps == 12
        assert terms.thrown_away(3) <= 40


@pytest.mark.slow
def test_the_race_costs_a_tenth_and_its_time_is_in_every_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken = steps_taken(monkeypatch)
    summary, events = train(make_recipe(tmp_path, AUTO, *LONG))
    assert 140 < len(taken) <= 154
    assert summary["learning_rate_from"] == f"race of {len(summary['rates_tried'])}"
    assert 0 < summary["rate_seconds"] < 0.5 * summary["seconds"]
    told = [event for event in events if event["event"] == "train"]
    assert [event["step"] for event in told] == list(range(1, 141))
    own = sum(event["step_seconds"] for event in told)
    assert summary["seconds"] == pytest.approx(own + summary["rate_seconds"], rel=0.01)
    assert told[0]["seconds"] > summary["rate_seconds"]
    record = json.loads((tmp_path / "out" / "dynlora.json").read_text(encoding="utf-8"))
    assert record["timings"] == {"training_seconds": summary["seconds"], "rate_seconds": summary["rate_seconds"]}
    assert record["summary"]["learning_rate_from"].startswith("race of")
    assert "race of" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "race of" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_short_run_takes_the_guess_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    taken = steps_taken(monkeypatch)
    summary, events = train(make_recipe(tmp_path, AUTO))
    assert len(taken) == 12
    assert summary["learning_rate_from"] == "prior"
    assert summary["rates_tried"] == []
    assert summary["rate_seconds"] == 0
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert f"learning rate {summary['learning_rate']:.1e}: a guess" in note
    assert "too few to check it" in note
    assert 1e-4 < summary["learning_rate"] < 2e-2


def test_a_guess_that_does_no_good_and_no_harm_goes_on_from_its_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its steps are not done twice."""
    taken, untrained = steps_taken(monkeypatch), race._untrained
    monkeypatch.setattr(race, "_untrained", lambda *arguments: 0.5 * untrained(*arguments))
    monkeypatch.setattr(race, "HARMLESS", 9.0)
    long = (AUTO, "train.max_steps=40", "eval.steps=20", "pruning.start=0.4")
    summary, events = train(make_recipe(tmp_path, *long))
    assert len(taken) == 40
    assert summary["learning_rate_from"] == "prior"
    assert any("do not lower the loss yet" in event["text"] for event in events if event["event"] == "note")


@pytest.mark.slow
def test_a_guess_is_checked_by_the_first_steps_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = (AUTO, "train.max_steps=40", "eval.steps=20", "pruning.start=0.4")
    taken = steps_taken(monkeypatch)
    summary, events = train(make_recipe(tmp_path, *long))
    assert len(taken) == 40
    assert summary["learning_rate_from"] == "prior"
    assert 0 < summary["rate_seconds"] < 0.3 * summary["seconds"]
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert "its first 12 steps lower the loss" in note


def test_a_guess_that_nothing_checks_says_why(tmp_path: Path):
    for setting, why in (
        ("adapter.variant=full", "a whole model"),
        ("pruning.start=0", "comes in the first steps"),
        ("train.max_steps=12", "12 steps are too few"),
    ):
        settings = ("train.max_steps=400", "eval.steps=null", "dataset.val_size=0", setting)
        run = assembled(make_recipe(tmp_path, AUTO, *settings), fill=False)
        assert why in race._unchecked(run)


# -- the best trial becomes the run ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["adapter.dropout=0.3"],
        ["eval.steps=1"],
        ["adapter.variant=full"],
        ["pruning.start=0", "pruning.end=1", "pruning.events=8"],  # trials are as long as the first event is away
    ],
)
def test_a_run_is_the_one_with_the_number_it_found(tmp_path: Path, settings: list[str]):
    """Bit for bit: files and metrics, with random numbers, and where trials are thrown away."""
    settings = ["pruning.start=0.4", "train.log_steps=3", "rank.init=4", *settings]
    found, _ = train(make_recipe(tmp_path, AUTO, *settings))
    assert found["rates_tried"]
    fixed, _ = train(make_recipe(tmp_path, f"train.learning_rate={found['learning_rate']}", *settings, out="fixed"))
    assert fixed["loss_after"] == found["loss_after"]
    assert fixed["learning_rate_from"] == "recipe"
    assert fixed["rates_tried"] == []
    weights = "model.safetensors" if "adapter.variant=full" in settings else "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "fixed" / weights).read_bytes()
    assert lines(tmp_path / "out" / "metrics.jsonl") == lines(tmp_path / "fixed" / "metrics.jsonl")


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("scaled", [False, True])
def test_where_a_run_stands_can_be_put_back(tmp_path: Path, scaled: bool):
    run = assembled(make_recipe(tmp_path, "adapter.dropout=0.3"), fill=False)
    if scaled:
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    with run.random:
        start = Standing.beginning(run)
        advance(run, race.Window())
        standing, progress = Standing.now(run), Progress(step=run.progress.step, learning_rate=5e-3)

    def after() -> list[torch.Tensor]:
        run.progress = progress.__class__(**vars(progress))
        with run.random:
            advance(run, race.Window())
        moments = [value for state in run.optimizer.state.values() for value in state.values()]
        scale = [torch.tensor(run.accelerator.scaler.get_scale())] if scaled else []
        return [x.detach().clone() for x in (*run.parameters, *moments, torch.get_rng_state(), *scale)]

    once = after()
    with run.random:
        standing.put_back(run)
    assert all(map(torch.equal, once, after()))
    start.put_back(run)
    assert torch.equal(run.trained.values, start.values[0])
    assert not any(tensor.any() for state in run.optimizer.state.values() for tensor in state.values())
    assert not run.trained.values.grad.any()


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_resumed_run_does_not_search_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, _ = train(make_recipe(tmp_path, AUTO, out="whole"))
    recipe = make_recipe(tmp_path, AUTO)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    monkeypatch.setattr(race, "prior", None)
    summary, _ = train(recipe, resume=True)
    for key in ("learning_rate", "learning_rate_from", "loss_after"):
        assert summary[key] == whole[key]
    assert [tuple(pair) for pair in summary["rates_tried"]] == whole["rates_tried"]
    assert summary["rate_seconds"] > 0
    assert lines(tmp_path / "out" / "metrics.jsonl") == lines(tmp_path / "whole" / "metrics.jsonl")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "whole")]
    assert adapters[0] == adapters[1]


@pytest.mark.usefixtures("brief")
def test_ctrl_c_in_the_race_stops_at_once_and_a_fresh_start_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, backward, calls = make_recipe(tmp_path, AUTO), step.backward, []

    def press(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "backward", press)
        with pytest.raises(Interrupted, match="looking for a learning rate"):
            train(recipe)
    assert len(calls) <= 4
    with pytest.raises(UsageError, match="no complete checkpoint"):
        train(recipe, resume=True)
    summary, _ = train(recipe, overwrite=True)
    assert summary["steps"] == 12


# -- which rate ------------------------------------------------------------------------------------------------------


class Told(race.Race):
    """A race whose trials end with given losses, as multiples of the untrained model's."""

    told: dict[float, float]

    def _trial(self, rate: float) -> race.Trial:
        loss = next((loss for known, loss in self.told.items() if math.isclose(known, rate)), 0.9)
        return race.Trial(rate, self.untrained * loss, Progress(), race.Window())


def told_race(
    folder: Path, losses: dict[float, float], guess: float, spare: int = 1000, compares: bool = True
) -> tuple[float, list[float]]:
    """The rate that is taken, and all that were tried."""
    run = assembled(make_recipe(folder, AUTO, *LONG), fill=False)
    one = type("One", (Told,), {"told": losses})(run, guess, race.Terms(4, spare, False, compares), lambda: False)
    return one.run_all().rate, sorted(one.losses)


def test_the_best_rate_has_a_worse_neighbour_on_both_sides(tmp_path: Path):
    losses = {1e-3 * 2.0**k: 0.5 + 0.01 * (k - 2) ** 2 for k in range(-6, 7)}
    assert told_race(tmp_path, losses, 1e-3) == (4e-3, [5e-4, 1e-3, 2e-3, 4e-3, 8e-3])


def test_a_race_ends_where_the_steps_are_used_up(tmp_path: Path):
    losses = {1e-3 * 2.0**k: 0.5 + 0.01 * (k - 5) ** 2 for k in range(-6, 7)}
    assert told_race(tmp_path, losses, 1e-3, spare=17) == (4e-3, [5e-4, 1e-3, 2e-3, 4e-3])


def test_a_guess_that_is_only_checked_stands_unless_it_breaks_the_model(tmp_path: Path):
    losses = {1e-3: 0.9, 2e-3: 0.8, 4e-3: 1.5, 8e-3: 1.2}
    assert told_race(tmp_path, losses, 1e-3, compares=False) == (1e-3, [1e-3])
    assert told_race(tmp_path, losses, 8e-3, compares=False, spare=1) == (2e-3, [2e-3, 4e-3, 8e-3])


def test_of_broken_models_none_is_the_best(tmp_path: Path):
    """From 1e-3 up the model breaks, at 4e-3 a little less than at its neighbours: the search must not stop there."""
    broken = {5e-4: 0.8, 1e-3: 1.5, 2e-3: 1.7, 4e-3: 1.1, 8e-3: 1.3}
    rate, _ = told_race(tmp_path, broken, 4e-3)
    assert rate < 1e-3


def test_a_rate_that_diverged_is_not_taken_where_another_only_does_harm():
    assert race.choose({1e-3: math.inf, 2e-3: 1.5, 4e-3: math.inf}, 1.0, 4e-3) == 2e-3


def test_where_every_rate_breaks_the_model_lower_ones_are_tried_whatever_that_costs(tmp_path: Path):
    losses = {1e-3 * 2.0**k: 1.5 for k in range(-3, 4)}
    assert told_race(tmp_path, losses, 4e-3, spare=10)[0] < 1e-3 / 8


def test_where_nothing_is_learned_the_guess_if_it_does_no_harm(tmp_path: Path):
    """A classifier may stand at chance for longer than a trial; the search must not go down to rates that do nothing."""
    losses = {1e-3 * 2.0**k: 1 + 10 * 1e-3 * 2.0**k for k in range(-6, 7)}
    assert told_race(tmp_path, losses, 1e-3) == (1e-3, [5e-4, 1e-3, 2e-3])
    assert told_race(tmp_path, losses, 4e-3)[0] == 1e-3


@pytest.mark.usefixtures("brief")
def test_where_every_rate_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments):
        raise MeasureError("the loss is nan", "")

    monkeypatch.setattr(race, "advance", fail)
    with pytest.raises(MeasureError, match="not finite at any learning rate") as stopped:
        train(make_recipe(tmp_path, AUTO))
    assert stopped.value.exit_code == 4


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_rate_that_diverges_in_a_step_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, one = make_recipe(tmp_path, AUTO), step._step
    guess = prior(assembled(recipe))

    def break_above(run, *arguments):
        if run.progress.learning_rate > 0.9 * guess and run.progress.step == 1:
            run.trained.values.data.fill_(math.nan)
        return one(run, *arguments)

    monkeypatch.setattr(step, "_step", break_above)
    summary, _ = train(recipe)
    assert summary["learning_rate"] < 0.6 * guess
    assert math.isfinite(summary["loss_after"])


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_classifier(tmp_path: Path):
    summary, _ = train(make_recipe(tmp_path, AUTO, "rank.budget=2", kind="bert"))
    assert math.isfinite(summary["loss_after"])
    assert len(summary["rates_tried"]) >= 3
