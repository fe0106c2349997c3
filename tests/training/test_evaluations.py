"""When a run looks at its held-out rows: evenly, seldom enough, and without learning anything else for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import lines, make_recipe, train

from dynlora_cli.training.held_out import answers_due, evaluation_due, few_evaluations


def a_run(total: int, per_epoch: int, held_out: int, steps: int | None = None) -> Any:
    """What the schedule asks of a run; `held_out`: in steps' worth of rows, four rows each."""
    return SimpleNamespace(
        recipe=SimpleNamespace(eval=SimpleNamespace(steps=steps)),
        total_steps=total,
        batches=SimpleNamespace(steps_per_epoch=per_epoch),
        val_batches=SimpleNamespace(steps_per_epoch=held_out, examples=[None] * held_out * 4) if held_out else None,
        progress=SimpleNamespace(step=0),
    )


def looks(run: Any, due: Any = evaluation_due) -> list[int]:
    found = []
    for step in range(1, run.total_steps + 1):
        run.progress.step = step
        if due(run):
            found.append(step)
    return found


def test_a_run_of_one_epoch_looks_eight_times_at_even_distances():
    assert looks(a_run(800, 800, 10)) == list(range(100, 801, 100))


@pytest.mark.parametrize(("epochs", "times"), [(1, 8), (2, 8), (3, 9), (5, 10), (7, 7), (20, 20)])
def test_the_end_of_every_epoch_is_looked_at(epochs: int, times: int):
    found = looks(a_run(epochs * 120, 120, 3))
    assert len(found) == times
    assert set(range(120, epochs * 120 + 1, 120)) <= set(found)


def test_where_much_is_held_out_looks_take_an_eighth_of_the_time_and_it_is_said():
    run = a_run(200, 200, 20)
    found = looks(run)
    assert len(found) * 20 * 0.5 <= 200 / 8
    assert found == [100, 200]
    assert few_evaluations(run) == (
        "the loss on 80 held-out rows is taken 2 times while training; with eval.max_samples: 25 that would be 8 times "
        "at the same cost"
    )
    fewer = a_run(200, 200, 6)  # 24 rows
    assert len(looks(fewer)) == 8
    assert few_evaluations(fewer) == ""


def test_every_epoch_is_looked_at_whatever_it_costs():
    assert looks(a_run(30, 10, 50)) == [10, 20, 30]


def test_a_number_of_steps_is_taken_as_it_is():
    assert looks(a_run(10, 10, 500, steps=4)) == [4, 8, 10]
    assert looks(a_run(10, 10, 0, steps=4)) == []
    assert few_evaluations(a_run(10, 10, 500, steps=4)) == ""


def test_answers_are_shown_after_epochs_or_as_asked():
    run = a_run(100, 50, 1)
    assert len(looks(run)) == 8
    assert looks(run, answers_due) == [50, 100]
    assert looks(a_run(8, 8, 1, steps=3), lambda run: evaluation_due(run) and answers_due(run)) == [3, 6, 8]


def test_a_run_learns_the_same_however_often_it_is_measured(tmp_path: Path):
    settings = ["adapter.dropout=0.1", "dataset.val_size=0.05", "train.max_steps=20", "train.micro_batch_size=4"]
    weights, losses, curves = [], [], []
    for steps in ("null", "1000"):
        summary, events = train(make_recipe(tmp_path, *settings, f"eval.steps={steps}", out=f"out{steps}"))
        folder = Path(summary["output_dir"])
        weights.append((folder / "adapter_model.safetensors").read_bytes())
        losses.append([line for line in lines(folder / "metrics.jsonl") if line["event"] == "train"])
        curves.append([event["step"] for event in events if event["event"] == "eval"])
    assert curves == [[0, 5, 10, 15, 20], [0, 20]]
    assert weights[0] == weights[1]
    assert losses[0] == losses[1]
    assert losses[0]
