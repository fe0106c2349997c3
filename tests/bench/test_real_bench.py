"""The yardstick of scripts/bench/real.py: tools as they ship, who sees which rows, and what the tables compare."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import real  # noqa: E402 - they are scripts, not a package
import real_methods as methods  # noqa: E402
import real_picture as picture  # noqa: E402
import real_tables as tables  # noqa: E402
import real_tasks as tasks  # noqa: E402
import real_tools as tools  # noqa: E402


def line(method="lora", rank=16, rate=1e-3, loss=2.0, test=2.0, task="e2e", seed=0, **more):
    costs = (
        {"cpu_total": 50.0, "cpu_race": 5.0} if method.startswith("dynlora") else {"cpu_load": 2.0, "cpu_train": 97.0}
    )
    return {
        "task": task, "method": method, "rank": rank, "rate": rate, "seed": seed, "loss": loss, "test": test,
        "test_error": 0.1, "general": 3.1, "general_before": 3.0, "parameters": 100, "bytes": 400, "cpu_val": 1.0,
        "steps": 10, "rate_used": rate or 1e-3, **costs, **more,
    }  # fmt: skip


def swept(task="e2e"):
    """A finished sweep whose best is rank 16 at 1e-3, 2.0 on test."""
    return [
        line(rank=rank, rate=rate, loss=2.0 + 0.1 * (rank != 16) + 0.2 * (rate != 1e-3), test=2.0, task=task)
        for rank in (4, 16, 64) for rate in (5e-4, 1e-3, 2e-3)
    ]  # fmt: skip


def test_schedules_are_those_of_transformers():
    axolotl, llamafactory = tools.TOOLS["axolotl"], tools.TOOLS["llamafactory"]
    assert axolotl.shares(4)[0] == 1.0, "a tenth of four steps is rounded down to no warm-up"
    assert llamafactory.shares(40)[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert tools.TOOLS["tinker"].shares(4) == [1.0, 0.75, 0.5, 0.25]
    assert max(tools.TOOLS["torchtune"].shares(40)) == pytest.approx(0.39), "its 100 steps of warm-up never end"


def test_our_batch_changes_nothing_else():
    shipped, ours = tools.tool("axolotl"), tools.tool("axolotl+batch8")
    assert (ours.rows, ours.accumulation, ours.packed) == (8, 1, 0)
    assert (ours.rank, ours.rate, ours.warmup, ours.dropout) == (shipped.rank, shipped.rate, shipped.warmup, 0.05)
    assert not tools.needs_our_batch("llamafactory")
    assert tools.needs_our_batch("ms-swift")


def test_a_step_has_the_rows_that_the_tool_gives_it():
    def rows(name, tokens):
        found = methods.in_eights(tools.TOOLS[name], tokens)
        return found.rows * found.accumulation

    assert rows("axolotl", [100] * 320) == 80, "4 packed steps of 8192 tokens"
    assert {name: rows(name, [100] * 320) for name in ("llamafactory", "ms-swift", "torchtune", "tinker")} == {
        "llamafactory": 8, "ms-swift": 16, "torchtune": 32, "tinker": 128,
    }  # fmt: skip


@pytest.mark.shared
@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_parts_of_a_task_share_no_prompt(name, tmp_path):
    folder = tasks.prepare(name, tmp_path)
    parts = {part: real.read(folder / f"{part}.jsonl") for part in ("train", "val", "test")}
    prompts = {part: {row.get("prompt") or row["text"] for row in rows} for part, rows in parts.items()}
    assert len(parts["train"]) == tasks.TASKS[name].train
    assert len(parts["val"]) >= 48
    assert not prompts["train"] & prompts["val"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["val"] & prompts["test"]


def test_rows_of_ones_own_are_a_task(tmp_path):
    rows = [{"prompt": f"p{number}", "completion": "c"} for number in range(100)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    folder = tasks.prepare(str(file), tmp_path / "work")
    parts = [real.read(folder / f"{part}.jsonl") for part in ("train", "val", "test")]
    assert sorted(row["prompt"] for part in parts for row in part) == sorted(row["prompt"] for row in rows)
    assert all(parts)
    assert f"## {file}" in tables.page([line(task=str(file))])


def test_a_run_that_is_there_is_not_run_again_and_the_grid_is_extended(monkeypatch, tmp_path):
    ran = []

    beaten = []

    def run(job, work, keep, beat):
        ran.append(job)
        beaten.append(beat)
        return {"loss": abs(math.log2(job.rate / 6.4e-3))}

    monkeypatch.setattr(methods, "run", run)
    bench = real.Bench(tmp_path / "lines.jsonl", tmp_path, None, "")
    assert bench.tuned("e2e", "lora", 16, 2)["rate"] == pytest.approx(6.4e-3)
    assert {job.seed for job in ran} == {0, 1}
    assert beaten[:3] == pytest.approx([math.inf, 2.0, 1.0]), (
        "of a rate that is worse than an earlier one, test is not read"
    )
    assert beaten[-1] == math.inf, "another seed is measured in full"
    count = len(ran)
    bench.tuned("e2e", "lora", 16, 2)
    assert len(ran) == count


def test_ours_of_another_state_of_the_code_is_another_method(monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "run", lambda *_: {"loss": 1.0})
    found = [
        real.Bench(tmp_path / "a.jsonl", tmp_path, None, name).record("e2e", "dynlora", 0, 0.0, 0)
        for name in ("old", "")
    ]
    assert [one["method"] for one in found] == ["dynlora@old", "dynlora"]


def test_the_search_for_the_rate_is_in_the_total_and_told_apart():
    told = {"rate_seconds": 20.0, "seconds": 100.0}
    assert methods._spent(0.0, 5.0, 105.0, told) == {"cpu_total": 105.0, "cpu_race": 20.0, "cpu_train": 85.0}
    assert methods._spent(0.0, 5.0, 105.0, told | {"rate_seconds": None})["cpu_race"] == 0.0


def test_the_table_compares_with_the_sweeps_best_and_counts_all_of_its_time():
    records = [*swept(), line("dynlora", 0, 0.0, test=2.02), line("axolotl", 0, 0.0, test=2.5)]
    page = tables.page(records)
    assert tables.sweep_cost(records, "e2e") == 9 * 100.0
    assert "| dynlora, nothing set | +1.0 (6 %) | +1.00 |" in page
    assert "| axolotl as shipped | +22.3 (11 %) | +22.31 |" in page
    assert "not finished" not in page
    assert "not finished on: e2e" in tables.page(records[4:])


def test_what_was_tried_to_explain_a_result_stands_with_its_task_alone():
    extra = [line("dynlora rank.init=4", 0, 0.0), line("dynlora@four", 0, 0.0), line("axolotl+stretched", 0, 0.0)]
    summary, details = tables.page([*swept(), *extra]).split("## e2e")
    assert "rank.init=4" not in summary
    assert "@four)" not in summary
    assert "axolotl as shipped, for as many seconds as ours" in summary
    assert "rank.init=4" in details


def test_runs_are_compared_seed_by_seed():
    records = [*swept(), line(rate=1e-3, seed=1, test=2.2)]
    reference = tables.levels(records, "e2e")
    assert reference == {0: 2.0, 1: 2.2}
    ours = [line("dynlora", 0, 0.0, test=2.0), line("dynlora", 0, 0.0, test=2.2, seed=1)]
    assert tables.above([*ours, line("dynlora", 0, 0.0, test=9.0, seed=2)], reference) == pytest.approx(0.0)
    assert tables.levels([r for r in records if r["rank"] != 64], "e2e") == {}, "the sweep is not finished"


def test_the_picture_has_a_bar_for_ours_and_for_each_tool(tmp_path):
    records = [*swept(), line("dynlora", 0, 0.0, test=2.02), line("axolotl", 0, 0.0, test=2.5)]
    tables.write_tables(records, tmp_path)
    drawn = (tmp_path / "real.svg").read_text("utf-8")
    assert drawn.count("<rect") == 2
    assert "prefers-color-scheme:dark" in drawn
    assert drawn.index("dynlora, nothing set") < drawn.index("axolotl")
    tables.write_tables(records[-2:], tmp_path)
    assert not (tmp_path / "real.svg").exists(), "a picture of other lines would stay"
    assert "-3.0 %" in picture.bars([picture.Bar("a", [-3.0], "", strong=True)], "t", "b")


def test_the_committed_page_is_made_from_the_committed_lines():
    assert (BENCH / "REAL.md").read_text("utf-8") == tables.page(real.read(BENCH / "real.jsonl"))
