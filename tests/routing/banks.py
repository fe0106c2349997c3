"""A tiny Llama, adapters of any ranks and targets on it, and what routers by token must compute, dense and in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dynlora_cli.adapters.adapter import Adapter, Factors
from dynlora_cli.adapters.bank import Bank
from dynlora_cli.config.options import given
from dynlora_cli.models.linear import is_linear, linear_shape
from dynlora_cli.routing.router import Context, TokenRouter, open_router

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip
ATTENTION, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(3))
# Of one layer: dense updates by name and inputs [N, I] to the weight of each update [N, K], all in fp64.
Rule = Callable[[Sequence[Tensor], Tensor], Tensor]


def a_model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG).eval().requires_grad_(False)


def an_adapter(
    model: Any, seed: int, *, ranks: Sequence[int] = (1, 5), targets: Sequence[str] = ALL, size: float = 0.3
) -> Adapter:
    """Ranks from the first to the last of `ranks`, drawn for every layer; the update matters."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in model.named_modules():
        if is_linear(module) and name.rpartition(".")[2] in targets:
            d_in, d_out = linear_shape(module)
            rank = int(torch.randint(ranks[0], ranks[-1] + 1, (), generator=generator))
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            layers[name] = Factors(a, size * torch.randn(d_out, rank, generator=generator))
    return Adapter(Path(f"adapter-{seed}"), layers, {})


def ragged(model: Any) -> dict[str, Adapter]:
    """Four adapters: of other ranks in every layer, and of other layers."""
    return {
        "a": an_adapter(model, 1),
        "b": an_adapter(model, 2, targets=ATTENTION),
        "c": an_adapter(model, 3, targets=("q_proj", "down_proj")),
        "d": an_adapter(model, 4, ranks=(4, 7)),
    }


def opened(bank: Bank, name: str, *options: str) -> TokenRouter:
    router = open_router(name, Context(bank=bank, options=given("routers", name, options)))
    assert isinstance(router, TokenRouter)
    return router


@torch.no_grad()
def routed_logits(model: Any, adapters: Mapping[str, Adapter], name: str, *options: str, ids: Tensor = IDS) -> Tensor:
    with Bank(model, adapters) as bank, bank.routed(opened(bank, name, *options)):
        return model(ids).logits


@torch.no_grad()
def true_logits(model: Any, adapters: Mapping[str, Adapter], rule: Rule, ids: Tensor = IDS) -> Tensor:
    """The same with dense updates, in fp64; the last of several equal scores is never asked for."""
    model = copy.deepcopy(model).double()
    for layer in {name for adapter in adapters.values() for name in adapter.layers}:
        there = [adapter.layers[layer] for adapter in adapters.values() if layer in adapter.layers]
        updates = [factors.b_OC.double() @ factors.a_CI.double() for factors in there]

        def hook(_: Any, inputs: Any, output: Tensor, updates: Sequence[Tensor] = updates) -> Tensor:
            x_NI = inputs[0].flatten(0, -2)
            weight_NK = rule(updates, x_NI)
            added = sum(weight_NK[:, k : k + 1] * (x_NI @ delta.T) for k, delta in enumerate(updates))
            return output + added.view_as(output)  # type: ignore[union-attr]

        model.get_submodule(layer).register_forward_hook(hook)
    return model(ids).logits


def arrow_scores(updates: Sequence[Tensor], x_NI: Tensor) -> Tensor:
    return torch.stack([(x_NI @ torch.linalg.svd(delta)[2][0]).abs() for delta in updates], 1)


def spectr_scores(updates: Sequence[Tensor], x_NI: Tensor) -> Tensor:
    found = []
    for delta in updates:
        _, s, vh = torch.linalg.svd(delta, full_matrices=False)
        found.append((x_NI @ (s[:, None] * vh).T).norm(dim=1))
    return torch.stack(found, 1)


def softmax_of_best(score_NK: Tensor, k: int, temperature: float) -> Tensor:
    kth = score_NK.sort(1, descending=True).values[:, min(k, score_NK.shape[1]) - 1 : min(k, score_NK.shape[1])]
    return (score_NK / temperature).masked_fill(score_NK < kth, -torch.inf).softmax(1)
