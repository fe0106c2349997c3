"""scripts/bench/generated/text.py: its tasks cannot be told by their prompts, what is kept back stays so, the page is fresh."""

from __future__ import annotations

import json
import sys
from itertools import chain, combinations
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "generated"
sys.path.insert(0, str(BENCH))

import text_bench as bench  # noqa: E402 - they are scripts, not a package
import text_rows  # noqa: E402
import text_tables as tables  # noqa: E402
import text_tasks as tasks  # noqa: E402

needs_data = pytest.mark.skipif(not (tasks.SHARED / "data").is_dir(), reason="the data sets are not here")


def line(method, condition, found, seed=0):
    return {"method": method, "condition": condition, "seed": seed, "tasks": found}


def test_every_task_has_twelve_descriptions_of_its_own():
    every = tasks.tasks()
    assert set(every) == set(text_rows.RECIPES)
    assert len(tasks.seen()) == 41
    assert {len(task.seen) for task in every.values()} == {10}
    texts = list(chain.from_iterable(task.seen + task.kept_back for task in every.values()))
    assert len(set(texts)) == 12 * len(every)


def test_another_tasks_description_is_never_its_own():
    for name, task in tasks.tasks().items():
        others = tasks.shuffled(name)
        assert len(set(others)) == 2
        assert not set(others) & set(task.seen + task.kept_back)


def test_no_text_of_the_controls_was_seen():
    seen = set(chain.from_iterable(task.seen for task in tasks.tasks().values()))
    for condition in ("kept back", "random"):
        assert not seen & set(chain.from_iterable(bench.TEXTS[condition](name) for name in tasks.tasks()))


@needs_data
def test_the_same_prompts_are_asked_different_things():
    for family in (("first-word", "last-word", "copy"), ("sum", "larger", "in-words"), ("slot-name", "slot-food")):
        rows = [{row["prompt"]: row["completion"] for row in chain(*tasks.rows_of(name).values())} for name in family]
        for one, other in combinations(rows, 2):
            both = one.keys() & other.keys()
            assert len(both) > 20
            assert sum(one[prompt] != other[prompt] for prompt in both) > len(both) / 2


@needs_data
def test_a_test_prompt_is_in_no_tasks_training_rows():
    rows = [tasks.rows_of(name) for name in ("first-word", "uppercase", "swap-gender", "larger", "slot-keys", "stars")]
    trained = {row["prompt"] for parts in rows for row in parts["train"]}
    assert len(trained) > 1000
    assert not trained & {row["prompt"] for parts in rows for row in parts["test"] + parts["val"]}


def test_tasks_weigh_alike_and_seeds_are_averaged_first():
    lines = [
        line("a", "kept back", {"x": [10.0, 10, 1, 4], "y": [300.0, 100, 2, 4]}),
        line("a", "kept back", {"x": [30.0, 10, 3, 4], "y": [300.0, 100, 2, 4]}, seed=1),
    ]
    found = tables.cell(lines, "a", "kept back", ["x", "y"])
    assert found == (pytest.approx(2.5), pytest.approx(0.5), pytest.approx(0.5))


def test_a_difference_is_taken_task_by_task():
    lines = [
        line("a", "shuffled", {"x": [20.0, 10, 0, 4], "y": [60.0, 10, 0, 4]}),
        line("a", "kept back", {"x": [10.0, 10, 0, 4], "y": [50.0, 10, 0, 4]}),
    ]
    assert tables.difference(lines, ("a", "shuffled"), ("a", "kept back"), ["x", "y"]) == (pytest.approx(1), 0)


def test_the_page_is_that_of_the_lines():
    lines = [json.loads(text) for text in bench.RESULTS.read_text(encoding="utf-8").splitlines()]
    assert (BENCH / "text.md").read_text(encoding="utf-8") == tables.page(lines)
