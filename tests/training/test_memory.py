"""The memory that a run needs, told before it runs, against the tensors and the process of a real step."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from pico import pico_model, rows
from tiny_run import assembled, make_recipe
from tiny_run import train as run_training
from transformers import LlamaConfig, LlamaForCausalLM

from dynlora_cli.commands.dry_run import plan as plan_run
from dynlora_cli.data.batches import Batch
from dynlora_cli.execution.mode import plan
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.models.linear import forget_input
from dynlora_cli.models.quiet import quiet
from dynlora_cli.tasks.loss import summed_loss
from dynlora_cli.training.components import attach
from dynlora_cli.training.memory_estimate import Need, _Peak, measure
from dynlora_cli.training.metrics import resident_bytes
from dynlora_cli.training.optimizers import state_bytes
from dynlora_cli.training.setup import read_base, read_data


@pytest.fixture(autouse=True)
def _quiet():
    with quiet:
        yield


def estimate(recipe, ids):
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("meta"), plan(recipe.train))
    device, optimizer = torch.device("cpu"), recipe.train.optimizer
    return measure(
        base, lambda: attach(base, recipe.adapter, recipe.rank, recipe.seed)[0], recipe.model, device, ids, optimizer
    )


def test_eight_bit_moments_are_a_quarter(tmp_path):
    plain, small = (
        estimate(make_recipe(tmp_path), (2, 16)),
        estimate(make_recipe(tmp_path, "train.optimizer=adamw_8bit"), (2, 16)),
    )
    assert small.optimizer == pytest.approx(plain.optimizer / 4, rel=0.02)
    assert small.total == sum((small.base, small.adapter, small.optimizer, small.activations, small.libraries))


def test_a_frozen_a_needs_no_inputs(tmp_path):
    plain, frozen = (
        estimate(make_recipe(tmp_path), (8, 64)),
        estimate(make_recipe(tmp_path, "adapter.freeze_a=true"), (8, 64)),
    )
    assert frozen.activations < 0.97 * plain.activations
    assert (frozen.base, frozen.adapter, frozen.optimizer) == (plain.base, plain.adapter, plain.optimizer)


def real_peak(recipe, ids):
    """Bytes of the tensors of a real step, counted the same way."""
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))
    pool, _ = attach(base, recipe.adapter, recipe.rank, recipe.seed)
    tokens = torch.randint(5, 50, ids)
    mask = torch.ones_like(tokens)
    mask[0, -1] = 0  # a batch without padding would need no mask, and is not the largest
    batch = Batch({"input_ids": tokens, "attention_mask": mask}, tokens, [], tokens.numel(), tokens.numel())
    base.model.train()
    summed_loss(base.model, batch).backward()  # the first pass of a model is not like the others
    held = [*base.model.parameters(), *base.model.buffers(), pool.values, pool.values.grad]
    with _Peak(
        torch.device("cpu"),
        [*held, *batch.inputs.values(), *(p.grad for p in base.model.parameters() if p.grad is not None)],
    ) as peak:
        summed_loss(base.model, batch).backward()
    return peak.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["train.gradient_checkpointing=true"],
        ["train.gradient_checkpointing=offload"],
        ["rank.init=2"],
        ["adapter.freeze_a=true"],
    ],
    ids=str,
)
def test_activations_are_those_of_a_real_step(settings, tmp_path):
    recipe = make_recipe(tmp_path, *settings)
    need = estimate(recipe, (8, 64))
    assert need.activations == pytest.approx(real_peak(recipe, (8, 64)), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_other_models_and_variants(kind, variant, tmp_path):
    recipe = make_recipe(tmp_path, f"adapter.variant={variant}", kind=kind)
    small, large = estimate(recipe, (2, 32)), estimate(recipe, (8, 32))
    assert small.activations < large.activations
    assert (small.base == 0) == (variant == "full"), "all that trains counts as the adapter"


@pytest.mark.slow
def test_weights_adapter_and_growth(tmp_path):
    recipe = make_recipe(tmp_path)
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    base = read_base(recipe, files, data, torch.device("cpu"), plan(recipe.train))
    weights = sum(p.numel() * 4 for p in base.model.parameters())
    pool, _ = attach(base, recipe.adapter, recipe.rank, recipe.seed)
    one, two = estimate(recipe, (4, 64)), estimate(recipe, (8, 64))
    assert one.base == two.base == weights
    assert one.adapter == pool.parameters * 2 * 4, "values and gradient in fp32"
    assert one.optimizer == pool.parameters * 2 * 4, "two moments in fp32"
    assert two.activations == pytest.approx(2 * one.activations, rel=0.15)
    checkpointed = estimate(make_recipe(tmp_path, "train.gradient_checkpointing=true"), (8, 64))
    assert checkpointed.activations < two.activations


def test_four_bits_are_a_seventh_of_the_linear_weights(tmp_path):
    recipe = make_recipe(tmp_path)
    four = recipe.model_copy(update={"model": recipe.model.model_copy(update={"load_in_4bit": True})})
    plain, small = estimate(recipe, (2, 16)), estimate(four, (2, 16))
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    model = read_base(recipe, files, data, torch.device("meta"), plan(recipe.train)).model
    linear = sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    assert plain.base - small.base == pytest.approx(linear * (4 - 0.516), rel=0.01)


# -- what a run holds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_what_trains_and_its_moments_shrink_with_the_components(optimizer, tmp_path):
    summary, events = run_training(make_recipe(tmp_path, f"train.optimizer={optimizer}"))
    lines = [event for event in events if event["event"] == "train"]
    assert len({line["parameters"] for line in lines}) == 4, "before the three events, and after each"
    for line in lines:
        moments = state_bytes(optimizer, torch.empty(line["parameters"]))
        assert line["trained_bytes"] == 2 * 4 * line["parameters"]
        assert 0 <= line["optimizer_bytes"] - moments <= 2 * 4 * 256 + 4, "and the codes of both, or a counter of steps"
        assert line["base_bytes"] == lines[0]["base_bytes"]
    assert summary["trained_bytes_start"] == 8 * summary["parameters_start"]
    assert summary["trained_bytes"] == 8 * summary["parameters"]
    assert summary["optimizer_bytes"] < summary["optimizer_bytes_start"]


STORED = {  # bytes of a layer with n weights and d outputs
    "load_in_4bit": lambda n, d: n / 2 + n / 64 + 4 * (16 + 1 + 256 + math.ceil(n / 64 / 256)),  # codes, offset, scales
    "load_in_8bit": lambda n, d: n + 4 * d,
}


@pytest.mark.parametrize("stored", STORED)
def test_a_quantized_base_is_counted_with_its_scales(stored, tmp_path):
    plain, small = (assembled(make_recipe(tmp_path, f"model.{stored}={word}")) for word in ("false", "true"))
    shapes = [module.base.weight.shape for module in plain.trained.layers.values()]
    saved = sum(4 * d * n - STORED[stored](d * n, d) for d, n in shapes)
    for _ in range(2):
        assert resident_bytes(plain)["base_bytes"] - resident_bytes(small)["base_bytes"] == saved
        for run in (plain, small):  # bitsandbytes moves scales about in the first pass
            summed_loss(run.model, run.batches.step(0, 0)[0]).backward()


@pytest.mark.parametrize("kernel", ["MatMul8bitFp", "MatMul8bitLt"])
def test_an_8_bit_product_keeps_no_input(kernel, tmp_path, monkeypatch):
    functions = pytest.importorskip("bitsandbytes.autograd._functions")
    monkeypatch.setattr(functions, "MatMul8bitFp", getattr(functions, kernel))  # the second is what CUDA uses
    run = assembled(make_recipe(tmp_path, "model.load_in_8bit=true"))
    base = next(iter(run.trained.layers.values())).base
    gradients = []
    for forget in (False, True):
        x = torch.randn(2, 5, base.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = base(x)
        kept = weakref.ref(inner := x * 1)
        z = base(inner)
        if forget:
            forget_input(base, y), forget_input(base, z)
        del inner
        assert (kept() is None) == forget, "where bitsandbytes keeps it no more, forget_input can go"
        y.square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_rows_that_fit():
    need = Need(base=500, adapter=60, optimizer=40, activations=200, libraries=100, rows=4, length=64, free=2000)
    assert need.total == 900
    assert need.most_rows == 22, "(0.9 x 2000 - 700) / 50"
    assert replace(need, free=700).most_rows == 0


def test_dry_run_tells_and_warns(tmp_path, monkeypatch):
    plan = plan_run(make_recipe(tmp_path))
    assert plan["memory"]["total"] > plan["memory"]["activations"] > 0
    assert not any("memory" in note for note in plan["notes"])
    monkeypatch.setattr("dynlora_cli.training.memory_estimate._around", lambda device: (1000, 10_000))
    plan = plan_run(make_recipe(tmp_path))
    assert "this may not fit into memory: set train.gradient_checkpointing: true" in plan["notes"][-1]


def test_a_model_that_needs_numbers_is_not_estimated(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("needs numbers\nand more")

    monkeypatch.setattr("dynlora_cli.training.memory_estimate._step", refuse)
    plan = plan_run(make_recipe(tmp_path))
    assert plan["notes"][-1] == "memory was not estimated: needs numbers"
    assert "memory" not in plan


@pytest.mark.slow
def test_the_estimate_is_within_15_percent_of_the_process(tmp_path):
    """A real run in a process of its own, large enough that tensors outweigh libraries."""
    model = pico_model(tmp_path)
    config = json.loads((model / "config.json").read_text())
    more = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**(config | more))).save_pretrained(model)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndataset: {{train: [{{path: {rows(tmp_path, 400)}}}], packing: true, max_length: 256}}\n"
        "train: {max_steps: 3, micro_batch_size: 8, learning_rate: 1.0e-3}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    command = [sys.executable, "-m", "dynlora_cli", "train", str(recipe), "--json"]
    planned = json.loads(subprocess.run([*command, "--dry-run"], check=True, stdout=subprocess.PIPE).stdout)
    need = planned["plan"]["memory"]
    process = psutil.Popen([*command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    status, highest = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        highest = max(highest, int(lines.get("VmHWM", "0 kB").split()[0]) * 1024)
        time.sleep(0.05)
    assert process.returncode == 0
    assert need["total"] == pytest.approx(highest, rel=0.15)
