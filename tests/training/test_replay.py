"""Training on new rows and on some of an earlier run: which ones, on record, and resumed to the bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import make_recipe, model_folder, train, write_rows

from dynlora_cli.commands import dry_run, preflight
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.examples import Classified
from dynlora_cli.data.load import Data
from dynlora_cli.data.mix import Span
from dynlora_cli.data.replay import Earlier, add_replay
from dynlora_cli.errors import Interrupted, UsageError
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.setup import read_data

EARLIER = ("train.max_steps=1", "eval.steps=null")


def earlier(folder: Path, name: str = "v1", rows: int = 30, **options: Any) -> Path:
    """A short run on rows of its own."""
    kind = options.get("kind", "llama")
    path = write_rows(folder / f"{name}.jsonl", rows, labelled=kind == "bert")
    train(make_recipe(folder, f"dataset.train=[{path}]", *EARLIER, out=name, **options))
    return folder / name


def later(folder: Path, *overrides: str, **options: Any) -> Recipe:
    """A run of 12 steps, a fifth of whose rows are of `v1`."""
    return make_recipe(
        folder, f"dataset.replay.from={folder / 'v1'}", "dataset.replay.share=20%", *overrides, **options
    )


def read(recipe: Recipe) -> Data:
    return read_data(recipe, BaseFiles.find(recipe.model))


def change(folder: Path, **keys: Any) -> None:
    path = folder / "dynlora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_replayed_rows_are_those_that_the_earlier_run_trained_on(tmp_path: Path) -> None:
    earlier(tmp_path)
    alone = read(make_recipe(tmp_path, f"dataset.train=[{tmp_path / 'v1.jsonl'}]"))
    data = read(later(tmp_path))
    assert [list(row.input_ids) for row in data.replayed] == [list(row.input_ids) for row in alone.train]
    assert [(span.rows, span.draws) for span in data.spans] == [(32, 32), (24, 8)]
    numbers = [row.row for row in (*data.train, *data.val, *data.replayed)]
    assert len(set(numbers)) == len(numbers)
    assert any(note.startswith("replay: 20.0 % of the rows of an epoch, ") for note in data.notes)
    assert data.replay is not None
    assert data.replay["runs"][0]["sha256"] == alone.sha256


def test_own_rows_keep_their_hash(tmp_path: Path) -> None:
    earlier(tmp_path)
    assert read(later(tmp_path)).sha256 == read(make_recipe(tmp_path)).sha256


def test_every_run_of_a_lineage_is_replayed_evenly(tmp_path: Path) -> None:
    first, second = earlier(tmp_path, "v0", 20), earlier(tmp_path)
    births = [json.loads((run / "dynlora.json").read_text())["births"][-1] for run in (first, second)]
    change(second, births=births)
    data = read(later(tmp_path))
    assert [(span.name, span.draws) for span in data.spans[1:]] == [("v0, replayed", 4), ("v1, replayed", 4)]


def test_a_run_with_replay_can_be_replayed(tmp_path: Path) -> None:
    earlier(tmp_path)
    train(later(tmp_path, *EARLIER, out="v2"))
    data = read(make_recipe(tmp_path, f"dataset.replay.from={tmp_path / 'v2'}"))
    assert len(data.replayed) == 32  # its own rows; those that it replayed are v1's


def test_going_on_from_an_adapter_replays_its_rows_and_those_before(tmp_path: Path) -> None:
    earlier(tmp_path)
    second = make_recipe(tmp_path, f"adapter.from={tmp_path / 'v1'}", "dataset.replay.share=20%", out="v2")
    _, events = train(second)
    assert any("of the 24 rows of v1" in note for note in events[0]["notes"])
    third = read(make_recipe(tmp_path, f"adapter.from={tmp_path / 'v2'}", "dataset.replay.share=20%", out="v3"))
    assert [span.name for span in third.spans[1:]] == ["v1, replayed", "v2, replayed"]
    checkpoint = tmp_path / "v2" / "checkpoints" / "step-12"
    assert read(later(tmp_path, f"dataset.replay.from={checkpoint}", out="v4")).replay == third.replay


def test_a_dry_run_counts_the_replayed_rows(tmp_path: Path) -> None:
    earlier(tmp_path)
    plan = dry_run.plan(later(tmp_path, "train.max_steps=null", "train.epochs=1"))
    assert plan["steps"] == 10  # 32 own rows and 8 others, 4 in a step
    assert [(part["rows"], part["draws"]) for part in plan["data"]["mix"]] == [(32, 32), (24, 8)]
    assert plan["data"]["replay"]["runs"][0]["tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_resumed_run_with_weights_and_replay_ends_at_the_same_bits(tmp_path: Path, packing: str) -> None:
    earlier(tmp_path)
    sources = f"dataset.train=[{{path: {tmp_path / 'llama.jsonl'}, weight: 1.5}}]"
    options = (sources, f"dataset.packing={packing}")
    whole, _ = train(later(tmp_path, *options, out="whole"))
    stopped = later(tmp_path, *options, out="stopped")
    with pytest.raises(Interrupted):
        train(stopped, interrupt_at=7)
    train(stopped, resume=True)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert [part["draws"] for part in whole["mix"]] == [48, 12]
    record = json.loads((tmp_path / "whole" / "dynlora.json").read_text())["data"]
    assert record["replay"]["runs"][0]["name"] == "v1"
    assert record["mix"] == whole["mix"]


@pytest.mark.slow
def test_a_run_is_not_resumed_where_the_earlier_one_is_another(tmp_path: Path) -> None:
    earlier(tmp_path)
    recipe = later(tmp_path)
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=7)
    (tmp_path / "v1").rename(tmp_path / "old")
    earlier(tmp_path, rows=31)
    with pytest.raises(UsageError, match="replays are other ones"):
        train(recipe, resume=True)


def test_another_base_or_missing_runs_are_refused(tmp_path: Path) -> None:
    earlier(tmp_path)
    with pytest.raises(UsageError, match=r"v1 was trained on another model than .*gpt2"):
        read(later(tmp_path, f"model.name_or_path={model_folder(tmp_path, 'gpt2')}"))
    nowhere = make_recipe(tmp_path, f"dataset.replay.from={tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match=r"dataset.replay.from .*nowhere does not exist"):
        preflight.training(nowhere, writes=True)
    inside = make_recipe(tmp_path, f"dataset.replay.from={tmp_path / 'v1'}", out="v1")
    with pytest.raises(UsageError, match="which the new run would replace"):
        preflight.training(inside, writes=True, overwrite=True)


def test_classes_must_agree(tmp_path: Path) -> None:
    earlier(tmp_path, kind="bert")
    assert Counter(row.label for row in read(later(tmp_path, kind="bert")).replayed)[1] > 0
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "bert.jsonl").read_text().replace('"few"', '"less"'))
    with pytest.raises(UsageError, match="trained on the classes few, many, and these rows have less, many"):
        read(later(tmp_path, f"dataset.train=[{other}]", kind="bert"))


def test_replayed_classes_are_numbered_as_they_are_now(tmp_path: Path) -> None:
    def classified(labels: list[str]) -> Data:
        rows = [Classified([5, 6], label, row) for row, label in enumerate([0, 1, 1])]
        return Data(rows, [], labels, [], {}, "", spans=[Span("rows", 3, 3)])

    now, before = classified(["a", "b"]), classified(["b", "a"])
    add_replay(now, [Earlier(record_in(tmp_path), before)], 0.5)
    assert [row.label for row in now.replayed] == [1, 0, 0]
    assert [row.row for row in now.replayed] == [3, 4, 5]


def record_in(folder: Path) -> Path:
    (folder / "dynlora.json").write_text("{}")
    return folder
