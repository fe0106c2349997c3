"""What we save is a plain LoRA: stock PEFT computes our logits, with mixed ranks and with layers pruned to nothing."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from numeric import assert_close_to_truth, in_double
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from dynlora_cli.adapters import kind as kinds
from dynlora_cli.adapters.adapter import PREFIX
from dynlora_cli.adapters.write import lora_config, write_adapter
from dynlora_cli.config.adapter_section import Adapter
from dynlora_cli.lora.start import plan_start
from dynlora_cli.lora.surgery import shrink
from dynlora_cli.lora.variants import lora
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.targets import find_targets

# Roundings on the way to a logit: in each of three blocks, sums over up to 32 and 48 numbers.
TERMS = 3 * (32 + 48)
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "bert": BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=3,
    ),
}  # fmt: skip
TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "sequence-classification"}


def build(kind):
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(CONFIGS[kind]).eval()


def pruned(kind, folder, *, scale_alpha=16.0, seed=0):
    """A base on disk, the same model with components of mixed rank (some layers at 0), and the adapter it saves."""
    model = build(kind)
    model.save_pretrained(folder / "base")
    head = "classifier" if kind == "bert" else None
    targets = find_targets(model, "all-linear", whole=[head] if head else [])
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    start = plan_start(shapes, SimpleNamespace(kind="rank", value=4), 6)
    options = Adapter(alpha=scale_alpha, scaling="rslora")
    pool = lora.attach(model, targets, start, options, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pool.values.copy_(0.2 * torch.randn(pool.parameters, generator=generator))
        if head:
            model.classifier.weight.normal_(generator=generator)
    keep = torch.rand(pool.components, generator=generator) < 0.5
    layers = pool.layers_K()
    keep[(layers % 4 == 1)] = False
    keep[layers == 2] = True
    shrink(pool, torch.optim.AdamW([pool.values]), keep)
    adapter = folder / "adapter"
    adapter.mkdir()
    saved_head = {f"{PREFIX}{head}.{n}": v for n, v in model.classifier.state_dict().items()} if head else {}
    config = lora_config(
        pool.counts, base_model=str(folder / "base"), revision=None, task=TASKS[kind],
        fan_in_fan_out=kind == "gpt2", modules_to_save=[head] if head else None,
    )  # fmt: skip
    config, tensors = kinds.saved("lora", pool, config)
    write_adapter(adapter, config, {**tensors, **saved_head})
    return model, pool, adapter


@pytest.mark.parametrize("kind", CONFIGS)
def test_stock_peft_gives_our_logits(kind, tmp_path):
    model, pool, adapter = pruned(kind, tmp_path)
    ranks = set(pool.counts.values())
    assert 0 in ranks
    assert len(ranks) > 3, "mixed ranks"
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    base = auto.from_pretrained(tmp_path / "base", **({"num_labels": 3} if kind == "bert" else {}))
    theirs = in_double(PeftModel.from_pretrained(base, adapter).eval())
    ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model(ids).logits, theirs(ids).logits
        plain = build(kind)(ids).logits
    assert (ours - plain).abs().max() > 0.05, "the adapter does something"
    assert_close_to_truth(ours, expected, terms=TERMS)
    with torch.no_grad():
        merged = theirs.merge_and_unload()(ids).logits
    assert_close_to_truth(ours, merged, terms=TERMS)


def test_scale_is_exactly_one_for_every_consumer(tmp_path):
    _, pool, adapter = pruned("llama", tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    largest = max(pool.counts.values())
    assert config["r"] == config["lora_alpha"] == largest
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert (config["use_rslora"], config["use_dora"], config["bias"]) == (False, False, "none")
    alive = [name for name, rank in pool.counts.items() if rank]
    assert config["target_modules"] == sorted(alive)
    for name in alive:
        layer = pool.layers[name]
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        exact = layer.scale * layer.b_OC.double() @ layer.a_CI.double()
        assert_close_to_truth(b.double() @ a.double(), exact, terms=2, dtype=torch.float32)  # the scale is in B
    assert len(tensors) == 2 * len(alive)


def test_bytes_depend_on_the_state_only_and_others_may_read_them(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _, _pool, first = pruned("llama", tmp_path / "one")
    _, _, second = pruned("llama", tmp_path / "two")
    name = "adapter_model.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert (first / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_hundreds_of_modules_load_in_peft_about_as_fast_as_with_one_rank(tmp_path):
    """PEFT tries every pattern for every module; one pattern per rank keeps that linear."""
    names = [f"model.layers.{i}.mlp.{m}_proj" for i in range(80) for m in ("up", "gate", "down")]
    config = lora_config(
        {name: 1 + i % 12 for i, name in enumerate(names)}, base_model="x", revision=None, task="causal-lm"
    )
    assert len(config["rank_pattern"]) == 11
    from peft.utils.other import get_pattern_key

    started = time.perf_counter()
    for index, name in enumerate(names):
        key = get_pattern_key(config["rank_pattern"].keys(), name)
        assert config["rank_pattern"].get(key, config["r"]) == 1 + index % 12
    assert time.perf_counter() - started < 5


def test_similar_names_do_not_share_a_pattern():
    from peft.utils.other import get_pattern_key

    ranks = {"a.layers.1.q_proj": 2, "b.layers.1.q_proj": 3, "layers.11.q_proj": 5, "layersx1.q_proj": 4}
    config = lora_config(ranks, base_model="x", revision=None, task="causal-lm")
    for name, rank in ranks.items():
        key = get_pattern_key(config["rank_pattern"].keys(), name)
        assert config["rank_pattern"].get(key, config["r"]) == rank
