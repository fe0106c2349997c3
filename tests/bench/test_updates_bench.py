"""scripts/bench/updates/updates.py: what it calls forgetting, equal sizes, rows kept apart, and that its table is fresh."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dynlora_cli.config.load import load_recipe

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "updates"
sys.path.insert(0, str(BENCH))


import updates  # noqa: E402 - they are scripts, not a package
import updates_runs as runs  # noqa: E402
import updates_tables as tables  # noqa: E402
import updates_tasks as tasks  # noqa: E402


def test_forgetting_is_what_was_once_there():
    matrix = [{"a": 2.0, "text": 3.0}, {"a": 1.0, "b": 4.0, "text": 3.0}, {"a": 5.0, "b": 4.5, "c": 6.0, "text": 3.5}]
    found = tables.numbers(matrix, ["a", "b", "c"], tables.LOSS)
    assert found is not None
    assert found.average == pytest.approx((5 + 4.5 + 6) / 3)
    assert found.learned == pytest.approx((2 + 4 + 6) / 3)
    assert found.forgetting == pytest.approx(((5 - 1) + (4.5 - 4)) / 2), "a was at its best after b"
    assert found.backward == pytest.approx(((2 - 5) + (4 - 4.5)) / 2)
    assert found.general == 3.5


def test_a_share_of_right_answers_is_forgotten_when_it_falls():
    matrix = [{"a": 0.9, "text": 0.0}, {"a": 0.4, "b": 0.8, "text": 0.0}]
    found = tables.numbers(matrix, ["a", "b"], tables.EXACT)
    assert found is not None
    assert (found.forgetting, found.backward) == (pytest.approx(0.5), pytest.approx(-0.5))


def test_adapters_of_their_own_forget_nothing():
    found = tables.numbers([{"a": 1.0, "text": 3.0}, {"b": 2.0, "text": 5.0}], ["a", "b"], tables.LOSS)
    assert found is not None
    assert (found.average, found.forgetting, found.general) == (1.5, 0.0, 4.0)


def test_a_stream_that_is_not_through_has_no_numbers():
    assert tables.numbers([{"a": 1.0, "text": 3.0}], ["a", "b"], tables.LOSS) is None


@pytest.mark.parametrize("name", runs.METHODS)
def test_all_methods_end_with_the_same_number_of_components(name):
    stream, method = runs.STREAMS["domains"], runs.METHODS[name]
    budgets = [runs.ranks(method, stream, stage)["rank.budget"] for stage in range(5)]
    assert (budgets[-1] if method.goes_on else sum(budgets)) == stream.share * 5


def test_orders_are_three_different_ones_of_all_ten_tasks():
    stream = runs.STREAMS["tasks"]
    orders = [stream.order(number) for number in stream.orders]
    assert len({tuple(order) for order in orders}) == 3
    assert all(set(order) == set(tasks.TASKS) for order in orders)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["law", "finance", "medicine", "arithmetic", "agnews"])
def test_no_prompt_is_in_two_parts(name, tmp_path):
    if not (tasks.SHARED / "data").is_dir():
        pytest.skip("no shared data sets (DYNLORA_SHARED)")
    (tmp_path / "data").mkdir()
    folder = tasks.prepare(name, tmp_path)
    prompts = {
        part: {
            json.loads(line)["prompt"] for line in (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        }
        for part in tasks.ROWS
    }
    assert all(len(found) >= 40 for found in prompts.values())
    assert not prompts["train"] & prompts["val"]
    assert not (prompts["train"] | prompts["val"]) & prompts["test"]


def test_the_table_is_what_the_lines_say():
    lines = updates.read_lines(updates.RESULTS)
    fresh = tables.page(lines, runs.STREAMS, runs.METHODS)
    assert updates.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == fresh


@pytest.mark.parametrize("name", runs.METHODS)
def test_a_later_update_is_a_recipe_without_problems(name, tmp_path):
    method, stream = runs.METHODS[name], runs.STREAMS["domains"]
    (tmp_path / "blank.yaml").write_text("model: builtin:tiny\ndataset: none.jsonl\n", encoding="utf-8")
    settings = {**runs.ranks(method, stream, 1), **runs.later_settings(method, tmp_path / "v1")}
    recipe = load_recipe(tmp_path / "blank.yaml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    assert recipe.adapter.origin == str(tmp_path / "v1")
