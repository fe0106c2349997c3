"""Objectives that ask a reference or a teacher, in two processes, compiled, and on a base in 4 bits; all slow."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from numeric import same_curve, same_loss
from preference_runs import looks, preference_recipe
from safetensors.torch import load_file
from test_distributed import command, sets, start
from tiny_run import grounded_recipe, lines, train

pytestmark = pytest.mark.slow

SETTINGS = ["train.micro_batch_size=2", "train.gradient_accumulation_steps=2", "train.max_grad_norm=null"]


def in_two(folder, *settings, out="two"):
    arguments = command(folder, *sets(*settings), "--output-dir", str(folder / out), "--json", devices=2)
    with start(arguments) as process:
        found, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return json.loads(found)


@pytest.mark.parametrize(
    "more", [pytest.param([], marks=pytest.mark.long), ["dataset.val_size=0.275"]], ids=["even", "uneven"]
)
def test_two_processes_train_as_one(tmp_path, more):
    """Two epochs, so that a row comes up in the other process, which knows what the reference said."""
    settings = [*SETTINGS, "train.max_steps=20", *more]
    one, _ = train(preference_recipe(tmp_path, *settings, out="one"))
    recipe = preference_recipe(tmp_path, *settings)
    given = [f"dataset.train={json.dumps([source.model_dump() for source in recipe.dataset.train])}"]
    two = in_two(tmp_path, *settings, *given, "train.objective=dpo", "eval.samples=0")
    assert two["ranks"] == one["ranks"]
    assert two["loss_before"] == same_loss(one["loss_before"])
    assert two["loss_after"] == same_curve(one["loss_after"])
    adapters = [load_file(tmp_path / out / "adapter_model.safetensors") for out in ("one", "two")]
    for name, tensor in adapters[0].items():
        assert (adapters[1][name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    written, expected = (lines(tmp_path / out / "metrics.jsonl") for out in ("two", "one"))
    for ours, theirs in zip(written, expected, strict=True):
        if ours["event"] == "train":
            assert ours["accuracy"] == pytest.approx(theirs["accuracy"])
            assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-4)


@pytest.mark.parametrize("more", [[], ["train.shard_base=true"]], ids=["whole", "sharded"])
def test_two_processes_share_what_the_teacher_says(tmp_path, more):
    """Each asks it about half of the rows, and learns from others as well; they do not come out even."""
    settings = [*SETTINGS, "train.max_steps=14", "dataset.val_size=0.3"]
    recipe = grounded_recipe(tmp_path, *settings, out="one")
    one, _ = train(recipe)
    given = [f"dataset.train={json.dumps([source.model_dump() for source in recipe.dataset.train])}"]
    two = in_two(tmp_path, *settings, *given, "train.objective=context-distillation", *more)
    assert two["ranks"] == one["ranks"]
    assert two["loss_before"] == same_loss(one["loss_before"])
    assert two["loss_after"] == same_curve(one["loss_after"])
    written, expected = (
        [line["loss"] for line in lines(tmp_path / out / "metrics.jsonl") if line["event"] == "train"]
        for out in ("two", "one")
    )
    assert written == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("mode", [pytest.param("compile", marks=pytest.mark.long), "gradient_checkpointing"])
def test_a_teacher_is_heard_however_the_steps_are_run(tmp_path, mode):
    plain, other = (
        train(grounded_recipe(tmp_path, *more, out=out))[0]
        for out, more in (("plain", ()), (mode, (f"train.{mode}=true",)))
    )
    assert other["loss_after"] == same_curve(plain["loss_after"])


def test_the_kl_divergence_of_kto_is_that_of_all_processes(tmp_path):
    """Micro-batches of two in two processes are one of four: what is estimated from is the same."""
    recipe = preference_recipe(tmp_path, objective="kto")
    given = [f"dataset.train={json.dumps([source.model_dump() for source in recipe.dataset.train])}"]
    more = ["train.gradient_accumulation_steps={}", "train.micro_batch_size={}", "train.max_grad_norm=null"]
    one, _ = train(preference_recipe(tmp_path, more[0].format(1), more[1].format(4), objective="kto", out="one"))
    two = in_two(tmp_path, more[0].format(2), more[1].format(2), *given, "train.objective=kto", "eval.samples=0")
    assert two["loss_after"] == pytest.approx(one["loss_after"], rel=0.02)  # held out, micro-batches are smaller
    windows = [
        [line for line in lines(tmp_path / out / "metrics.jsonl") if line["event"] == "train"] for out in ("one", "two")
    ]
    assert [line["kl"] for line in windows[1]] == pytest.approx([line["kl"] for line in windows[0]], abs=1e-4)
    assert any(line["kl"] > 0 for line in windows[0])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a compiler")
@pytest.mark.long
def test_compiled(tmp_path):
    settings = ["train.max_steps=6", "pruning.events=1"]
    plain, other = (
        train(preference_recipe(tmp_path, *settings, *more, out=out))[1]
        for out, more in (("plain", ()), ("compiled", ("train.compile=true",)))
    )
    for ours, theirs in zip(looks(other), looks(plain), strict=True):
        assert ours["loss"] == same_curve(theirs["loss"])
        assert ours["logp_chosen"] == same_curve(theirs["logp_chosen"])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_on_a_base_in_4_bits(tmp_path):
    _, events = train(preference_recipe(tmp_path, "model.load_in_4bit=true", "train.learning_rate=2e-2"))
    first, *_, last = looks(events)
    assert first["reward_chosen"] == 0
    assert last["loss"] < first["loss"]
