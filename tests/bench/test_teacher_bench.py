"""scripts/bench/teacher: the teacher is what it says it is, costs are counted, and the table is fresh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "teacher")]

import quality  # noqa: E402 - they are scripts, not a package
import teacher_methods as methods  # noqa: E402
import teacher_tables as tables  # noqa: E402


def record(task="e2e@100", method="ours", loss=2.0, seed=0, cpu=10.0, **more):
    return {"task": task, "method": method, "budget": 1, "rate": 1e-3, "seed": seed, "loss": loss, "test": loss,
            "cpu": cpu, **more}  # fmt: skip


def test_settings_of_the_recipe_and_of_the_teacher_are_told_apart():
    method = "ours k=0.7 fade=1 pruning.start=0.5"
    assert methods.Teaching.of(method) == methods.Teaching(k=0.7, fade=1)
    assert methods.recipe_settings(method) == ("pruning.start=0.5",)


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_cross_entropy_and_divergence(k):
    generator = torch.Generator().manual_seed(0)
    logits, told = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    targets, q = torch.tensor([0, 6, 3, 3, 1]), told.softmax(-1)
    exact = logits.clone().requires_grad_()
    divergence = F.kl_div(exact.log_softmax(-1), q, reduction="none").sum(-1)
    ((1 - k) * F.cross_entropy(exact, targets, reduction="none") + k * divergence).sum().backward()
    loss, grad = methods.mixed(logits.clone(), targets, q, k, torch.float64)
    assert torch.allclose(grad, exact.grad)
    entropy = -(q * q.log()).sum(-1)
    assert torch.allclose(
        loss - k * entropy, (1 - k) * F.cross_entropy(logits, targets, reduction="none") + k * divergence
    )


def test_a_share_that_fades_ends_at_nothing():
    def share(step, **settings):
        distilling = methods.Distilling(None, methods.Teaching(k=0.8, **settings), 100, [], since=20, step=step)
        return distilling.share()

    assert share(20, fade=1) == 0.8
    assert share(60, fade=1) == pytest.approx(0.4)
    assert share(60) == 0.8
    assert share(60, until=0.5) == 0.0
    assert [bool(share(step, every=2)) for step in (60, 61)] == [True, False]


def test_the_teachers_seconds_and_its_own_run_are_its_cost():
    assert tables.cost(record(cpu=15.0, teacher_cpu=5.0, before_cpu=20.0)) == pytest.approx(3.5)
    assert tables.cost(record()) == 1.0


def test_equal_cost_is_a_longer_run():
    lines = [
        record(loss=2.0),
        record(task="e2e@400", loss=1.0),
        record(method="ours k=0.7", loss=1.5, cpu=20.0, teacher_cpu=10.0),
        record(method="ours k=0.9", loss=1.5, cpu=90.0, teacher_cpu=80.0),
    ]
    cells = tables.choose(lines)
    cell = ("e2e@100", "ours k=0.7", 1)
    assert tables.against(cells, cell, "ours", "loss", longer=False) == [pytest.approx(-28.77, abs=0.01)]
    # Twice the steps lie half way, in logarithms, between 100 and 400: the square root of 2.
    assert tables.against(cells, cell, "ours", "loss", longer=True) == [pytest.approx(5.89, abs=0.01)]
    assert tables.against(cells, ("e2e@100", "ours k=0.9", 1), "ours", "loss", longer=True) == [], "no run so long"


@pytest.mark.parametrize(("taught", "plain"), [
    ("ours k=0.7 pruning.start=0.5", "ours"),
    ("ours k=0.7 rows=240", "ours rows=240"),
    ("flat k=0.7 kind=whole", "ours"),
    ("ours kind=heal wide=16 at=1e-3 k=0.7", "ours kind=heal wide=16 at=1e-3"),
])  # fmt: skip
def test_a_teacher_is_held_against_the_same_without_one(taught, plain):
    assert tables.untaught(taught) == plain


def test_runs_of_others_are_taken_once():
    mine, longer = record(), record(task="e2e@400", method="dynlora")
    others = [{**mine, "method": "dynlora"}, longer, record(method="dora"), record("svamp", method="lora")]
    (found,) = tables.missing([mine], others)
    assert (found["task"], found["method"]) == ("e2e@400", "ours")


def test_the_table_is_that_of_the_lines():
    made = tables.results(quality.read_results(BENCH / "teacher" / "teacher.jsonl"))
    assert (BENCH / "teacher" / "teacher.md").read_text(encoding="utf-8") == made
