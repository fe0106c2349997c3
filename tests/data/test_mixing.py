"""How often the rows of each source come up, and in which order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_helpers import byte_tokenizer, dataset, source, task_named

from dynlora_cli.data.batches import Batches
from dynlora_cli.data.examples import OneText
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.mix import Span, drawn, evenly, mix_notes, mix_on_record, passes
from dynlora_cli.runs.report.page import _flat

from recipe_helpers import MINIMAL, load, problems


def rows(path: Path, prompts: list[str]) -> Path:
    lines = (json.dumps({"prompt": f"{prompt}: ", "completion": f"answer {at}"}) for at, prompt in enumerate(prompts))
    path.write_text("\n".join(lines))
    return path


def read(*sources: Any, **settings: Any) -> Data:
    return load_data(dataset(*sources, **settings), byte_tokenizer(), task=task_named(), seed=settings.get("seed", 0))


def examples(count: int) -> list[OneText]:
    return [OneText([5] * (3 + row % 7), [-100, *[5] * (2 + row % 7)], row) for row in range(count)]


def batches(count: int, *spans: Span, **settings: Any) -> Batches:
    defaults: dict[str, Any] = {"max_length": 40, "pad_id": 0, "micro_batch_size": 2, "accumulation": 2}
    return Batches(examples(count), spans=spans, **(defaults | settings))


def epoch_of(made: Batches, epoch: int) -> list[int]:
    steps = (made.step(epoch, index) for index in range(made.steps_per_epoch))
    return [row for step in steps for batch in step for row in batch.rows]


def test_weights_say_how_often_a_row_comes_up() -> None:
    made = batches(30, Span("a", 10, 20), Span("b", 20, 10), seed=3)
    first, second = epoch_of(made, 0), epoch_of(made, 1)
    assert made.steps_per_epoch == 8
    for epoch in (first, second):
        counts = Counter(epoch)
        assert [counts[row] for row in range(10)] == [2] * 10
        assert sum(counts[row] for row in range(10, 30)) == 10
    halves = [{row for row in epoch if row >= 10} for epoch in (first, second)]
    assert halves[0] | halves[1] == set(range(10, 30))  # the second epoch has the other half
    assert first != second


@pytest.mark.parametrize("draws", [2, 5, 12, 5 * 7])
def test_a_pass_is_how_often_a_row_came_up_before(draws: int) -> None:
    seen: Counter[int] = Counter()
    for epoch in range(4):
        for row, number in zip(drawn(5, draws, epoch, "x"), passes(5, draws, epoch), strict=True):
            assert number == (epoch if draws == 5 else seen[row])
            seen[row] += 1


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_depends_on_epoch_and_number_alone(packing: bool) -> None:
    spans = (Span("a", 10, 15), Span("b", 20, 6))
    made, again = (batches(30, *spans, packing=packing) for _ in range(2))
    wanted = [epoch_of(made, epoch) for epoch in range(4)]
    assert [epoch_of(again, epoch) for epoch in (3, 2, 1, 0)] == wanted[::-1]
    assert len({tuple(epoch) for epoch in wanted}) == 4


def test_devices_share_the_rows_of_a_step() -> None:
    spans = (Span("a", 10, 15), Span("b", 20, 6), Span("c", 3, 4, replayed=True))
    alone = batches(33, *spans)
    parts = [batches(33, *spans, shards=2, shard=shard) for shard in range(2)]
    for index in range(alone.steps_per_epoch):
        both = [row for part in parts for batch in part.step(2, index) for row in batch.rows]
        assert sorted(both) == sorted(row for batch in alone.step(2, index) for row in batch.rows)


@pytest.mark.parametrize("packing", [False, True])
def test_weights_of_one_change_nothing(packing: bool) -> None:
    plain = batches(30, packing=packing)
    spans = batches(30, Span("a", 10, 10), Span("b", 20, 20), packing=packing)
    assert [epoch_of(plain, epoch) for epoch in range(2)] == [epoch_of(spans, epoch) for epoch in range(2)]


def test_packed_lines_hold_rows_of_one_source_where_sources_weigh_differently() -> None:
    made = batches(60, Span("a", 20, 40), Span("b", 40, 20), packing=True, micro_batch_size=1, accumulation=1)
    lines = [batch for epoch in range(2) for index in range(made.steps_per_epoch) for batch in made.step(epoch, index)]
    assert all(len({row < 20 for row in line.rows}) == 1 for line in lines)
    counts = Counter(row for line in lines for row in line.rows)
    assert [counts[row] for row in range(20)] == [4] * 20
    assert sum(counts[row] > 0 for row in range(20, 60)) == 40


def test_without_shuffling_rows_come_as_they_stand() -> None:
    made = batches(9, Span("a", 4, 2), Span("b", 3, 6), Span("c", 2, 2), shuffle=False)
    assert epoch_of(made, 0) == [0, 1, 4, 5, 6, 4, 5, 6, 7, 8]
    assert epoch_of(made, 1) == [2, 3, 4, 5, 6, 4, 5, 6, 7, 8]


def test_without_shuffling_replayed_rows_are_spread_between_the_others() -> None:
    made = batches(12, Span("a", 8, 8), Span("old", 4, 2, replayed=True), shuffle=False)
    assert epoch_of(made, 0) == [0, 1, 8, 2, 3, 4, 5, 9, 6, 7]
    assert epoch_of(made, 1) == [0, 1, 10, 2, 3, 4, 5, 11, 6, 7]


def test_evenly_and_drawn() -> None:
    assert evenly([3, 0]).tolist() == [0, 1, 2]
    assert evenly([4, 2]).tolist() == [0, 1, 4, 2, 3, 5] or evenly([4, 2]).tolist() == [0, 4, 1, 2, 5, 3]
    assert [drawn(5, 2, epoch, None).tolist() for epoch in range(3)] == [[0, 1], [2, 3], [4, 0]]
    walks = [drawn(8, 4, epoch, "x").tolist() for epoch in range(4)]
    assert sorted(walks[0] + walks[1]) == list(range(8))
    assert walks[2:] == walks[:2]
    assert walks[0] != drawn(8, 4, 0, "y").tolist()


def test_sources_are_drawn_from_by_weight_after_the_split(tmp_path: Path) -> None:
    one, two = (rows(tmp_path / f"{name}.jsonl", [f"{name}{at}" for at in range(20)]) for name in "ab")
    data = read(source(one, weight=2), source(two, weight=0.5), val_size=0.25)
    assert sum(span.rows for span in data.spans) == len(data.train) == 30
    assert [round(span.draws / span.rows, 1) for span in data.spans] == [2.0, 0.5]
    (note,) = mix_notes(data.spans)
    assert note in data.notes
    assert f"({data.spans[0].rows} rows, each 2 times)" in note
    assert not any(note.startswith("an epoch") for note in read(one, two).notes)


def test_so_many_rows_are_chosen_by_seed_and_prompt(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", [f"q{at // 2}" for at in range(40)])
    found = [read(source(path, rows=10), seed=seed) for seed in (0, 0, 1)]
    numbers = [[example.row for example in data.train] for data in found]
    assert numbers[0] == numbers[1] != numbers[2]
    assert numbers[0] == sorted(numbers[0]) != list(range(10))
    assert len(numbers[0]) == 10
    assert {number // 2 for number in numbers[0]} == {number // 2 for number in numbers[0] if number % 2}
    assert f"{path}: 10 of 40 rows, chosen by seed 0" in found[0].notes
    # An odd number takes one prompt apart; more rows than there are, is said.
    assert len(read(source(path, rows=11)).train) == 11
    assert any("it has 40 rows, fewer than `rows: 50`" in note for note in read(source(path, rows=50)).notes)


def test_rows_to_measure_on_may_be_limited_too(tmp_path: Path) -> None:
    one, two = (rows(tmp_path / f"{name}.jsonl", [f"{name}{at}" for at in range(20)]) for name in "ab")
    data = read(one, val=[source(two, rows=5)])
    assert (len(data.train), len(data.val)) == (20, 5)


@pytest.mark.slow
def test_the_built_in_rows_are_limited_to_train_on_alone() -> None:
    data, all_of_them = (read(source("builtin:stdlib-docs", rows=most)) for most in (50, None))
    assert len(data.train) == 50
    assert len(data.val) == len(all_of_them.val)


def test_recipes_take_weights_and_refuse_what_means_nothing() -> None:
    recipe = load("model: builtin:tiny\ndataset:\n  train: [{path: a, weight: 2}, {path: b, rows: 5}, c]\n")
    assert [(item.weight, item.rows) for item in recipe.dataset.train] == [(2.0, None), (1.0, 5), (1.0, None)]
    bad = "model: builtin:tiny\ndataset:\n  train: [{path: a, weight: 0}]\n  val: [{path: b, weight: 2}]\n"
    assert problems(bad) == [
        "recipe.yaml:3: dataset.train.0.weight: got 0, must be a number, above 0 and at most 1000",
        "recipe.yaml:4: dataset.val.0.weight: `weight` belongs under `dataset.train`",
    ]
    (found,) = problems(MINIMAL, "dataset.shuffle=false", "dataset.packing=true")
    assert "dataset.shuffle: packing puts rows together by their lengths" in found


@pytest.mark.parametrize(("value", "share"), [("5%", 0.05), ("0.2", 0.2), ("12.5 %", 0.125)])
def test_a_share_of_replay_is_a_number_or_percent(value: str, share: float) -> None:
    replay = load(MINIMAL, "dataset.replay.from=out/v1", f"dataset.replay.share={value}").dataset.replay
    assert replay is not None
    assert (replay.origin, replay.share) == ("out/v1", share)


@pytest.mark.parametrize("value", ["0", "1", "100%", "five", "true"])
def test_other_shares_are_refused(value: str) -> None:
    (found,) = problems(MINIMAL, "dataset.replay.from=out/v1", f"dataset.replay.share={value}")
    assert "must be a share above 0 and below 1, such as 5% or 0.05" in found


def test_replay_needs_a_run() -> None:
    (found,) = problems(MINIMAL, "dataset.replay.share=0.1")
    assert "dataset.replay.from: of which run?" in found


def test_a_report_lists_what_an_epoch_is_made_of() -> None:
    record = {"data": {"mix": mix_on_record([Span("a.jsonl", 10, 20), Span("v1, replayed", 5, 2, replayed=True)])}}
    assert dict(_flat(record)) == {
        "data.mix.0": "source a.jsonl, rows 10, draws 20",
        "data.mix.1": "source v1, replayed, rows 5, draws 2, replayed True",
    }
