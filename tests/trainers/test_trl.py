"""Dynamic rank in TRL's own trainers, run on a tiny Llama: SFT, DPO, GRPO, KTO and reward models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import trl
from numeric import same_curve, same_loss
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, LoraConfig
from safetensors.torch import load_file
from trl_helpers import DRAWING, TRAINERS, load, losses, sft

from dynlora_cli.errors import UsageError
from dynlora_cli.trainers import DynamicRankCallback, attach

NAMES = list(TRAINERS)
QUICK = [name if name in ("sft", "dpo") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
BUDGET = {"budget": 2, "init": 8}
PRUNING = {"start": 0.34, "end": 0.67, "events": 2}  # of 12 steps: the basis turns after 4, components go after 6 and 8
FIRST = 4
IDS = torch.arange(2, 26).view(2, 12)


@pytest.fixture(autouse=True)
def _quiet():
    """Other people's warnings about each other are not what these tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def begin(folder, name, *, callback=True, out="out", **more):
    """The adapter, the trainer and the callback."""
    model = load(folder, name)
    attached = attach(model, **BUDGET)
    watcher = DynamicRankCallback(attached, **PRUNING)
    return attached, TRAINERS[name](folder, model, [watcher] if callback else [], out, **more), watcher


def train(folder, name, **more):
    attached, trainer, watcher = begin(folder, name, **more)
    trainer.train()
    return attached, trainer, watcher


def peft_logits(folder, name):
    kind = AutoPeftModelForSequenceClassification if name == "reward" else AutoPeftModelForCausalLM
    more = {"num_labels": 1} if name == "reward" else {}
    with torch.no_grad():
        return kind.from_pretrained(folder, dtype=torch.float32, **more).eval()(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_components_go_in_the_trainer(tmp_path, name):
    """The losses are those without the callback until the first event; then components go, and stock PEFT agrees."""
    plain, without, _ = train(tmp_path, name, callback=False, out="without")
    attached, trainer, watcher = train(tmp_path, name)
    started = plain.pool.parameters
    assert losses(trainer)[:FIRST] == losses(without)[:FIRST]
    assert losses(trainer)[FIRST][0] == same_loss(losses(without)[FIRST][0])  # in another basis, the same function
    assert losses(trainer)[-1] != losses(without)[-1]
    pruned = [event for event in watcher.rank_events if event["event"] == "prune"]
    assert [event["step"] for event in pruned] == [6, 8]
    assert [event["parameters"] for event in pruned] == sorted((e["parameters"] for e in pruned), reverse=True)
    assert started > pruned[0]["parameters"] > attached.pool.parameters
    assert attached.pool.parameters <= started / 8 * 2  # the budget
    assert sum(attached.rank_map.values()) == attached.pool.components

    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    leaves = {id(leaf) for leaf in attached.pool.leaves}
    alive = {id(leaf) for leaf in attached.pool.leaves if leaf.numel()}
    assert alive <= held  # the optimizer steps what the layers have, and nothing that is gone
    assert not [p for p in held - leaves if p not in {id(q) for q in trainer.model.parameters()}]
    for leaf in attached.pool.leaves:
        if leaf.numel():
            assert trainer.optimizer.state[leaf]["exp_avg"].shape == leaf.shape

    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        expected = trainer.model.eval()(IDS).logits
    assert peft_logits(tmp_path / "saved", name) == pytest.approx(expected, abs=1e-5)
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert {name for name, rank in attached.rank_map.items() if rank} == set(config["target_modules"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_from_a_checkpoint(tmp_path, name):
    """In the midst of pruning: the same losses, the same adapter."""
    more = {"save_strategy": "steps", "save_steps": 5}
    attached, trainer, _ = train(tmp_path, name, **more)
    again, second, watcher = begin(tmp_path, name, out="again", **more)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    assert losses(second)[5:] == losses(trainer)[5:]
    assert again.rank_map == attached.rank_map
    assert [event["step"] for event in watcher.rank_events if event["event"] == "prune"] == [6, 8]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in saved(tmp_path, trainer, second))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(other[key], tensor), key


def saved(folder: Path, *trainers):
    paths = [folder / f"saved-{index}" for index, _ in enumerate(trainers)]
    for path, trainer in zip(paths, trainers, strict=True):
        trainer.save_model(str(path))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_works_with_the_defaults_of_trl(tmp_path, name):
    """bf16 and gradient checkpointing, and gradients that are accumulated."""
    more = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 12}
    plain, without, _ = train(tmp_path, name, callback=False, out="without", **more)
    attached, trainer, _ = train(tmp_path, name, **more)
    assert losses(trainer)[:FIRST] == losses(without)[:FIRST]
    assert attached.pool.parameters <= plain.pool.parameters / 4
    assert attached.pool.values.dtype == torch.float32
    trainer.save_model(str(tmp_path / "saved"))
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    assert peft_logits(tmp_path / "saved", name) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_is_the_base_and_no_second_model(tmp_path, name):
    """TRL would load another model; `reference` gives the same losses and holds no tensor of its own."""
    _, second, _ = train(tmp_path, name, out="second")
    model = load(tmp_path, name)
    attached = attach(model, **BUDGET)
    watcher = DynamicRankCallback(attached, **PRUNING)
    trainer = TRAINERS[name](tmp_path, model, [watcher], ref_model=attached.reference())
    trainer.train()
    assert losses(trainer) == losses(second)
    ours = {tensor.data_ptr() for tensor in model.parameters()}
    assert {tensor.data_ptr() for tensor in trainer.ref_model.parameters()} <= ours
    assert not {tensor.data_ptr() for tensor in second.ref_model.parameters()} & ours


@pytest.mark.slow
def test_dpo_can_compute_the_reference_beforehand(tmp_path):
    """B is zero at the start, so the model is its own reference. (TRL 1.0 still loads a second one for it.)"""
    _, second, _ = train(tmp_path, "dpo", out="second")
    _, trainer, _ = train(tmp_path, "dpo", precompute_ref_log_probs=True)
    assert trl.__version__.startswith("1.0") or trainer.ref_model is None
    assert [loss for loss, _ in losses(trainer)] == same_curve([loss for loss, _ in losses(second)])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(DRAWING))
def test_the_second_model_that_was_loaded_gives_its_memory_back(tmp_path, name):
    """GRPO and RLOO take no reference; they load one where beta is above 0."""

    def begin_drawing(out):
        model = load(tmp_path)
        attached = attach(model, **BUDGET)
        return attached, DRAWING[name](tmp_path, model, [DynamicRankCallback(attached, **PRUNING)], out, beta=0.5)

    _, second = begin_drawing("second")
    second.train()
    attached, trainer = begin_drawing("shared")
    freed = attached.share(trainer.ref_model)
    assert freed == sum(tensor.numel() * tensor.element_size() for tensor in second.ref_model.parameters())
    trainer.train()
    assert losses(trainer) == losses(second)
    assert attached.parameters <= attached.start.budget
    assert any(line.get("kl", 0) > 0 for line in trainer.state.log_history)


@pytest.mark.parametrize(
    ("name", "option"), [("dpo", {"sync_ref_model": True}), ("grpo", {"use_vllm": True})], ids=["sync", "vllm"]
)
def test_what_does_not_go_with_components_is_refused(tmp_path, name, option):
    """Before TRL looks for vLLM, and before anything trains."""
    with pytest.raises(UsageError, match=next(iter(option))):
        begin(tmp_path, name, **option)


def test_an_adapter_of_peft_on_top_is_refused(tmp_path):
    model = load(tmp_path, "sft")
    callback = DynamicRankCallback(attach(model, **BUDGET))
    with pytest.raises(UsageError, match="an adapter of PEFT on the model"):
        sft(tmp_path, model, [callback], peft_config=LoraConfig(target_modules="all-linear"))


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_in_bf16_has_components_in_fp32(tmp_path, autocast):
    """As transformers loads most models today."""
    model = load(tmp_path, "dpo").to(torch.bfloat16)
    attached = attach(model, **BUDGET)
    callback = DynamicRankCallback(attached, **PRUNING)
    reference = attached.reference()
    trainer = TRAINERS["dpo"](
        tmp_path, model, [callback], ref_model=reference, bf16=autocast, gradient_checkpointing=True
    )
    trainer.train()
    assert attached.pool.values.dtype == torch.float32
    assert next(reference.parameters()).dtype == torch.bfloat16
    assert attached.parameters <= attached.start.budget
    assert losses(trainer)[-1][0] < losses(trainer)[0][0] == pytest.approx(0.6931, abs=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
