"""scripts/bench/routers/: rows kept apart, no prompt that names its task, equal sizes, and a table that is fresh."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dynlora_cli.config.load import load_recipe

BENCH = Path(__file__).parents[2] / "scripts" / "bench" / "routers"
sys.path.insert(0, str(BENCH))

import make  # noqa: E402 - they are scripts, not a package
import router_measures as measures  # noqa: E402
import router_rows as rows  # noqa: E402
import router_tables as tables  # noqa: E402
import run  # noqa: E402


def source(*prompts: str, part: str | None = None) -> list[tuple[str | None, str, rows.Row]]:
    return [(part, prompt, {"prompt": f"{prompt}\n", "completion": "yes"}) for prompt in prompts]


def test_a_prompt_is_in_one_part_alone_and_in_a_given_test_part_before_all_others():
    found = rows.parts(iter(source(*map(str, range(400))) + source("7", "8", "7", part="test")))
    prompts = {part: [row["prompt"] for row in some] for part, some in found.items()}
    assert sorted(prompts["test"]) == ["7\n", "8\n"], "once each"
    assert not set(prompts["train"]) & {"7\n", "8\n"}
    assert not set(prompts["train"]) & set(prompts["val"])
    assert prompts["val"]


def test_rows_of_a_group_stay_together():
    same = [(None, f"passage {number % 20}", row) for number, (_, _, row) in enumerate(source(*map(str, range(200))))]
    found = rows.parts(iter(same))
    groups = {part: {int(row["prompt"]) % 20 for row in some} for part, some in found.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["val"]
    assert sum(len(some) for some in found.values()) == 200


def test_texts_are_cut_at_words():
    assert rows._cut(" one two three", 9) == "one two"
    assert rows._cut("one two", 7) == "one two"
    assert rows._cut("abcdefgh", 3) == "abc"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*rows.TASKS, *rows.STRANGERS])
def test_no_prompt_names_its_task_and_all_end_alike(name, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SHARED", shared)
    found = rows.read(name, "test", tmp_path, 40)
    assert len(found) >= 36
    for row in found:
        assert row["prompt"].endswith("\n")
        assert len(row["prompt"].strip()) <= rows.PROMPT
        assert row["completion"]
        assert not any(word in row["prompt"].lower() for word in ("question:", "instruction:", name + ":"))


def test_the_adapter_for_all_has_the_size_and_the_steps_of_all_together(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "prepare", lambda task, work: work / task)
    one, joint = (make.recipe(make.SMALL, name, 0, None, tmp_path / name, tmp_path) for name in ("e2e", make.JOINT))
    assert joint["rank"]["budget"] == len(make.TASKS) * one["rank"]["budget"]
    assert joint["train"]["max_steps"] == len(make.TASKS) * one["train"]["max_steps"]
    assert len(joint["dataset"]["train"]) == len(make.TASKS)
    for name, recipe in (("e2e", one), ("joint", joint)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / f"{name}.yaml").seed == 0


def line(part: str, router: str, task: str, loss: float, **more) -> run.Record:
    return {"study": "s", "seed": 0, "part": part, "router": router, "setting": "", "task": task, "loss": loss, **more}


def test_gain_is_the_share_of_what_the_own_adapter_gains():
    lines = [line("all", "base", "a", 6.0), line("all", "oracle", "a", 2.0), line("all", "r", "a", 3.0)]
    assert tables.gain(lines, "all", lines[2:]) == pytest.approx(75)
    assert tables.above(lines, "all", [line("without", "r", "a", 6.3)]) == [pytest.approx(5)]


def test_shares_are_those_of_prompts_by_adapter():
    """Two rows of three tokens, prompts of one and of two; a layer that holds the second and the third adapter."""
    batch = SimpleNamespace(labels=torch.tensor([[-100, 5, 6], [-100, -100, 7]]))
    layer = SimpleNamespace(adapters=[1, 2], slices=[slice(0, 2), slice(2, 3)], a_RI=torch.zeros(3, 4))
    by_adapter = torch.tensor([[0.25, 0.75], [9, 9], [9, 9], [1, 0], [0.5, 0.5], [9, 9]])
    for gates in (by_adapter, by_adapter[:, [0, 0, 1]]):
        watched = measures.Watched(lambda *_, gates=gates: gates, 3)
        watched.start(batch)
        assert watched.gates(layer, torch.zeros(6, 4), torch.zeros(6, 3)) is gates
        assert watched.share_BE.tolist() == [[0, 0.25, 0.75], [0, 1.5, 0.5]]


def test_who_was_first_and_how_often():
    found = measures.Outcome(np.zeros(4), np.array([0, 1, 1, -1]))
    told = run.shares(found, "b", ("a", "b"))
    assert told == {"right": 0.5, "to_base": 0.25, "first": {"a": 0.25, "b": 0.5, "base": 0.25}}


def test_the_table_is_made_of_the_results():
    if not run.RESULTS.is_file():
        pytest.skip("nothing is measured yet")
    assert run.RESULTS.with_suffix(".md").read_text(encoding="utf-8") == tables.page(run.read_lines(run.RESULTS))
