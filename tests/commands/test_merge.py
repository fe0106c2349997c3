"""`dynlora merge` into the base: bases that are quantized, checks that fail, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_helpers import Dynlora, contents
from numeric import assert_close_to_truth
from peft_adapters import SAME_LOGITS, exact_delta, make
from tiny_run import make_recipe, train
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.commands import merge as command
from dynlora_cli.merging import fold

REFUSED = [
    (["--into", "adapter"], "combines several"),
    (["--into", "both"], "choose one of: base, adapter"),
    (["--method", "tise"], "did you mean 'ties'"),
    (["--density", "0"], "no share above 0"),
    (["--base-weights", "dequantised"], "did you mean 'dequantized'"),
    (["--weights", "a,b"], "not all are numbers"),
    (["--dtype", "int4"], "choose one of: keep"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_options_that_are_refused(options: list[str], message: str, tmp_path: Path, dynlora: Dynlora):
    _, adapter = make("lora", tmp_path)
    before = contents(tmp_path)
    answer = dynlora("merge", "--adapter", adapter, *options)
    assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
    assert contents(tmp_path) == before


def test_adapters_that_do_not_belong_together(tmp_path: Path, dynlora: Dynlora):
    made = {}
    for kind in ("lora", "dora", "hira", "conv1d", "whole-head"):
        (tmp_path / kind).mkdir()
        made[kind] = make(kind, tmp_path / kind)[1]
    both = ("--adapter", made["lora"], "--out", tmp_path / "new")
    for kind, message in (
        ("dora", "is a DoRA"),
        ("hira", "is a HiRA"),
        ("conv1d", "different bases"),
        ("whole-head", "different bases"),
    ):
        answer = dynlora("merge", "--adapter", made[kind], *both)
        assert (answer.code, message in " ".join(answer.err.split())) == (2, True), answer.err
    answer = dynlora("merge", "--adapter", made["lora"], *both, "--weights", "1")
    assert (answer.code, "1 numbers for 2 adapters" in answer.err) == (2, True)
    answer = dynlora("merge", "--adapter", made["lora"], "--adapter", made["lora"])
    assert (answer.code, "--out" in answer.err) == (2, True)
    assert not (tmp_path / "new").exists()


def test_a_full_output_folder(tmp_path: Path, dynlora: Dynlora):
    _, adapter = make("lora", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    for options in ([], ["--overwrite"]):
        answer = dynlora("merge", "--adapter", adapter, "--out", out, *options)
        assert (answer.code, "--out" in answer.err) == (2, True)
    assert (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    assert dynlora("merge", "--adapter", adapter, "--out", out).code == 0
    assert dynlora("merge", "--adapter", adapter, "--out", out).code == 2
    assert dynlora("merge", "--adapter", adapter, "--out", out, "--overwrite").code == 0


def test_no_space_left(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    _, adapter = make("lora", tmp_path)
    before = contents(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    answer = dynlora("merge", "--adapter", adapter)
    assert (answer.code, "has 1.0 kB left" in answer.err) == (3, True), answer.err
    assert contents(tmp_path) == before


def test_a_merge_that_predicts_something_else_is_withdrawn(
    tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch
):
    _, adapter = make("lora", tmp_path)
    before = contents(tmp_path)
    right = fold.write_merged

    def wrong(plan, *rest):
        plan.changed.pop(next(iter(plan.changed)))
        return right(plan, *rest)

    monkeypatch.setattr(command, "write_merged", wrong)
    answer = dynlora("merge", "--adapter", adapter, "--json")
    assert (answer.code, "nats per token" in answer.json["error"]) == (4, True), answer.err
    assert contents(tmp_path) == before


def test_sixteen_bits_round_and_fp32_does_not(tmp_path: Path, dynlora: Dynlora):
    base, adapter = make("lora", tmp_path)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    kept = dynlora("merge", "--adapter", adapter, "--out", tmp_path / "kept", "--json").json
    wide = dynlora("merge", "--adapter", adapter, "--out", tmp_path / "wide", "--dtype", "float32", "--json").json
    assert wide["check"]["max_logit_difference"] < SAME_LOGITS < kept["check"]["max_logit_difference"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "kept").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32


@pytest.fixture(scope="module", params=["load_in_4bit", "load_in_8bit"])
def quantized_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    recipe = make_recipe(
        folder, f"model.{request.param}=true", "train.learning_rate=2e-2", "adapter.scaling=rslora", "adapter.alpha=16"
    )
    train(recipe)
    return Path(recipe.output_dir)


def test_qlora_into_the_weights_as_they_were(quantized_run: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora("merge", "--adapter", quantized_run, "--out", tmp_path / "m", "--max-kl", "1", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["check"]["max_logit_difference"] < SAME_LOGITS
    assert answer.json["trained_base"]["kl"] > answer.json["check"]["kl"], "what training saw is measured too"
    plain = read_adapter(quantized_run)
    model = AutoModelForCausalLM.from_pretrained(plain.config["base_model_name_or_path"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.dtype == model.dtype
    for name, factors in plain.layers.items():
        expected = model.get_submodule(name).weight.double() + exact_delta(factors)
        assert_close_to_truth(merged.get_submodule(name).weight, expected, terms=factors.rank + 1)


def test_qlora_into_the_weights_as_training_saw_them(quantized_run: Path, tmp_path: Path, dynlora: Dynlora):
    answer = dynlora(
        "merge", "--adapter", quantized_run, "--out", tmp_path / "m", "--base-weights", "dequantized", "--json"
    )
    assert answer.code == 0, answer.err
    # int8 kernels round the inputs too, which no weight can hold
    assert answer.json["check"]["max_logit_difference"] < (0.05 if "8bit" in str(quantized_run) else 1e-3)
    folder = read_adapter(quantized_run).config["base_model_name_or_path"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "m"))
    untouched = set(read_adapter(quantized_run).all_ranks) - set(read_adapter(quantized_run).layers)
    for name in untouched:  # layers at rank 0 were quantized too
        assert not torch.equal(before.get_submodule(name).weight, after.get_submodule(name).weight)


def test_two_qlora_runs_keep_what_their_base_was(quantized_run: Path, tmp_path: Path, dynlora: Dynlora):
    common = ("--into", "base", "--base-weights", "dequantized", "--max-kl", "1", "--json")
    answer = dynlora("merge", "--adapter", quantized_run, "--adapter", quantized_run, "--out", tmp_path / "m", *common)
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_dequantized_needs_a_quantized_run(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path)
    train(recipe)
    answer = dynlora("merge", "--adapter", recipe.output_dir, "--base-weights", "dequantized")
    assert (answer.code, "not trained on a quantized base" in answer.err) == (2, True), answer.err


def test_a_fine_tune_of_the_same_shape_is_another_base(tmp_path: Path, dynlora: Dynlora):
    recipe = make_recipe(tmp_path)
    train(recipe)
    base = Path(recipe.model.name_or_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.01
    model.save_pretrained(tmp_path / "tuned")
    shutil.copyfile(base / "config.json", tmp_path / "tuned" / "config.json")
    shutil.copytree(recipe.output_dir, tmp_path / "twin")
    several = ["--adapter", tmp_path / "twin", "--into", "base", "--out", tmp_path / "new"]
    for options in ([], several):
        answer = dynlora("merge", "--adapter", recipe.output_dir, "--base", tmp_path / "tuned", *options)
        assert (answer.code, "its numbers differ" in " ".join(answer.err.split())) == (2, True), answer.err


@pytest.mark.slow
def test_the_bare_form(tmp_path: Path, dynlora: Dynlora, monkeypatch: pytest.MonkeyPatch):
    recipe = make_recipe(tmp_path, out="out/run")
    train(recipe)
    monkeypatch.chdir(tmp_path)
    answer = dynlora("merge", "--adapter", "out/")
    assert answer.code == 0, answer.err
    assert "newest below out" in answer.err
    merged = tmp_path / "out" / "run" / "merged"
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json"} <= set(contents(merged))


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path):
    """A model of many shards, larger than the bound; the script fails where the peak is above it."""
    script = Path(__file__).parents[2] / "scripts" / "bench" / "speed" / "merge_memory.py"
    command = [
        sys.executable,
        script,
        "--gigabytes",
        "1.5",
        "--work",
        tmp_path,
        "--results",
        tmp_path / "results.jsonl",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "results.jsonl").read_text())
    assert row["peak_bytes"] < row["bound_bytes"] < row["model_bytes"]
