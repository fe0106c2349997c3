"""Hypernetworks in training: what a run leaves, determinism, resuming, and that descriptions tell tasks apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypernet_runs import STEPS, WORDS, hypernet_recipe, texts_of
from safetensors.torch import load_file
from tiny_run import lines, train

from dynlora_cli.errors import Interrupted
from dynlora_cli.hypernets.files import read_hypernet
from dynlora_cli.runs.folder import read_record

FILES = ("hypernet.json", "hypernet.safetensors")


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def test_a_run_leaves_the_network_and_no_adapter(tmp_path: Path):
    summary, events = train(hypernet_recipe(tmp_path))
    folder = tmp_path / "out"
    there = {path.name for path in folder.iterdir()}
    assert {*FILES, "dynlora.json", "report.html", "README.md", "tokenizer.json"} <= there
    assert not {"adapter_config.json", "adapter_model.safetensors", "hypernet"} & there
    read = read_hypernet(folder)
    assert summary["parameters"] == read.form.parameters == read.net.parameter_count
    assert summary["adapter_bytes"] == (folder / FILES[1]).stat().st_size
    start = next(event for event in events if event["event"] == "start")
    assert start["run"]["trainable_parameters"] == summary["parameters"]
    assert summary["loss_after"] < summary["loss_before"]
    assert read.form.budget == 2 * sum(layer.d_in + layer.d_out for layer in read.form.layers)
    assert {layer.rank for layer in read.form.layers} == {4}
    assert read.form.base.fingerprint == read_record(folder)["base_model"]["fingerprint"]
    notes = [event["text"] for event in events if event["event"] == "note"] + list(start.get("notes") or ())
    assert any("written from 6 descriptions" in note for note in notes), notes


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path):
    for out, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(hypernet_recipe(tmp_path, f"seed={seed}", out=out))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert bytes_of(tmp_path / "one") != bytes_of(tmp_path / "other")


@pytest.mark.parametrize("how", [[], ["train.gradient_accumulation_steps=2", "train.micro_batch_size=3"]])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, how: list[str]):
    train(hypernet_recipe(tmp_path, *how, out="whole"))
    with pytest.raises(Interrupted):
        train(hypernet_recipe(tmp_path, *how, out="cut"), interrupt_at=6)
    summary, _ = train(hypernet_recipe(tmp_path, *how, out="cut"), resume=True)
    assert summary["steps"] == STEPS
    assert bytes_of(tmp_path / "whole") == bytes_of(tmp_path / "cut")
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "cut" / "metrics.jsonl")


def test_rows_of_a_step_may_be_given_in_parts(tmp_path: Path):
    """Without dropout in the trunk the gradient of a step is a sum over its rows, however they are cut."""
    losses = {}
    for size, parts in ((6, 1), (3, 2), (1, 6)):
        sizes = (f"train.micro_batch_size={size}", f"train.gradient_accumulation_steps={parts}")
        summary, _ = train(hypernet_recipe(tmp_path, *sizes, "train.max_steps=1", out=f"by{size}"))
        losses[size] = summary["loss_after"]
    assert losses[3] == pytest.approx(losses[6], rel=1e-4)
    assert losses[1] == pytest.approx(losses[6], rel=1e-4)


def test_held_out_rows_may_have_descriptions_of_their_own(tmp_path: Path):
    recipe = hypernet_recipe(tmp_path)
    held_out = [{"path": str(tmp_path / f"{word}.jsonl"), "rows": 4, "descriptions": [f"{word}!"]} for word in WORDS]
    data: dict[str, Any] = {"dataset": {"val": held_out, "max_length": 96}}
    summary, events = train(hypernet_recipe(tmp_path, **data))
    start = next(event for event in events if event["event"] == "start")
    assert any("3 held-out ones not among them" in note for note in start["notes"]), start["notes"]
    changed, _ = train(
        hypernet_recipe(tmp_path, *(f"dataset.val.{n}.descriptions=[hm]" for n in range(3)), out="b", **data)
    )
    assert changed["loss_after"] != summary["loss_after"]
    assert changed["loss_before"] == summary["loss_before"], "B is 0 at first, whatever the text"
    assert recipe.dataset.train[0].descriptions == texts_of("ones")


@pytest.mark.parametrize("override", ["train.gradient_checkpointing=true", "train.fused=false", "adapter.dropout=0.1"])
def test_other_ways_to_run_a_step_go_with_it(tmp_path: Path, override: str):
    plain, _ = train(hypernet_recipe(tmp_path, out="plain"))
    other, _ = train(hypernet_recipe(tmp_path, override, out="other"))
    same = "dropout" not in override
    assert (other["loss_after"] == pytest.approx(plain["loss_after"], rel=1e-3)) is same
    assert other["loss_after"] < other["loss_before"]


def test_a_rate_may_be_searched_for(tmp_path: Path):
    summary, _ = train(hypernet_recipe(tmp_path, "train.learning_rate=auto", "train.max_steps=30", "eval.steps=30"))
    assert summary["learning_rate"] > 0
    assert summary["loss_after"] < summary["loss_before"]


def test_a_description_that_changes_is_another_data_set(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(hypernet_recipe(tmp_path), interrupt_at=6)
    texts = tmp_path / "ones.txt"
    recipe = hypernet_recipe(tmp_path, f"dataset.train.0.descriptions={texts}", out="file")
    texts.write_text("Say ones.\n\nOnes, please.\n", encoding="utf-8")
    with pytest.raises(Interrupted):
        train(recipe, interrupt_at=6)
    texts.write_text("Say twos.\n", encoding="utf-8")
    with pytest.raises(Exception, match="rows, or how they are read, have changed"):
        train(recipe, resume=True)


def test_the_checkpoint_holds_the_parameters(tmp_path: Path):
    train(hypernet_recipe(tmp_path))
    state = load_file(tmp_path / "out" / "checkpoints" / f"step-{STEPS}" / "state.safetensors")
    net = read_hypernet(tmp_path / "out").net
    saved = [state[f"parameter.{n}"] for n in range(len(list(net.parameters())))]
    assert all(torch.equal(one, other) for one, other in zip(saved, net.parameters(), strict=True))
    assert json.loads((tmp_path / "out" / "hypernet.json").read_text())["encoder"]["name"] == "base"
