"""Which of a task's descriptions a row is trained with: another in each pass, and the same ones in a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypernet_runs import WORDS, hypernet_recipe, texts_of
from test_hypernet_training import bytes_of
from tiny_run import assembled, lines, train

from dynlora_cli.data.batches import Batches
from dynlora_cli.data.descriptions import described
from dynlora_cli.errors import Interrupted


def drawn(batches: Batches, epoch: int) -> dict[int, str]:
    """The description of each row in a pass."""
    steps = (batches.step(epoch, index) for index in range(batches.steps_per_epoch))
    return {row.row: row.description for step in steps for batch in step for row in batch.examples}


@pytest.mark.parametrize("variant", ["text-gated", "text-to-lora"])
def test_each_pass_draws_anew_by_seed_row_and_pass(tmp_path: Path, variant: str):
    run = assembled(hypernet_recipe(tmp_path, variant=variant))
    again = assembled(hypernet_recipe(tmp_path, variant=variant))
    first, second, third = (drawn(run.batches, epoch) for epoch in range(3))
    assert set(first) == set(second) == {row.row for row in run.data.train}
    assert first == {row.row: row.description for row in run.data.train}, "as rows say it themselves"
    assert 20 < sum(first[row] != second[row] for row in first) < 52, "of 72 rows with two wordings about a half"
    assert second != third
    assert drawn(again.batches, 1) == second, "whatever was asked before"
    for row in run.data.train:
        assert second[row.row] in row.wordings
        assert set(row.wordings) in [set(texts_of(word)) for word in WORDS]
    other = assembled(hypernet_recipe(tmp_path, "seed=1", variant=variant))
    same = set(second) & {row.row for row in other.data.train}
    assert any(drawn(other.batches, 1)[row] != second[row] for row in same)


def test_rows_that_are_measured_keep_theirs(tmp_path: Path):
    run = assembled(hypernet_recipe(tmp_path))
    assert not any(row.wordings for row in run.data.val)
    assert all(described(row, 0, 5) is row for row in run.data.val)


def test_a_row_stays_what_it_is_but_for_its_description(tmp_path: Path):
    row = assembled(hypernet_recipe(tmp_path)).data.train[0]
    others = [described(row, 0, epoch) for epoch in range(1, 9)]
    assert {other.description for other in others} == set(row.wordings)
    assert all(other.input_ids is row.input_ids and other.row == row.row for other in others)


def test_a_run_that_goes_on_in_a_later_pass_is_the_uninterrupted_one(tmp_path: Path):
    """12 steps are a pass."""
    three = ("train.max_steps=36",)
    train(hypernet_recipe(tmp_path, *three, out="whole"))
    with pytest.raises(Interrupted):
        train(hypernet_recipe(tmp_path, *three, out="cut"), interrupt_at=20)
    train(hypernet_recipe(tmp_path, *three, out="cut"), resume=True)
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "cut")
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "cut" / "metrics.jsonl")


def test_a_wording_that_no_row_has_drawn_yet_counts_as_well(tmp_path: Path):
    """It is a part of the data: a run cannot go on with another one."""
    recipe = hypernet_recipe(tmp_path)
    rows = assembled(recipe).data
    texts = [text for word in WORDS for text in texts_of(word)]
    unused = "dataset.train.0.descriptions"
    one = hypernet_recipe(tmp_path, f"{unused}=[{texts[0]}, {'x' * 9}]")
    other = hypernet_recipe(tmp_path, f"{unused}=[{texts[0]}, {'y' * 9}]")
    assert len({rows.sha256, assembled(one).data.sha256, assembled(other).data.sha256}) == 3
