"""Adapters in fp8 and bf16, end to end: what stock PEFT reads, what is reported, budgets in bytes, who else reads them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cli_helpers import Dynlora
from peft import PeftModel
from pico import pico_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.keys import sorted_tensors
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import bytes_of, save
from dynlora_cli.api import train
from dynlora_cli.errors import UsageError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def command(dynlora: Dynlora):
    """A command that works: its summary."""

    def run(*words):
        answer = dynlora(*words, "--json")
        assert answer.code == 0, answer.err
        return answer.json

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in float32 and in fp8 within 8 kB, and their recipe."""
    folder = tmp_path_factory.mktemp("dtype")
    recipe = pico_recipe(folder)
    whole = train(recipe, output_dir=folder / "float32", set={"rank.budget": "18kB"}).summary
    changes = {"rank.budget": "8kB", "adapter.save_dtype": "fp8"}
    return folder, whole, train(recipe, output_dir=folder / "fp8", set=changes).summary


def test_the_files_are_within_their_budgets(runs):
    folder, whole, small = runs
    for name, summary, most in (("float32", whole, 18_000), ("fp8", small, 8_000)):
        size = (folder / name / WEIGHTS).stat().st_size
        assert summary["adapter_bytes"] == size <= most
        assert size > 0.9 * most
        assert summary["budget_bytes"] == most
        assert json.loads((folder / name / "dynlora.json").read_text())["budget"]["bytes"] == most
        dtype = summary.get("save_dtype", "float32")
        assert bytes_of(read_adapter(folder / name), dtype) == size
    kinds = {tensor.dtype for tensor in load_file(folder / "fp8" / WEIGHTS).values()}
    assert kinds == {torch.float8_e4m3fn}


def test_a_plan_tells_the_bytes(runs, command):
    folder, _, small = runs
    plan = command("train", folder / "recipe.yaml", "--dry-run", "--set", "rank.budget=8kB", "--dtype", "fp8")["plan"]
    assert plan["file"]["dtype"] == "fp8"
    assert small["adapter_bytes"] <= plan["file"]["bytes"] <= 8_000
    assert plan["parameters"]["budget"] >= small["parameters"]


@pytest.mark.parametrize("low_memory", [False, True])
def test_stock_peft_computes_what_our_reader_does(runs, low_memory):
    folder, _, small = runs
    ids = torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))

    def base():
        return AutoModelForCausalLM.from_pretrained(folder / "pico").eval()

    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base(), folder / "fp8", low_cpu_mem_usage=low_memory)
        theirs = loaded(ids).logits
        ours_model = base()
        with attached(ours_model, read_adapter(folder / "fp8")):
            ours = ours_model(ids).logits
        plain = base()(ids).logits
    assert (ours - theirs).abs().max() < 1e-6
    assert (ours - plain).abs().max() > 1e-3, "the adapter does something"
    assert small["peft_check"]["problem"] is None


def test_what_is_reported_is_what_is_on_disk(runs, command):
    folder, _, small = runs
    assert small["save_dtype"] == "fp8"
    assert 0 < small["rounding"] < 0.08
    assert small["loss_float32"] != small["loss_after"]
    found = command("eval", "--adapter", folder / "fp8")
    assert found["adapters"][0]["loss"] == pytest.approx(small["loss_after"], abs=1e-6)
    assert "fp8" in (folder / "fp8" / "README.md").read_text()
    assert f"{small['loss_after']:.4f}" in (folder / "fp8" / "README.md").read_text()


def test_checkpoints_stay_as_they_are_and_a_run_goes_on_from_them(runs, command):
    folder, *_ = runs
    (step,) = (folder / "fp8" / "checkpoints").glob("step-*")
    assert {tensor.dtype for tensor in load_file(step / WEIGHTS).values()} == {torch.float32}
    how = (folder / "recipe.yaml", "--set", "rank.budget=8kB", "--dtype", "fp8", "--set", "train.save_steps=4")
    command("train", *how, "--output-dir", folder / "saves")
    command("train", *how, "--output-dir", folder / "on", "--resume-from", folder / "saves" / "checkpoints" / "step-4")
    assert (folder / "on" / WEIGHTS).read_bytes() == (folder / "fp8" / WEIGHTS).read_bytes()


def test_prune_measures_and_saves_what_it_rounds(runs, command):
    folder, whole, _ = runs
    size = whole["adapter_bytes"] // 5
    found = command(
        "prune",
        "--adapter",
        folder / "float32",
        "--budget",
        f"{size / 1000}kB",
        "--dtype",
        "fp8",
        "--out",
        folder / "cut",
    )
    assert found["adapter_bytes"] == (folder / "cut" / WEIGHTS).stat().st_size <= size
    assert found["adapter_bytes"] > 0.8 * size
    assert found["loss_after"] != found["loss_float32"]
    measured = command("eval", "--adapter", folder / "cut")
    assert measured["adapters"][0]["loss"] == pytest.approx(found["loss_after"], abs=1e-6)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_export_rounds_checks_and_tells(runs, dtype, command):
    folder, whole, _ = runs
    found = command(
        "export", "--adapter", folder / "float32", "--to", "peft", "--dtype", dtype, "--out", folder / f"peft-{dtype}"
    )
    size = found["files"][WEIGHTS]["bytes"]
    assert size < whole["adapter_bytes"]
    assert found["dtype"] == dtype
    assert any(note.startswith(f"saved in {dtype}") for note in found["notes"])
    assert found["check"]["kl"] < 0.01


def test_who_cannot_read_it_is_refused_in_words(runs, command, dynlora):
    folder, *_ = runs
    done = dynlora("export", "--adapter", folder / "fp8", "--to", "mlx", "--dtype", "fp8", "--out", folder / "no")
    assert done.code == 2
    assert "--to mlx writes what its reader takes" in done.err
    done = dynlora("export", "--adapter", folder / "fp8", "--to", "peft", "--dtype", "int8", "--out", folder / "no")
    assert done.code == 2
    assert "float32, bf16, fp8" in done.err
    # ... and what they read is made of it
    found = command("export", "--adapter", folder / "fp8", "--to", "mlx", "--out", folder / "mlx")
    assert {tensor.dtype for tensor in load_file(folder / "mlx" / "adapters.safetensors").values()} == {torch.float32}
    assert found["check"]["kl"] < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["adapter.variant=vera"], "has no factors of its own to round; leave it out"),
        (["adapter.variant=sora"], "dynlora export --to peft --dtype fp8"),
        (["adapter.init_weights=pissa"], "a component and PiSSA's start are saved together"),
        (["rank.elastic=true"], "elastic components are made of what trains"),
    ],
)
def test_what_cannot_be_rounded_says_so_before_it_trains(runs, settings, words, dynlora):
    folder, *_ = runs
    sets = [word for one in settings for word in ("--set", one)]
    done = dynlora("train", folder / "recipe.yaml", "--dtype", "fp8", *sets)
    assert done.code == 2
    assert words in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("0.3kB", "allow more, at least 1kB, write `adapter.save_dtype: fp8`"),
        ("2kb/s", "bytes of the file like 200kB"),
        ("5000B", "bytes of the file are written in kB"),
    ],
)
def test_a_budget_that_holds_nothing_says_what_would(runs, budget, words, dynlora):
    folder, *_ = runs
    done = dynlora("train", folder / "recipe.yaml", "--dry-run", "--set", f"rank.budget={budget}")
    assert done.code == 2
    assert words in " ".join(done.err.split())


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_layers_that_cannot_live_take_no_bytes_of_a_small_budget(runs, command, budget):
    folder, *_ = runs
    how = ("--set", f"rank.budget={budget}kB", "--dtype", "fp8", "--output-dir", folder / f"tight-{budget}")
    found = command("train", folder / "recipe.yaml", *how)
    assert 500 * budget < found["adapter_bytes"] <= 1000 * budget, "14 layers' names alone take 2,600"


def test_magnitudes_stay_in_float32(tmp_path, runs, command):
    folder, *_ = runs
    out = tmp_path / "dora"
    found = command(
        "train", folder / "recipe.yaml", "--dtype", "fp8", "--set", "adapter.variant=dora", "--set", "rank.budget=12kB",
        "--output-dir", out,
    )  # fmt: skip
    tensors = load_file(out / WEIGHTS)
    assert {t.dtype for name, t in tensors.items() if "magnitude" in name} == {torch.float32}
    assert {t.dtype for name, t in tensors.items() if "lora_A" in name} == {torch.float8_e4m3fn}
    assert found["adapter_bytes"] <= 12_000
    assert found["peft_check"]["problem"] is None


def test_whole_numbers_are_no_factors(tmp_path, runs):
    folder, *_ = runs
    save(read_adapter(folder / "float32"), tmp_path)
    tensors = {name: tensor.mul(100).to(torch.int8) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(UsageError, match=r"holds whole numbers \(int8\)"):
        read_adapter(tmp_path)


def test_a_scale_that_is_no_power_of_two(tmp_path, command):
    """B is kept without the scale: 7/3 · (b / (7/3)) is not always b."""
    recipe = pico_recipe(tmp_path)
    summary = train(
        recipe, output_dir=tmp_path / "run", set={"adapter.save_dtype": "fp8", "adapter.alpha": 7, "rank.budget": 3}
    ).summary
    scale = json.loads((tmp_path / "run" / "dynlora.json").read_text())["scale"]
    assert math.frexp(scale)[0] != 0.5
    stored = load_file(tmp_path / "run" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float8_e4m3fn}
    assert summary["save_dtype"] == "fp8"


@pytest.mark.parametrize("name", ["base_model.model.classifier.weight", "base_model.model.emb.trainable_tokens_delta"])
def test_heads_and_rows_of_tokens_are_no_whole_numbers_either(tmp_path, name):
    tensors = {"base_model.model.q.lora_A.weight": torch.ones(1, 2), name: torch.ones(2, 2, dtype=torch.int8)}
    with pytest.raises(UsageError, match=r"holds whole numbers \(int8\)"):
        sorted_tensors(tensors, tmp_path / WEIGHTS)


def test_scales_of_a_quantized_adapter_are_no_other_adapter(tmp_path):
    name = "base_model.model.q.lora_A.weight"
    tensors = {name: torch.ones(1, 2), f"{name}_scale": torch.ones(1)}
    with pytest.raises(UsageError, match="weight_scale is not understood"):
        sorted_tensors(tensors, tmp_path / WEIGHTS)
