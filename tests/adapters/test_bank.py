"""A bank of adapters on one base: every row of a mixed batch is what it is alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from numeric import assert_close_to_truth
from transformers import AutoModelForCausalLM, LlamaConfig

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.errors import UsageError
from dynlora_cli.models.linear import is_linear, is_transposed, linear_shape

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip


def a_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval().requires_grad_(False)


def an_adapter(model, seed, *, targets=("q_proj", "v_proj", "down_proj"), most=6):
    """An adapter with another rank in every layer, 0 for some, whose update matters."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in model.named_modules():
        if not is_linear(module) or name.rpartition(".")[2] not in targets:
            continue
        d_in, d_out = linear_shape(module)
        rank = int(torch.randint(most + 1, (), generator=generator))
        a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        layers[name] = Factors(a, 0.3 * torch.randn(d_out, rank, generator=generator))
    return Adapter(Path(f"adapter-{seed}"), layers, {})


def truth(model, adapters, mix, ids_T):
    """Logits in fp64 with the updates of a mix in the weights. [T, V]"""
    model = copy.deepcopy(model).double()
    for name, weight in mix.items():
        for layer, factors in adapters[name].layers.items():
            module = model.get_submodule(layer)
            delta = weight * (factors.b_OC.double() @ factors.a_CI.double())
            module.weight += delta.T if is_transposed(module) else delta
    with torch.no_grad():
        return model(ids_T[None]).logits[0].double()


def test_a_mixed_batch_is_each_request_alone():
    model = a_model()
    adapters = {"a": an_adapter(model, 1), "b": an_adapter(model, 2, targets=("q_proj", "gate_proj"))}
    mixes = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.7, "b": -0.3}]
    ids_BT = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), Bank(model, adapters) as bank, bank.active(mixes):
        logits_BTV = model(ids_BT).logits
    for row, mix in enumerate(mixes):
        assert_close_to_truth(logits_BTV[row], truth(model, adapters, mix, ids_BT[row]), terms=400)


def test_the_model_is_as_it_was_after_close():
    model = a_model()
    before = dict(model.named_modules())
    bank = Bank(model, {"a": an_adapter(model, 1)})
    assert dict(model.named_modules()) != before
    bank.close()
    assert dict(model.named_modules()) == before


def test_one_name_is_given_once():
    model = a_model()
    with Bank(model, {"a": an_adapter(model, 1)}) as bank, pytest.raises(UsageError, match="already"):
        bank.add("a", an_adapter(model, 2))
