"""The tables of scripts/bench/auto: what a guess is worth is read off rate curves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench" / "auto"))

import tables

LOSSES = {1e-3: 2.2, 2e-3: 2.0, 4e-3: 2.1, 8e-3: 3.0}


def run(task: str, rate: float, loss: float, budget: int = 4, method: str = "lora", seed: int = 0):
    return {"task": task, "method": method, "budget": budget, "rate": rate, "seed": seed, "loss": loss}


def test_what_a_rate_costs_is_read_off_the_curve():
    assert tables.excess(LOSSES, 2e-3) == 0
    assert tables.excess(LOSSES, 4e-3) == pytest.approx(4.88, abs=0.01)
    assert 0 < tables.excess(LOSSES, 2.8e-3) < 4.88
    assert tables.excess(LOSSES, 1e-4) > tables.excess(LOSSES, 1e-3)
    assert tables.excess(LOSSES, 0.1) > tables.excess(LOSSES, 8e-3)


def test_only_whole_curves_of_seed_0_count():
    records = [run("e2e", rate, loss) for rate, loss in LOSSES.items()]
    records += [run("e2e", 1e-3, 1.0, seed=1), run("chat", 1e-3, 1.0), run("spam", 1e-3, 1.0)]
    assert tables.curves(records) == {("e2e", "lora", 4): LOSSES}
    ours = [{**record, "method": "dynlora"} for record in records]
    assert list(tables.curves(ours)) == [("e2e", "dynlora", 8)]  # it starts with twice its budget


def test_the_constants_are_fitted_without_the_task_they_are_judged_on():
    curves = {("e2e", "lora", 4): {1e-3: 1.0, 2e-3: 2.0}}
    curves |= {("svamp", "lora", n): {rate: 1.0, 2 * rate: 2.0} for n, rate in ((4, 4e-3), (16, 2e-3))}
    curves |= {("chat", "lora", n): {rate: 1.0, 2 * rate: 2.0} for n, rate in ((4, 2e-3), (16, 1e-3))}
    assert tables.without("e2e", curves)(("e2e", "lora", 4)) == pytest.approx(2e-3)


def test_the_page_has_every_table():
    runs = [
        {
            "task": "e2e", "model": "", "budget": 8, "steps": 0, "rate": 0.0, "seed": 0, "rows": 200, "loss": 1.5,
            "settings": f"train.epochs={n}", "evaluations": [[0, 5.0], [25, 1.4]],
        }
        for n in (1, 4)
    ]  # fmt: skip
    records = [run(task, rate, loss, n) for task in tables.OF_TASK for rate, loss in LOSSES.items() for n in (1, 4)]
    page = tables.page(records, runs)
    assert "| the guess |" in page
    assert "| e2e | 200 | 1.5000 (1.4000) | 1.5000 (1.4000) |" in page
