"""A sweep as numbers: means over seeds, intervals, what is called the best, and what does not compare."""

from __future__ import annotations

import csv
import io
import json
import statistics
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dynlora_cli.runs import sweep
from dynlora_cli.runs.report.sweep import sentences, size_chart, sweep_card, sweep_page
from dynlora_cli.runs.sweep import interval, summarize, t_quantile, why_not_compared


def rows(losses: dict[tuple[int, int], float | None], **more) -> list[sweep.Row]:
    """Runs of budgets and seeds with these losses; None: it failed."""
    found = []
    for (budget, seed), loss in losses.items():
        row = sweep.Row(run=f"budget-{budget}_seed-{seed}", folder="x", values={"rank.budget": budget, "seed": seed})
        done = {f"{key}_after": value for key, value in (more | {"loss": loss}).items()}
        done |= {"parameters": 100 * budget, "seconds": 1.0, "steps": 5, "average_rank": float(budget)}
        failed = {**row, "state": "failed", "error": "boom", "exit_code": 4}
        found.append(failed if loss is None else sweep.of_summary(row, done))
    return found


def record(several: list[sweep.Row], notes=()) -> dict:
    combinations = summarize(several, "seed")
    best = sweep.best_run(several, combinations)
    keys = {key: sorted({row["values"][key] for row in several}) for key in several[0]["values"]}
    return {"name": "mine", "keys": keys, "runs": several, "combinations": combinations, "notes": list(notes),
            "best": best and best["run"]}  # fmt: skip


def test_quantiles_are_those_of_the_tables():
    known = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    assert {freedom: round(t_quantile(freedom), 4) for freedom in known} == known


def test_an_interval_is_students():
    values = [1.0, 1.2, 1.1, 1.5]
    half = 3.1824463 * statistics.stdev(values) / 2
    assert interval(values) == pytest.approx((1.2 - half, 1.2 + half), rel=1e-6)
    assert interval([1.0]) == interval([]) == (None, None), "one seed tells nothing about others"


def test_seeds_are_averaged_and_compared_pairwise():
    # What a seed does to both budgets alike is far larger than the difference, which is the same in each.
    found = summarize(rows({(b, s): s + (0.01 if b == 2 else 0.0) for b, s in product((2, 4), (0, 1, 2))}), "seed")
    two, four = found
    assert (two["mean"]["loss"], four["mean"]["loss"]) == pytest.approx((1.01, 1.0))
    assert two["low"] < four["mean"]["loss"] < two["high"], "by themselves they cannot be told apart"
    assert (two["best"], four["best"]) == (False, True)
    assert two["behind"]["loss"] == pytest.approx(0.01)
    assert two["behind"]["low"] == pytest.approx(0.01), "seed by seed they can"
    assert two["behind"]["seeds"] == 3
    assert four["behind"] is None


def test_one_seed_has_no_interval_and_it_is_said():
    whole = record(rows({(2, 0): 1.0, (4, 0): 0.9}))
    assert [one["low"] for one in whole["combinations"]] == [None, None]
    assert "no interval" in " ".join(sentences(whole))


def test_the_best_is_chosen_among_those_with_most_seeds():
    whole = record(rows({(2, 0): 1.0, (2, 1): 1.1, (4, 0): 0.5, (4, 1): None}))
    assert [one["best"] for one in whole["combinations"]] == [True, False], "a lucky half is no mean"
    assert whole["best"] == "budget-2_seed-0"
    assert "1 failed" in " ".join(sentences(whole))
    assert "budget-4_seed-1 failed: boom" in sweep_card(whole)


def test_of_seeds_alone_the_lowest_is_named():
    whole = record([{**row, "values": {"seed": row["values"]["seed"]}} for row in rows({(2, 0): 1.0, (2, 1): 0.8})])
    assert len(whole["combinations"]) == 1
    assert whole["best"] == "budget-2_seed-1"
    assert whole["combinations"][0]["low"] is not None


def test_a_choice_by_held_out_rows_is_called_optimistic():
    assert "optimistic" in sentences(record(rows({(2, 0): 1.0, (4, 0): 0.9})))[-1]
    assert "optimistic" not in " ".join(sentences(record(rows({(2, 0): None, (4, 0): None}))))


def test_a_sentence_that_begins_with_a_runs_name_leaves_the_name_as_it_is():
    several = rows({(2, 0): 1.0, (4, 0): 0.9})
    lines = sentences(record(several, ["budget-2_seed-0 and budget-4_seed-0 differ", "each seed holds out other rows"]))
    assert {"budget-2_seed-0 and budget-4_seed-0 differ.", "Each seed holds out other rows."} <= set(lines)


def test_losses_that_measure_something_else_are_not_compared():
    several = rows({(2, 0): 1.0, (2, 1): 1.1, (4, 0): 0.9, (4, 1): 0.95})
    judges = [{"held-out rows": str(row["values"]["seed"]), "tokens": "t"} for row in several]
    assert why_not_compared(zip(several, judges, strict=True), "seed") == [], "rows may differ from seed to seed"
    judges[2] = {"held-out rows": "0", "tokens": "u"}
    (text,) = why_not_compared(zip(several, judges, strict=True), "seed")
    assert text == "budget-2_seed-0 and budget-4_seed-0 are measured with different tokens"
    assert not any(one["best"] for one in summarize(several, "seed", compared=False))


def test_the_table_is_a_line_for_each_run(tmp_path: Path):
    whole = record(rows({(2, 0): 1.0, (4, 0): None}, accuracy=0.5))
    sweep.write(tmp_path, whole)
    sweep.write_table(tmp_path, whole)
    first, second = csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text("utf-8")))
    assert (first["run"], first["rank.budget"], first["state"], first["loss"], first["accuracy"]) == (
        "budget-2_seed-0", "2", "done", "1.0", "0.5",
    )  # fmt: skip
    assert (second["state"], second["loss"], second["exit_code"], second["error"]) == ("failed", "", "4", "boom")
    assert json.loads((tmp_path / "sweep.json").read_text("utf-8")) == json.loads(json.dumps(whole))


def pictures(page: str) -> list[ElementTree.Element]:
    parts = page.split("<svg")[1:]
    return [ElementTree.fromstring(f"<svg{part.partition('</svg>')[0]}</svg>") for part in parts]


def test_the_picture_has_a_point_with_its_interval_for_each_combination():
    whole = record(rows({(b, s): 2 / b + 0.01 * s for b, s in product((1, 2, 4), (0, 1, 2))}))
    broad, small = pictures(size_chart(whole))
    for picture in (broad, small):
        points = [mark for mark in picture.iter("circle") if "mean" in mark.get("class", "")]
        assert len(points) == 3
        xs, ys = zip(*((float(p.get("cx", 0)), float(p.get("cy", 0))) for p in points), strict=True)
        assert xs == tuple(sorted(xs)), "larger ones to the right"
        assert ys == tuple(sorted(ys)), "lower losses further down"
        assert sum("range" in mark.get("class", "") for mark in picture.iter("path")) == 3
        assert sum("joined" in mark.get("class", "") for mark in picture.iter("path")) == 1
        assert sum("best" in mark.get("class", "") for mark in points) == 1
    page = sweep_page(whole)
    assert "budget-1_seed-0/report.html" in page
    assert "http" not in page, "nothing is fetched from elsewhere"


def test_what_differs_beside_the_budget_is_a_line_of_its_own():
    several = rows({(b, s): b - 0.1 * s for b, s in product((1, 2), (0, 1))})
    for row in several:  # two policies instead of two seeds
        row["values"] = {"rank.budget": row["values"]["rank.budget"], "pruning.policy": f"<{row['values']['seed']}>"}
    broad = size_chart(record(several))
    assert broad.count('class="joined"') == 2 * 2
    assert "pruning.policy=&lt;0&gt;" in broad


def test_equal_sizes_have_no_picture_but_the_table():
    several = [{**row, "parameters": 7} for row in rows({(1, 0): 1.0, (2, 0): 2.0})]
    assert size_chart(record(several)) == ""
    assert sweep_page(record(several)).count('class="spread s0"') == 2


def test_before_anything_has_run_there_are_pages_too():
    waiting = [sweep.Row(run=f"r{n}", folder="x", values={"seed": n}, state="waiting") for n in (0, 1)]
    assert "0 of 2 runs done, 2 not run yet" in sweep_page(record(waiting))
    assert "r0" in sweep_page(record(waiting))
