"""What only a GPU shows: `scripts/test gpu`; skipped elsewhere."""

from __future__ import annotations

import pytest
import torch
from tiny_run import make_recipe, train

from dynlora_cli.execution.mode import plan
from dynlora_cli.execution.modes import cuda_graphs
from dynlora_cli.models.base_files import BaseFiles
from dynlora_cli.training.components import attach
from dynlora_cli.training.memory_estimate import CUDA_BYTES, measure
from dynlora_cli.training.setup import read_base, read_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned"),  # bitsandbytes, of models this small
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; where there is one: scripts/test gpu"),
]

COMPILED = ("train.compile=true", "dataset.packing=true", "pruning.events=1", "eval.steps=40")  # few kinds of code
STORED = {
    "bf16": (),
    "fp16": ("model.dtype=float16",),
    "4 bits": ("model.load_in_4bit=true",),
    "8 bits": ("model.load_in_8bit=true",),
    "checkpointing": ("train.gradient_checkpointing=true",),
    "offloading": ("train.gradient_checkpointing=offload",),
    "compiled": COMPILED,
    "compiled, 4 bits": (*COMPILED, "model.load_in_4bit=true"),
    "packed": ("dataset.packing=true",),
    "recorded": ("train.cuda_graphs=true",),
    "recorded, packed": ("train.cuda_graphs=true", "dataset.packing=true"),
    "recorded, checkpointing": ("train.cuda_graphs=true", "train.gradient_checkpointing=true"),
    "recorded, 4 bits": ("train.cuda_graphs=true", "model.load_in_4bit=true"),
    "recorded, fp16": ("train.cuda_graphs=true", "model.dtype=float16"),
    "recorded, dropout": ("train.cuda_graphs=true", "adapter.dropout=0.1"),
    "recorded, compiled": ("train.cuda_graphs=true", *COMPILED),
    "unfused": ("train.fused=false",),
    "8-bit moments": ("train.optimizer=adamw_8bit",),
    "paged moments": ("train.optimizer=paged_adamw_8bit",),
    "LoRA-FA": ("adapter.freeze_a=true",),
}


def losses(events):
    return [event["loss"] for event in events if event["event"] == "train"]


@pytest.mark.parametrize("how", STORED)
def test_it_learns_prunes_and_saves(how, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LEAST_PASSES", 8)
    summary, events = train(make_recipe(tmp_path, *STORED[how], "train.max_steps=40"))
    assert losses(events)[-1] < losses(events)[0] - 0.1
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert any("were recorded" in note for note in notes) == how.startswith("recorded"), notes
    assert not any("recorded 0 times" in note or "played 0 times" in note for note in notes), notes
    assert summary["parameters"] <= summary["budget_parameters"] < summary["parameters_start"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("settings", [(), ("dataset.packing=true",), ("train.gradient_checkpointing=true",)], ids=str)
def test_recordings_change_no_loss(settings, tmp_path, monkeypatch):
    """Played or not, every step takes the same mean over the same rows: bf16 alone makes a difference."""
    monkeypatch.setattr(cuda_graphs, "LEAST_PASSES", 8)
    found = {}
    for switch in ("false", "true"):
        recipe = make_recipe(tmp_path, f"train.cuda_graphs={switch}", *settings, "train.max_steps=40", out=switch)
        events = train(recipe)[1]
        found[switch] = losses(events)
    assert not any("recorded 0 times" in event.get("text", "") for event in events)
    assert found["true"] == pytest.approx(found["false"], rel=0.02)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "qwen3", "t5"])
def test_other_architectures_are_recorded(kind, tmp_path, monkeypatch):
    from tiny_architectures import CASES, write_model

    monkeypatch.setattr(cuda_graphs, "LEAST_PASSES", 8)
    write_model(tmp_path / kind, kind)
    settings = [f"model.task={CASES[kind][2]}", "train.cuda_graphs=true", "train.max_steps=40"]
    summary, events = train(make_recipe(tmp_path, *settings, kind=kind))
    assert summary["loss_after"] < summary["loss_before"]
    notes = [event["text"] for event in events if event["event"] == "note" and "recorded" in event["text"]]
    assert "recorded 0 times" not in notes[-1]


def test_precisions_agree(tmp_path):
    """bf16 has 8 bits of mantissa: losses differ by less than 1 %."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        summary, _ = train(make_recipe(tmp_path, f"model.dtype={dtype}", out=dtype))
        found[dtype] = summary["loss_after"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path):
    from dynlora_cli.errors import Interrupted

    whole, _ = train(make_recipe(tmp_path, out="whole"))
    with pytest.raises(Interrupted):
        train(make_recipe(tmp_path, out="parts"), interrupt_at=6)
    parts, _ = train(make_recipe(tmp_path, out="parts"), resume=True)
    assert parts["loss_after"] == pytest.approx(whole["loss_after"], rel=1e-3)


def test_quantized_base_prunes_and_merges(tmp_path, dynlora):
    train(make_recipe(tmp_path, "model.load_in_4bit=true"))
    adapter, smaller, merged = tmp_path / "out", tmp_path / "smaller", tmp_path / "merged"
    assert dynlora("prune", "--adapter", adapter, "--budget", "1", "--out", smaller).code == 0
    assert dynlora("merge", "--adapter", smaller, "--out", merged).code == 0
    assert (merged / "model.safetensors").exists()


def test_the_estimate_of_tensors_is_that_of_a_real_step(tmp_path):
    """The allocator's own count, which includes what it rounds up."""
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.tasks.loss import summed_loss

    recipe = make_recipe(tmp_path, "model.dtype=bfloat16")
    files = BaseFiles.find(recipe.model)
    data = read_data(recipe, files)
    device = torch.device("cuda")
    base = read_base(recipe, files, data, torch.device("meta"), plan(recipe.train))
    need = measure(
        base, lambda: attach(base, recipe.adapter, recipe.rank, recipe.seed)[0], recipe.model, device, (64, 96)
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    base = read_base(recipe, files, data, device, plan(recipe.train))
    pool, _ = attach(base, recipe.adapter, recipe.rank, recipe.seed)
    base.model.train()
    optimizer = torch.optim.AdamW([pool.values], fused=True)
    ids = torch.randint(5, 50, (64, 96), device=device)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    batch = Batch({"input_ids": ids, "attention_mask": mask}, ids, [], ids.numel(), ids.numel())
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = summed_loss(base.model, batch)
        loss.backward()
        optimizer.step()
        del loss
    peak = torch.cuda.max_memory_allocated() - before
    assert need.total - CUDA_BYTES == pytest.approx(peak, rel=0.15)


def test_inputs_of_blocks_wait_on_the_host():
    from transformers import LlamaConfig, LlamaForCausalLM

    from dynlora_cli.execution.modes.checkpointing import checkpoint_activations

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 8}
    ids, held, gradients = torch.randint(0, 64, (8, 512), device="cuda"), {}, {}
    for how in (True, "offload"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).cuda().requires_grad_(False).train()
        checkpoint_activations(model, how)
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids).loss
        torch.cuda.synchronize()
        held[how] = torch.cuda.memory_allocated() - before
        loss.backward()
        gradients[how] = weight.grad
        del model, loss, weight
    inputs = 8 * ids.numel() * 256 * 4
    assert 0.8 * inputs < held[True] - held["offload"] < 1.2 * inputs
    torch.testing.assert_close(gradients[True], gradients["offload"], rtol=1e-3, atol=1e-5)


def test_memory_falls_with_pruning():
    """A pool of half the components takes half the bytes, with its gradient and its moments."""
    from dynlora_cli.lora.layer import ComponentLinear
    from dynlora_cli.lora.pool import Pool
    from dynlora_cli.lora.surgery import shrink

    layer = ComponentLinear(torch.nn.Linear(4096, 4096, device="cuda"), 2.0)
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    pool = Pool({"layer": layer}, {"layer": 512}, device="cuda")
    optimizer = torch.optim.AdamW([pool.values], fused=True)
    pool.values.grad.normal_()
    optimizer.step()
    before = torch.cuda.memory_allocated() - start
    shrink(pool, optimizer, torch.arange(512, device="cuda") % 2 == 0)
    after = torch.cuda.memory_allocated() - start
    assert after == pytest.approx(before / 2, rel=0.1)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_moments_are_pruned_in_the_memory_that_they_have(name):
    from dynlora_cli.lora.layer import ComponentLinear
    from dynlora_cli.lora.moments import read_moments
    from dynlora_cli.lora.pool import Pool
    from dynlora_cli.lora.surgery import shrink
    from dynlora_cli.training.optimizers import make_optimizer

    layer = ComponentLinear(torch.nn.Linear(1024, 1024, device="cuda"), 2.0)
    pool = Pool({"layer": layer}, {"layer": 128}, device="cuda")
    optimizer = make_optimizer(name, [{"params": [pool.values]}], 0.0)
    pool.values.grad.normal_()
    optimizer.step()
    before = optimizer.state[pool.values]["state1"]
    assert before.is_paged
    expected = read_moments(optimizer, pool.values)["exp_avg"][: 64 * 1024]
    shrink(pool, optimizer, torch.arange(128, device="cuda") < 64)
    after = optimizer.state[pool.values]["state1"]
    assert after.is_paged
    assert after.data_ptr() == before.data_ptr()
    found = read_moments(optimizer, pool.values)["exp_avg"][: 64 * 1024]
    assert (found - expected).abs().max() <= 0.0075 * expected.abs().max()
    pool.values.grad.normal_()
    optimizer.step()
    assert pool.values.isfinite().all()
