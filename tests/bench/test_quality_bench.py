"""The yardstick of scripts/bench/quality.py: how it chooses rates, pairs runs and keeps the parts of a task apart."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import quality  # noqa: E402 - they are scripts, not a package
import quality_lengths as lengths  # noqa: E402
import quality_tables as tables  # noqa: E402
import quality_tasks as tasks  # noqa: E402


def record(task="t", method="lora", budget=1, rate=1e-3, seed=0, loss=2.0, test=3.0):
    return {
        "task": task, "method": method, "budget": budget, "rate": rate, "seed": seed, "loss": loss, "test": test,
        "parameters": 100 * budget,
    }  # fmt: skip


@pytest.mark.parametrize("best", [1e-4, 1e-3, 2e-2])
def test_the_grid_is_extended_until_the_best_is_inside(best, monkeypatch, tmp_path):
    tried = []

    def measure(cell, rate, seed, results, work):
        tried.append(rate)
        return abs(math.log2(rate / best))

    monkeypatch.setattr(quality, "measure", measure)
    found = quality.choose_rate(("t", "lora", 1), tmp_path / "none.jsonl", tmp_path)
    assert abs(math.log2(found / best)) <= 0.25
    assert {round(2 * math.log2(rate / found)) for rate in tried} >= {-1, 0, 1}
    assert min(tried) < found < max(tried)
    assert len(tried) == len(set(tried))
    steps = [2 * math.log2(rate / 1e-3) for rate in tried]
    assert all(abs(step - round(step)) < 1e-9 for step in steps), "one grid for all methods"


def test_a_diverged_rate_is_never_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "measure", lambda cell, rate, *_: math.inf if rate > 1e-3 else 1e-3 / rate)
    assert quality.choose_rate(("t", "lora", 1), tmp_path / "none.jsonl", tmp_path) == 1e-3


def test_cells_run_at_the_rate_chosen_on_val_and_seed_0():
    lines = [
        record(rate=1e-3, loss=2.0, test=9.0),
        record(rate=2e-3, loss=2.1, test=1.0),
        record(rate=1e-3, seed=1, loss=5.0),
        record(rate=2e-3, seed=1, loss=1.0),
    ]
    (chosen,) = tables.choose(lines).values()
    assert chosen.rate == 1e-3
    assert sorted(chosen.runs) == [0, 1]


def test_differences_are_paired_by_seed_and_task():
    lines = [record(seed=s, test=10.0 * (s + 1)) for s in range(3)]
    lines += [record(method="dynlora", seed=s, test=9.0 * (s + 1)) for s in range(2)]
    cells = tables.choose(lines)
    assert tables.paired(cells, ["t", "u"], ("dynlora", 1), ("lora", 1), "test") == {
        "t": [pytest.approx(100 * math.log(0.9))] * 2
    }
    assert tables.interval({"t": [-10.0, -10.0], "u": [-10.0]}) == (-10, -10, -10)


def test_the_interval_counts_tasks_not_runs():
    """Many seeds of two tasks that disagree do not make a narrow interval."""
    _, low, high = tables.interval({"t": [-2.0] * 50, "u": [2.0] * 50})
    assert (low, high) == (-2, 2)


def test_mean_ranks():
    lines = [record(task=t, method=m, test=x) for t, m, x in [
        ("t", "a", 1.0), ("t", "b", 2.0), ("u", "a", 2.0), ("u", "b", 1.0), ("v", "a", 1.0), ("v", "b", 3.0),
    ]]  # fmt: skip
    ranks = tables.mean_ranks(tables.choose(lines), ["t", "u", "v"], ["a", "b"], 1, "test")
    assert ranks == {"a": pytest.approx(4 / 3), "b": pytest.approx(5 / 3)}


def test_results_are_written_from_any_state():
    assert "0 runs" in tables.results([], ["e2e"], ["dolly"], ["lora"])
    text = tables.results([record(task="e2e"), record(task="dolly")], ["e2e"], ["dolly"], ["lora"])
    assert "| `lora` | 2.0000 (1) |" in text, "design tasks show val"
    assert "| `lora` | 3.0000 (1) |" in text, "final tasks show test"


@pytest.mark.parametrize("name", ["chat", "e2e", "shakespeare", "mix", "spam"])
def test_no_prompt_is_in_two_parts(name, tmp_path):
    if not (tasks.SHARED / "data").is_dir():
        pytest.skip("no shared data sets (DYNLORA_SHARED)")
    folder = tasks.prepare(name, tmp_path)
    prompts = {}
    for part in ("train", "val", "test"):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(rows) >= 100
        prompts[part] = {row.get("prompt") or row["text"] for row in rows}
    assert not prompts["train"] & prompts["val"]
    assert not (prompts["train"] | prompts["val"]) & prompts["test"]


def test_a_longer_task_has_the_same_rows_and_another_number_of_steps():
    longer = tasks.find_task("e2e@800")
    assert (longer.steps, tasks.TASKS["e2e"].steps) == (800, 200)
    assert (longer.rows, longer.model, longer.batch) == (tasks.TASKS["e2e"].rows, "stories3M", 4)
    assert tasks.base_name("e2e@800") == "e2e"
    assert not any("@" in name for name in tasks.TASKS), "design and final are of the usual length"


@pytest.mark.parametrize("name", ["e2e@", "e2e@0", "e2e@long", "nothing", "nothing@800"])
def test_a_wrong_task_is_told(name):
    with pytest.raises(SystemExit, match=name.partition("@")[0]):
        tasks.find_task(name)


def test_the_search_at_a_new_length_begins_where_the_usual_one_ended():
    lines = [record(task="e2e", rate=2e-3, loss=1.0), record(task="dolly", rate=1.6e-2)]
    assert quality.first_rate(("e2e@800", "lora", 1), lines) == 2e-3
    assert quality.first_rate(("e2e@800", "lora", 1), [*lines, record(task="e2e@800", rate=8e-3)]) == 8e-3


def test_lines_of_another_file_get_their_own_page(tmp_path, monkeypatch):
    usual = tmp_path / "quality.jsonl"
    usual.write_text(json.dumps(record(task="e2e", test=2.0)) + "\n", encoding="utf-8")
    monkeypatch.setattr(quality, "RESULTS", usual)
    longer = tmp_path / "quality_long.jsonl"
    longer.write_text(json.dumps(record(task="e2e@800", test=1.0)) + "\n", encoding="utf-8")
    quality.write_tables(longer, ["e2e"])
    assert not (tmp_path / "RESULTS.md").exists()
    text = (tmp_path / "quality_long.md").read_text(encoding="utf-8")
    assert "| e2e | 1 | 200 |" in text
    assert "| e2e | 1 | 800 |" in text
    quality.write_tables(usual, ["e2e"])
    assert "@800" not in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def test_the_lead_is_told_by_length_with_its_spread():
    long = [record(task="e2e@800", seed=s, test=4.0) for s in range(2)]
    long += [record(task="e2e@800", method="dynlora", seed=s, test=4.0 * (1 + 0.01 * s)) for s in range(2)]
    usual = [record(task="e2e", test=4.0), record(task="e2e", method="dynlora", test=3.96), record(task="dolly")]
    text = lengths.page(long, usual)
    assert "| `dynlora` | 1 | -1.0 % (-1.0 to -1.0), 1 task, 1 run | +0.5 % (+0.0 to +1.0), 1 task, 2 runs |" in text
    assert "+0.5 % (+0.0 to +1.0; 2)" in text
    assert "dolly" not in text, "a task without a longer run"
