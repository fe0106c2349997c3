"""Routers by token against dense updates in fp64, and what must not matter to them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from banks import (
    IDS,
    Rule,
    a_model,
    an_adapter,
    arrow_scores,
    opened,
    ragged,
    routed_logits,
    softmax_of_best,
    spectr_scores,
    true_logits,
)
from numeric import assert_close_to_truth
from torch import Tensor

from dynlora_cli.adapters.bank import Bank
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.routing.router import TokenRouter
from dynlora_cli.routing.spectral import top_k_softmax

TERMS = 2000  # two blocks, each with sums over up to 48 numbers, a softmax, and scores from two thin products
ROUTERS = ("arrow", "spectr", "lag")


def _unit(x_NI: Tensor) -> Tensor:
    return x_NI / x_NI.norm(dim=1, keepdim=True)


def _lag(updates: Any, x_NI: Tensor) -> Tensor:
    arrow, spectr = arrow_scores(updates, x_NI), spectr_scores(updates, x_NI)
    left = softmax_of_best(arrow, 2, 1.0) > 0
    best = spectr.masked_fill(~left, -1).argmax(1)
    return torch.nn.functional.one_hot(best, len(updates)).double()


RULES: dict[tuple[str, ...], Rule] = {
    ("arrow",): lambda updates, x: softmax_of_best(arrow_scores(updates, x), 3, 1.0),
    ("arrow", "top_k=2", "router_temperature=0.3"): lambda u, x: softmax_of_best(arrow_scores(u, x), 2, 0.3),
    ("arrow", "norm=unit", "router_temperature=0.1"): lambda u, x: softmax_of_best(arrow_scores(u, _unit(x)), 3, 0.1),
    ("spectr", "top_k=2"): lambda updates, x: softmax_of_best(spectr_scores(updates, x), 2, 1.0),
    ("spectr", "norm=unit", "router_temperature=0.2"): lambda u, x: softmax_of_best(spectr_scores(u, _unit(x)), 3, 0.2),
    ("lag", "top_k=2"): _lag,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", RULES, ids=" ".join)
def test_adapters_of_any_ranks_and_layers_are_weighed_as_dense_updates_are(how: tuple[str, ...]):
    model = a_model()
    adapters = ragged(model)
    truth = true_logits(model, adapters, RULES[how])
    assert_close_to_truth(routed_logits(model, adapters, *how), truth, terms=TERMS)
    plain = true_logits(model, adapters, lambda updates, x: x.new_zeros(len(x), len(updates)))
    assert (truth - plain).abs().max() > 0.1 * plain.abs().max()  # what is compared is more than the base


@pytest.mark.parametrize("how", [("spectr", "top_k=2"), ("lag", "top_k=2")], ids=" ".join)
def test_of_equal_ranks_no_component_is_looked_for(how: tuple[str, ...]):
    model = a_model()
    adapters = {f"a{n}": an_adapter(model, n, ranks=(3, 3)) for n in range(4)}
    with Bank(model, adapters) as bank:
        inner: Any = opened(bank, *how).inner
        assert all(inner.spectrum(layer).even for layer in bank.layers.values())
    assert_close_to_truth(routed_logits(model, adapters, *how), true_logits(model, adapters, RULES[how]), terms=TERMS)


def layer_and_input(bank: Bank, name: str = "model.layers.0.self_attn.q_proj") -> tuple[Any, Tensor, Tensor]:
    layer = bank.layers[name]
    x_NI = 3 * torch.randn(200, layer.in_features, generator=torch.Generator().manual_seed(5))
    return layer, x_NI, x_NI @ layer.a_RI.T


def weights(bank: Bank, router: TokenRouter) -> dict[str, Tensor]:
    """What each adapter gets at a layer that all have, by name."""
    layer, x_NI, h_NR = layer_and_input(bank)
    gates_NR = router.gates(layer, x_NI, h_NR)
    found = {}
    for column, part in zip(layer.adapters, layer.slices, strict=True):
        assert (gates_NR[:, part] == gates_NR[:, part.start : part.start + 1]).all()
        found[bank.names[column]] = gates_NR[:, part.start]
    return found


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_sum_to_one_over_at_most_k(name: str):
    model = a_model()
    with Bank(model, ragged(model)) as bank:
        gates_NK = torch.stack(list(weights(bank, opened(bank, name, "top_k=2")).values()), 1)
    assert torch.allclose(gates_NK.sum(1), torch.ones(200))
    assert (gates_NK >= 0).all()
    assert ((gates_NK > 0).sum(1) == (1 if name == "lag" else 2)).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_the_order_of_adapters_does_not_matter(name: str):
    model = a_model()
    adapters = ragged(model)
    logits = routed_logits(model, adapters, name)
    other = routed_logits(model, dict(reversed(adapters.items())), name)
    assert_close_to_truth(other, logits.double(), terms=TERMS)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("change", ["size", "basis"])
def test_only_the_update_matters_not_its_factors(name: str, change: str):
    model = a_model()
    adapters = ragged(model)

    def same(layer: str, factors: Any) -> Any:
        size = 7.0 if change == "size" else 1.0
        a, b = factors.a_CI * size, factors.b_OC / size
        if change == "basis":
            a, b = svd_factors(a, b)
        return replace(factors, a_CI=a, b_OC=b)

    changed = {
        n: replace(adapter, layers={layer: same(layer, f) for layer, f in adapter.layers.items()})
        for n, adapter in adapters.items()
    }
    logits = routed_logits(model, adapters, name)
    assert_close_to_truth(routed_logits(model, changed, name), logits.double(), terms=TERMS)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_batch_is_each_of_its_rows_alone(name: str):
    model = a_model()
    adapters = ragged(model)
    together = routed_logits(model, adapters, name)
    for row, ids in enumerate(IDS):
        alone = routed_logits(model, adapters, name, ids=ids[None])
        assert_close_to_truth(alone[0], together[row].double(), terms=TERMS)


def test_arrow_sees_one_direction_and_spectr_all():
    """Two adapters with the same strongest direction; one of them has a second that the token lies along."""
    model = a_model()
    first, second = torch.eye(32)[:2]
    out = torch.eye(32)[:, :2]
    one, two = an_adapter(model, 1, targets=("q_proj",)), an_adapter(model, 2, targets=("q_proj",))
    for name, factors in list(one.layers.items()):
        one.layers[name] = replace(factors, a_CI=first[None], b_OC=3 * out[:, :1])
        two.layers[name] = replace(factors, a_CI=torch.stack([first, second]), b_OC=out * torch.tensor([3.0, 2.0]))
    with Bank(model, {"one": one, "two": two}) as bank:
        layer = bank.layers["model.layers.0.self_attn.q_proj"]
        x = (0.1 * first + second)[None]
        spectrum = opened(bank, "arrow").inner.spectrum(layer)  # type: ignore[attr-defined]
        arrow, spectr = spectrum.arrow(x @ layer.a_RI.T)[0], spectrum.spectr(x @ layer.a_RI.T)[0]
    assert arrow.tolist() == pytest.approx([0.1, 0.1])
    assert spectr.tolist() == pytest.approx([0.3, (0.3**2 + 2**2) ** 0.5])


@pytest.mark.parametrize("name", ROUTERS)
def test_an_update_of_zeros_reads_nothing(name: str):
    model = a_model()
    adapters = ragged(model)
    adapters["zero"] = replace(
        adapters["a"], layers={n: replace(f, b_OC=0 * f.b_OC) for n, f in adapters["a"].layers.items()}
    )
    assert routed_logits(model, adapters, name).isfinite().all()


def test_a_layer_without_a_candidate_is_the_base_s():
    model = a_model()
    adapters = {"a": an_adapter(model, 1, targets=("q_proj",)), "b": an_adapter(model, 2, targets=("v_proj",))}
    with Bank(model, adapters) as bank:
        router = opened(bank, "arrow", "general=b")
        layer, x_NI, h_NR = layer_and_input(bank, "model.layers.0.self_attn.v_proj")
        assert not router.gates(layer, x_NI, h_NR).any()
        assert router.names == ("a",)


def test_adapters_may_come_and_go():
    model = a_model()
    adapters = ragged(model)
    with Bank(model, {n: adapters[n] for n in "abc"}) as bank:
        router = opened(bank, "arrow")
        before = weights(bank, router)
        bank.add("d", adapters["d"])
        again = weights(bank, router)
        assert not again.pop("d").any()  # the router was opened without it
        torch.testing.assert_close(again, before)  # a product beside more rows may be summed in another order
        bank.remove("a")
        left = weights(bank, router)
        assert set(left) == {"b", "c", "d"}
        assert torch.allclose(left["b"] + left["c"], torch.ones(200))


@pytest.mark.parametrize("name", ROUTERS)
def test_weights_have_a_gradient(name: str):
    """Trained routers build on these: x is differentiable through h."""
    model = a_model()
    with Bank(model, ragged(model)) as bank:
        layer, x_NI, _ = layer_and_input(bank)
        x_NI.requires_grad_()
        gates_NR = opened(bank, name).gates(layer, x_NI, x_NI @ layer.a_RI.T)
        loss = (gates_NR * (x_NI @ layer.a_RI.T)).square().sum()
        (gradient,) = torch.autograd.grad(loss, x_NI)
    assert gradient.isfinite().all()
    assert gradient.any()


# -- general knowledge subtraction --------------------------------------------------------------------------------------


def test_the_mean_of_general_adapters_is_taken_from_every_update():
    model = a_model()
    adapters = ragged(model)
    logits = routed_logits(model, adapters, "arrow", "general=b+d", "top_k=1")
    differences = {}
    for n in "ac":
        layers = {}
        for layer, factors in adapters[n].layers.items():
            general = [adapters[g].layers[layer] for g in "bd" if layer in adapters[g].layers]
            a = torch.cat([factors.a_CI, *(f.a_CI for f in general)])
            b = torch.cat([factors.b_OC, *(-f.b_OC / 2 for f in general)], 1)
            layers[layer] = replace(factors, a_CI=a, b_OC=b)
        differences[n] = replace(adapters[n], layers=layers)
    truth = true_logits(model, differences, lambda updates, x: softmax_of_best(arrow_scores(updates, x), 1, 1.0))
    assert_close_to_truth(logits, truth, terms=TERMS)


@pytest.mark.parametrize(
    ("general", "said"), [("x", "no adapter 'x'"), ("a+b", "leaves no adapter to choose"), ("0.5*a", "no weights")]
)
def test_general_adapters_that_cannot_be(general: str, said: str):
    model = a_model()
    adapters = {"a": an_adapter(model, 1), "b": an_adapter(model, 2)}
    with Bank(model, adapters) as bank, pytest.raises(UsageError, match=said):
        opened(bank, "arrow", f"general={general}")


@pytest.mark.parametrize(
    ("temperature", "weights"), [(1e-300, [0.0, 1.0, 0.0]), (1e-42, [0.0, 1.0, 0.0]), (1e300, [0.5, 0.5, 0.0])]
)
def test_temperatures_at_the_ends_of_floating_point(temperature: float, weights: list[float]):
    assert top_k_softmax(torch.tensor([[2.0, 3.0, 1.0]]), 2, temperature).tolist() == [weights]
