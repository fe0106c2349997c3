"""`rank.budget: auto`: pruning that stops where rows which are not trained on begin to suffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import Dynlora
from numeric import assert_close_to_truth, in_double
from tiny_run import assembled, lines, make_recipe, train, write_rows

from dynlora_cli.config.budget import parse_budget
from dynlora_cli.errors import Interrupted, UsageError
from dynlora_cli.lora.start import plan_start
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.pruning.schedule import Schedule
from dynlora_cli.pruning.stopping import EarlyStopping, paired_change
from dynlora_cli.tasks.scores import RowSums
from dynlora_cli.training.setup import read_data

AUTO = ("rank.budget=auto", "pruning.start=0.1", "pruning.end=0.9", "pruning.events=6")
ANYTHING, NOTHING = "pruning.tolerance=1e6", "pruning.tolerance=0"


def recipe_of(folder: Path, *settings: str, kind: str = "llama", out: str = "out"):
    """A recipe whose budget is open, on rows enough to hold some out."""
    many = write_rows(folder / f"many-{kind}.jsonl", 120, labelled=kind == "bert")
    return make_recipe(folder, *AUTO, f"dataset.train=[{many}]", *settings, kind=kind, out=out)


def rows(loss, targets=None):
    loss_R = np.asarray(loss, dtype=np.float64)
    targets_R = np.ones(len(loss_R), dtype=np.int64) if targets is None else np.asarray(targets)
    return RowSums(loss_R, targets_R, np.zeros_like(targets_R))


# -- the judgement ---------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_paired_change():
    """Against many draws: the spread of the change is the error, and has nothing to do with how rows differ."""
    generator = np.random.default_rng(0)
    targets = generator.integers(1, 30, 64)
    level = generator.uniform(1, 5, 64) * targets
    changes, errors = [], []
    for _ in range(2000):
        after = level + 0.02 * targets + generator.normal(0, 0.1, 64) * targets
        change, error = paired_change(rows(level, targets), rows(after, targets))
        changes.append(change)
        errors.append(error)
    assert np.mean(changes) == pytest.approx(0.02, abs=1e-3)
    assert np.mean(errors) == pytest.approx(np.std(changes), rel=0.1)


def test_one_row_says_nothing():
    change, error = paired_change(rows([1.0]), rows([1.5]))
    assert change == 0.5
    assert error == np.inf


def test_a_tolerance_is_a_limit_in_nats():
    stopping = EarlyStopping(lambda: rows([1.0]), tolerance=0.1)
    assert stopping.allows(rows([1.0, 1.0]), rows([1.09, 1.09]))[0]
    assert not stopping.allows(rows([1.0, 1.0]), rows([1.11, 1.11]))[0]


def test_rises_add_up_and_a_fall_pays_for_none():
    stopping, before = EarlyStopping(lambda: rows([1.0]), tolerance=0.1), rows([1.0, 1.0])
    assert stopping.allows(before, rows([1.06, 1.06]))[0]
    assert stopping.allows(before, rows([0.5, 0.5]))[0]
    assert stopping.added == pytest.approx(0.06)
    again = EarlyStopping(lambda: rows([1.0]), tolerance=0.1)
    again.go_on(*stopping.state())
    assert not again.allows(before, rows([1.05, 1.05]))[0]
    assert again.allows(before, rows([1.03, 1.03]))[0]
    assert again == EarlyStopping(again.measure, 0.1, pytest.approx(0.09), refused=True, ended=True)


def test_by_default_a_clear_rise_is_refused_and_noise_is_not():
    stopping = EarlyStopping(lambda: rows([1.0]))
    before = rows(np.ones(50))
    assert not stopping.allows(before, rows(np.full(50, 1.02)))[0]
    assert stopping.allows(before, rows(np.full(50, 1.009)))[0], "less than a percent is nothing"
    noise = np.random.default_rng(1).normal(0, 0.5, 50)
    assert stopping.allows(before, rows(1 + noise - noise.mean() + 0.02))[0]


@pytest.mark.parametrize("last", ["harmless", "harmful"])
def test_after_a_refusal_there_is_one_more_event(last: str):
    stopping, before, worse = EarlyStopping(lambda: rows([1.0])), rows(np.ones(9)), rows(np.full(9, 2.0))
    for after, refused in ((before, False), (before, False), (worse, True)):
        stopping.allows(before, after)
        assert (stopping.refused, stopping.ended) == (refused, False)
    assert stopping.allows(before, before if last == "harmless" else worse)[0] == (last == "harmless")
    assert stopping.ended


# -- the plan --------------------------------------------------------------------------------------------------------


def test_an_open_budget_is_pruned_late(tmp_path: Path):
    windows = {
        settings: make_recipe(tmp_path, "pruning.start=auto", "pruning.end=auto", *settings).pruning_window
        for settings in [(), ("rank.budget=auto",), ("rank.budget=auto", "pruning.start=0.2"), ("pruning.end=1.0",)]
    }
    assert list(windows.values()) == [(0.25, 0.5), (0.5, 0.95), (0.2, 0.95), (0.25, 1.0)]


def test_an_open_budget_starts_high_and_has_a_floor():
    start = plan_start({"l": (100, 100), "m": (200, 200)}, parse_budget("auto"), "auto")
    assert start.counts == {"l": 32, "m": 32}
    assert start.limit is None
    assert start.average_rank == 32
    assert start.budget == 400, "one component of the largest layer"
    assert start.rank_of(600) == 1
    assert plan_start({"l": (100, 100)}, parse_budget("auto"), 8).counts == {"l": 8}


@pytest.mark.parametrize(("total", "events", "end"), [(1000, 14, 250), (100, 9, 250), (40, 3, 4000), (4, 1, 16_000)])
def test_every_event_takes_the_same_share_and_no_more_than_half(total: int, events: int, end: int):
    schedule = Schedule.descend(total_steps=total, start=0.05, end=0.5, events="auto", parameters=32_000, budget=250)
    assert len(schedule.steps) == events
    assert schedule.targets[-1] == end
    assert schedule.last <= total * 0.5 + 1
    shares = np.divide(schedule.targets, (32_000, *schedule.targets[:-1]))
    assert shares == pytest.approx(shares[0], rel=0.02)
    assert shares[0] >= 0.5


def test_masked_computes_as_if_the_others_were_gone(tmp_path: Path):
    run = assembled(make_recipe(tmp_path))
    (batch,) = run.batches.step(0, 0)[:1]
    keep = torch.rand(run.trained.components, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        whole = run.model(**batch.inputs).logits
        with run.trained.masked(keep):
            masked = run.model(**batch.inputs).logits
            exact = in_double(run.model)(**batch.inputs).logits
        assert torch.equal(run.model(**batch.inputs).logits, whole)
        shrink(run.trained, run.optimizer, keep)
        for logits in (masked, run.model(**batch.inputs).logits):
            assert_close_to_truth(logits, exact, terms=2 * (32 + 64))
    assert not torch.allclose(masked, whole, atol=1e-3)


# -- runs ------------------------------------------------------------------------------------------------------------


def test_rows_to_choose_by_are_neither_trained_on_nor_reported(tmp_path: Path):
    recipe = recipe_of(tmp_path)
    files = BaseFiles.find(recipe.model)
    fixed = read_data(recipe_of(tmp_path, "rank.budget=2"), files)
    data = read_data(recipe, files)
    texts = [{tuple(example.input_ids) for example in part} for part in (data.train, data.val, data.sizing)]
    assert len(data.sizing) == round(0.1 * len(fixed.train))
    assert sum(map(len, texts)) == len(set().union(*texts)) == len(data.train) + len(data.val) + len(data.sizing)
    assert data.val == fixed.val
    assert not fixed.sizing


@pytest.mark.slow
def test_without_objection_it_goes_down_to_the_floor(tmp_path: Path):
    summary, events = train(recipe_of(tmp_path, ANYTHING))
    run = assembled(recipe_of(tmp_path, ANYTHING))
    assert summary["parameters"] <= run.control.schedule.targets[-1]
    assert summary["budget_parameters"] is None
    assert summary["average_rank"] <= 0.26
    pruned = [event for event in events if event["event"] == "prune"]
    assert len(pruned) == 6
    assert all(event["measured_loss_change"] is not None and event["held_out_loss"] > 0 for event in pruned)


@pytest.mark.slow
def test_what_does_harm_is_refused_and_then_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dynlora_cli.pruning.stopping.paired_change", lambda before, after: (1.0, 0.1))
    summary, events = train(recipe_of(tmp_path))
    assert [event["ended"] for event in events if event["event"] == "refused"] == [False, True]
    assert summary["parameters"] == summary["parameters_start"]
    kept = [line for line in lines(tmp_path / "out" / "rank_events.jsonl") if line["event"] == "refused"]
    assert [line["measured_loss_change"] for line in kept] == [1.0, 1.0]


@pytest.mark.slow
def test_the_event_after_a_refusal_takes_half_and_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    changes = iter([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr("dynlora_cli.pruning.stopping.paired_change", lambda before, after: (next(changes), 0.1))
    summary, events = train(recipe_of(tmp_path))
    told = [event for event in events if event["event"] in ("prune", "refused")]
    assert [(event["event"], event["ended"]) for event in told] == [
        ("prune", False),
        ("refused", False),
        ("prune", True),
    ]
    first, refused, last = ((e["parameters_before"] - e["target_parameters"]) / e["parameters_before"] for e in told)
    assert first == pytest.approx(refused, rel=0.01)
    assert last == pytest.approx(refused / 2, rel=0.01)
    assert summary["parameters"] == told[-1]["parameters"] < summary["parameters_start"]


@pytest.mark.slow
def test_a_resumed_run_finds_the_same_rank(tmp_path: Path):
    whole, _ = train(recipe_of(tmp_path, NOTHING, out="whole"))
    for step in (5, 9):
        recipe = recipe_of(tmp_path, NOTHING, out=f"out{step}")
        with pytest.raises(Interrupted):
            train(recipe, interrupt_at=step)
        summary, _ = train(recipe, resume=True)
        assert (summary["ranks"], summary["loss_after"]) == (whole["ranks"], whole["loss_after"])
        assert lines(tmp_path / f"out{step}" / "rank_events.jsonl") == lines(tmp_path / "whole" / "rank_events.jsonl")


def test_too_few_rows_to_choose_by(tmp_path: Path):
    recipe = recipe_of(tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tmp_path / "many-llama.jsonl").read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(UsageError, match="at least 8 are needed") as stopped:
        train(recipe_of(tmp_path, f"dataset.train=[{few}]"))
    assert stopped.value.exit_code == 2
    assert not Path(recipe.output_dir).exists()


def test_a_classifier_finds_its_rank(tmp_path: Path):
    summary, events = train(recipe_of(tmp_path, ANYTHING, kind="bert"))
    assert summary["average_rank"] < 8
    assert any(event["event"] == "prune" for event in events)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, dynlora: Dynlora):
    recipe = recipe_of(tmp_path)
    path = tmp_path / "auto.yaml"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    planned = dynlora("train", path, "--dry-run")
    assert planned.code == 0, planned.err
    answer = dynlora("train", path)
    assert answer.code == 0, answer.err
    for name in ("report.html", "README.md"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    assert dynlora("inspect", "--adapter", tmp_path / "out").code == 0
