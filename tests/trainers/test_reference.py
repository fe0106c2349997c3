"""A model without its components that shares every tensor of the one that has them."""

from __future__ import annotations

import pytest
import torch
from tiny_run import model_folder
from torch import nn
from transformers import AutoModelForCausalLM

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.trainers.reference import reference, share

IDS = torch.arange(2, 26).view(2, 12)


def load(folder, kind):
    return AutoModelForCausalLM.from_pretrained(model_folder(folder, kind), dtype=torch.float32).eval()


def put(model):
    """Components with random values in every linear layer but the head."""
    layers = {}
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            layers[name] = ComponentLinear(module.requires_grad_(False), 2.0)
            setattr(model.get_submodule(parent), leaf, layers[name])
    pool = Pool(layers, dict.fromkeys(layers, 3))
    pool.cast_with(model)
    with torch.no_grad():
        pool.values.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(1))
    return pool


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tmp_path):
    return load(tmp_path, request.param)


def test_the_reference_computes_what_the_base_did(model):
    before = model(IDS).logits
    pool = put(model)
    other = reference(model, pool)
    assert type(other) is type(model)
    assert not any(isinstance(module, ComponentLinear) for module in other.modules())
    assert torch.equal(other(IDS).logits, before)
    assert not torch.equal(model(IDS).logits, before)
    assert torch.equal(other.generate(IDS[:1], max_new_tokens=2, do_sample=False)[:, :12], IDS[:1])


def test_the_reference_has_no_tensor_of_its_own(model):
    pool = put(model)
    other = reference(model, pool)
    ours = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert {tensor.data_ptr() for tensor in [*other.parameters(), *other.buffers()]} <= ours
    assert {name for name, _ in other.named_parameters()} == {
        name.replace(".base.", ".") for name, _ in model.named_parameters() if not name.endswith(("a_CI", "b_OC"))
    }


def test_what_is_done_to_one_model_does_not_reach_the_other(model):
    pool = put(model)
    other = reference(model, pool)
    assert not other._forward_pre_hooks  # the pool's cast cache
    other.forward = None  # trainers patch it
    model.train()
    assert not other.training
    assert model(IDS).logits.shape[:2] == IDS.shape


def test_a_second_model_gives_its_tensors_back(model, tmp_path):
    before = model(IDS).logits
    pool = put(model)
    other = load(tmp_path, "gpt2" if "GPT2" in type(model).__name__ else "llama")
    size = sum(tensor.numel() * tensor.element_size() for tensor in other.parameters())
    assert share(other, model, pool) == size
    assert share(other, model, pool) == 0
    ours = {tensor.data_ptr() for tensor in model.parameters()}
    assert {tensor.data_ptr() for tensor in other.parameters()} <= ours
    assert torch.equal(other(IDS).logits, before)


def test_another_model_keeps_its_weights(model, tmp_path):
    pool = put(model)
    other = load(tmp_path, "gpt2" if "GPT2" in type(model).__name__ else "llama")
    name, last = list(other.named_parameters())[-1]
    nn.init.constant_(last, 0.5)
    with pytest.raises(UsageError, match=f"the reference model's {name} is not that of the base"):
        share(other, model, pool)
    assert other.get_parameter(name) is last
