"""`nn.Linear`, what is made from it, and the slice of one expert: a weight [O, I]."""

from __future__ import annotations

from torch import Tensor, nn

from dynlora_cli.models.experts import ExpertSlice

as_stored = True


def matches(cls: type) -> bool:
    return issubclass(cls, (nn.Linear, ExpertSlice))


def dense(base: nn.Module) -> Tensor:
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight.detach().float()


def fuses(base: nn.Module) -> bool:
    """Not what others make of `nn.Linear`, which may compute more than a product."""
    return type(base) in (nn.Linear, ExpertSlice) and base.weight.is_floating_point()  # type: ignore[operator]


def weight_OI(base: nn.Module) -> Tensor:
    return base.weight  # type: ignore[return-value]
