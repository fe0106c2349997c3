"""Layers whose components go by rows of the batch, against plain sums in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dynlora_cli.hypernets.hypernet import Written
from dynlora_cli.hypernets.layer import WrittenLinear, place_layers, silent

B, R, T, C, I, O = 2, 3, 4, 5, 6, 7  # noqa: E741 - shapes, see hypernets/layer.py
ROWS = torch.tensor([1, 0, 1])


def parts(form: str) -> Written:
    """Components of two conditions: `shared` factors and a gate, factors by condition, or A shared alone."""
    torch.manual_seed(0)
    of = {"shared": (False, False, True), "own": (True, True, False), "mixed": (False, True, True)}[form]
    a, b = (
        torch.randn(*((B,) if own else ()), *shape).double() for own, shape in zip(of, ((C, I), (O, C)), strict=False)
    )
    return Written(
        a.requires_grad_(), b.requires_grad_(), torch.randn(B, C).double().requires_grad_() if of[2] else None
    )


def expected(x: torch.Tensor, base: nn.Module, written: Written, condition_R: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, condition in zip(x, condition_R.tolist(), strict=True):
        a, b = (part[condition] if part.ndim == 3 else part for part in written[:2])
        gate = torch.ones(C).double() if written.gate is None else written.gate[condition]
        rows.append(base(row) + row @ (b @ torch.diag(gate) @ a).T)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["shared", "own", "mixed"])
def test_each_row_has_its_own_sum_and_gradients_reach_what_was_written(form: str):
    base, written = nn.Linear(I, O).double().requires_grad_(False), parts(form)
    layer, x = WrittenLinear(base), torch.randn(R, T, I).double()
    layer.hold(written, ROWS)
    leaves = [part for part in written if part is not None]
    want = expected(x, base, written, ROWS)
    torch.testing.assert_close(layer(x), want)
    torch.testing.assert_close(layer(x.flatten(0, 1)), want.flatten(0, 1))  # as some blocks give their tokens
    for mine, theirs in zip(
        torch.autograd.grad(layer(x).square().sum(), leaves),
        torch.autograd.grad(want.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("form", ["shared", "own", "mixed"])
def test_one_condition_serves_rows_of_any_number(form: str):
    base, written = nn.Linear(I, O).double(), parts(form)
    alone = Written(
        *(part if part is None or (part.ndim == 2 and at < 2) else part[:1] for at, part in enumerate(written))
    )
    layer, x = WrittenLinear(base), torch.randn(R, T, I).double()
    layer.hold(alone)
    torch.testing.assert_close(layer(x), expected(x, base, written, torch.zeros(R, dtype=torch.long)))


def test_it_is_the_base_alone_before_it_holds_anything_and_while_it_is_silent():
    model = nn.Sequential(nn.Linear(I, O)).double()
    base, x = model[0], torch.randn(R, T, I).double()
    (layer,) = place_layers(model, ["0"]).values()
    assert torch.equal(model(x), base(x))
    layer.hold(parts("shared"), ROWS)
    changed = model(x)
    with silent([layer]):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), changed)
    assert not torch.allclose(changed, base(x))


def test_rows_that_cannot_be_told_apart_are_refused():
    layer = WrittenLinear(nn.Linear(I, O).double())
    layer.hold(parts("shared"), ROWS)
    with pytest.raises(ValueError, match="4 tokens are not those of 3 rows"):
        layer(torch.randn(4, I).double())


def test_under_autocast_it_computes_as_the_base_does():
    base, written = nn.Linear(I, O), parts("shared")
    layer, x = WrittenLinear(base), torch.randn(R, T, I)
    layer.hold(Written(*(part.detach().float() for part in written)), ROWS)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


def test_dropout_is_of_the_update_alone_and_only_in_training():
    layer, x = WrittenLinear(nn.Linear(I, O), dropout=0.5), torch.randn(R, T, I)
    layer.hold(Written(torch.zeros(C, I), torch.randn(O, C), torch.ones(1, C)))
    assert torch.equal(layer(x), layer.base(x))
    layer.hold(Written(torch.randn(C, I), torch.randn(O, C), torch.ones(1, C)))
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(
        layer(x), F.linear(x, layer.weight, layer.bias) + (x @ layer.written.a.T) @ layer.written.b.T
    )
