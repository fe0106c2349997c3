"""Pruning after training, the mathematics: bases change nothing, and what is cut is what matters least."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_close_to_truth
from peft_adapters import exact_delta, ids, load, make
from torch.nn import functional as F

from dynlora_cli import plugins
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.config.budget import Budget
from dynlora_cli.data.batches import Batch
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.pruning.covariances import Covariances, turn
from dynlora_cli.pruning.posthoc import Order, parameters_of, smallest_within

POLICIES = plugins.names("policies")


def batches():
    tokens = ids()
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    labels[0, 14:] = -100
    inputs = {"input_ids": tokens, "attention_mask": mask}
    for row in range(3):
        cut = {name: value[row : row + 1] for name, value in inputs.items()}
        yield Batch(cut, labels[row : row + 1], [row], 20, int((labels[row] != -100).sum()))


def ordered(kind: str, policy: str, folder):
    base, path = make(kind, folder)
    adapter = read_adapter(path)
    model = load(base)
    model.requires_grad_(False)
    return model, adapter, Order.by_policy(adapter, plugins.load("policies", policy), model, batches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "patterns", "dora", "conv1d", "hira"])
@pytest.mark.parametrize("policy", POLICIES)
def test_putting_in_order_changes_no_layer(kind: str, policy: str, tmp_path):
    refused = {("hira", "activation"): "is a HiRA", ("hira", "retrieval"): "no plain sum of components"}
    refused[("dora", "retrieval")] = "no plain sum of components"
    if (kind, policy) in refused:
        with pytest.raises(UsageError, match=refused[kind, policy]):
            ordered(kind, policy, tmp_path)
        return
    _, adapter, order = ordered(kind, policy, tmp_path)
    assert order.adapter.layers.keys() == adapter.layers.keys()
    for name, factors in adapter.layers.items():
        turned = exact_delta(order.adapter.layers[name])
        assert_close_to_truth(turned, exact_delta(factors), terms=48, dtype=torch.float32)
    assert len(order.scores_K) == order.adapter.components
    assert not order.scores_K.isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_cuts_are_nested_and_within_their_size(policy: str, tmp_path):
    _, adapter, order = ordered("lora", policy, tmp_path)
    larger = None
    for parameters in (adapter.parameters - 1, adapter.parameters // 2, adapter.parameters // 5, order.least):
        keep, _ = order.keep(parameters)
        cut = order.cut(keep)
        assert cut.parameters <= parameters
        assert (
            cut.parameters > parameters - max(factors.cost for factors in adapter.layers.values())
            or cut.components == 1
        )
        assert larger is None or not (keep & ~larger).any()
        larger = keep


def test_magnitude_cuts_a_layer_to_its_best_approximation(tmp_path):
    _, adapter, order = ordered("lora", "magnitude", tmp_path)
    keep, _ = order.keep(adapter.parameters // 2)
    cut = order.cut(keep)
    lost = 0.0
    for name, factors in adapter.layers.items():
        delta = exact_delta(factors)
        kept = exact_delta(cut.layers[name]) if name in cut.layers else torch.zeros_like(delta)
        rank = cut.ranks.get(name, 0)
        optimum = torch.linalg.svdvals(delta)[rank:].square().sum()
        assert (delta - kept).square().sum().item() == pytest.approx(optimum.item(), rel=1e-5, abs=1e-9)
        lost += optimum.item()
    total = sum(factors.energy() ** 2 for factors in adapter.layers.values())
    assert order.energy_kept(keep) == pytest.approx(1 - lost / total, abs=1e-5)


def test_svd_factors_of_more_components_than_the_layer_has_dimensions():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 6, generator=generator).double(), torch.randn(5, 9, generator=generator).double()
    a2, b2 = svd_factors(a, b)
    assert a2.shape == (5, 6)
    torch.testing.assert_close(b2 @ a2, b @ a)
    torch.testing.assert_close(a2 @ a2.T, (a.norm(dim=1).mean() ** 2) * torch.eye(5, dtype=torch.float64))


def dense_flow(model, adapter, name):
    """E[x xᵀ] and E[g gᵀ] of a layer, g the gradient at its output, by the plain way."""
    seen: dict[str, list[torch.Tensor]] = {"x": [], "g": []}
    with attached(model, adapter) as pool:
        layer = pool.layers[name]

        def look(_module, inputs, output):
            seen["x"].append(inputs[0].detach())
            output.register_hook(lambda gradient: seen["g"].append(gradient))

        handle = layer.register_forward_hook(look)
        masks = []
        for batch in batches():
            masks.append(batch.inputs["attention_mask"].bool())
            logits = model(**batch.inputs).logits
            F.cross_entropy(logits[0], batch.labels[0], reduction="sum").backward()
        handle.remove()
    x, g = (torch.cat([v[m] for v, m in zip(seen[key], masks, strict=True)]).double() for key in "xg")
    return x.T @ x / len(x), g.T @ g / len(g)


def test_activation_is_the_optimum_of_the_weighted_error(tmp_path):
    model, adapter, order = ordered("lora", "activation", tmp_path)
    name = "model.layers.1.mlp.up_proj"
    C, gamma = dense_flow(model, adapter, name)

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    delta = exact_delta(adapter.layers[name])
    weighted = root(gamma) @ delta @ root(C)
    values = torch.linalg.svdvals(weighted)
    energies = order.split(order.scores_K * order.costs_K)[name]
    torch.testing.assert_close(energies, values[: len(energies)].square(), rtol=1e-3, atol=float(values[0] ** 2) * 1e-6)
    factors = order.adapter.layers[name]
    for rank in (1, 2, 3):
        kept = (factors.b_OC[:, :rank] @ factors.a_CI[:rank]).double()
        lost = (root(gamma) @ (delta - kept) @ root(C)).square().sum().item()
        assert lost == pytest.approx(values[rank:].square().sum().item(), rel=2e-2)


def test_covariances_are_those_of_real_tokens(tmp_path):
    model, adapter, _ = ordered("lora", "random", tmp_path)
    name = "model.layers.2.self_attn.q_proj"
    C, gamma = dense_flow(model, adapter, name)
    with attached(model, adapter) as pool:
        found = Covariances()
        for batch in batches():
            with found.watching(pool, batch, real_BT=batch.inputs["attention_mask"].bool()):
                logits = model(**batch.inputs).logits
                F.cross_entropy(logits[0], batch.labels[0], reduction="sum").backward()
    a, b = adapter.layers[name].a_CI.double(), adapter.layers[name].b_OC.double()
    inputs, outputs = found.mean(name)
    torch.testing.assert_close(inputs, a @ C @ a.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs, b.T @ gamma @ b, rtol=1e-3, atol=float(outputs.abs().max()) * 1e-4)


def test_turning_where_nothing_flows_keeps_the_update():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    one = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    a2, b2, energies = turn(a, b, one @ one.T, torch.zeros(4, 4, dtype=torch.float64))
    torch.testing.assert_close(b2 @ a2, b @ a, atol=1e-3, rtol=1e-2)
    assert energies.isfinite().all()


def test_bisection_finds_the_smallest_size_within_the_limit():
    asked = []

    def loss(parameters: int) -> float:
        asked.append(parameters)
        return 1 + 100 / parameters

    found = smallest_within(loss, 1, 100_000, 1.1, bisections=30)
    assert found == 1000
    assert len(asked) <= 31
    assert smallest_within(loss, 1, 100_000, 200.0) == 1


def test_budgets_in_parameters(tmp_path):
    adapter = read_adapter(make("patterns", tmp_path)[1])
    assert parameters_of(Budget("share", 0.5), [adapter]) == adapter.parameters // 2
    assert parameters_of(Budget("parameters", 3000), [adapter]) == 3000
    width = sum(factors.cost for factors in adapter.layers.values())
    assert parameters_of(Budget("rank", 2), [adapter]) == 2 * width
