"""The layer that uses what a hypernetwork writes: each row of a batch has the components of its own condition.

Dimensions, as suffixes of names:
    R  rows of a batch      B  conditions among them      T  tokens of a row
    C  components           I  inputs (d_in)              O  outputs (d_out)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.hypernets.hypernet import Written
from dynlora_cli.models.linear import forget_input, linear_shape


class WrittenLinear(nn.Module):
    """A frozen linear layer plus Σ g b (a · x), by row of the batch. Until it holds something, it is the base alone.

    Args:
        base: the frozen layer; maps [..., I] to [..., O].
        dropout: probability of dropping an input of the update while training.
    """

    def __init__(self, base: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.dropout, self.off = base, dropout, False
        self.in_features, self.out_features = linear_shape(base)
        self.written: Written | None = None
        self.rows = 1

    def hold(self, written: Written | None, condition_R: Tensor | None = None) -> None:
        """Use these components from now on; None: the base alone.

        Args:
            written: for B conditions.
            condition_R: of each row of the batch, which of them it has; None: all rows have the one that there is.
        """
        self.rows = 1 if condition_R is None else len(condition_R)
        if written is None or condition_R is None:
            self.written = written
            return
        a, b, gate = written
        self.written = Written(
            a[condition_R] if a.ndim == 3 else a,
            b[condition_R] if b.ndim == 3 else b,
            None if gate is None else gate[condition_R],
        )

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for model code that looks at it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias, for model code that looks at it."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O].

        Raises:
            ValueError: the rows of x cannot be told apart.
        """
        y = forget_input(self.base, self.base(x))
        if self.written is None or self.off:
            return y
        # Autocast casts both operands itself; without it the update is computed in the components' precision.
        if x.dtype != self.written.a.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.written.a.dtype)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return y + self._update(x).view(y.shape).to(y.dtype)

    def _update(self, x: Tensor) -> Tensor:
        """What is added, [R, T, O]."""
        assert self.written is not None
        a, b, gate_RC = self.written
        tokens = x.numel() // self.in_features
        if tokens % self.rows:
            raise ValueError(f"{tokens} tokens are not those of {self.rows} rows, which cannot be told apart")
        x_RTI = x.reshape(self.rows, -1, self.in_features)
        h_RTC = x_RTI @ a.mT
        if gate_RC is not None:
            h_RTC = h_RTC * gate_RC[:, None]
        return h_RTC @ b.mT


def place_layers(model: nn.Module, names: Iterable[str], dropout: float = 0.0) -> dict[str, WrittenLinear]:
    """Put a layer around each of these linear layers of a model, in place; they are the base alone at first."""
    placed = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(name)
        placed[name] = WrittenLinear(module, dropout)
        setattr(model.get_submodule(parent), leaf, placed[name])
    return placed


@contextmanager
def lent(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, WrittenLinear]]:
    """The model with such layers inside the block, and as it was after it."""
    placed = place_layers(model, names)
    try:
        yield placed
    finally:
        for name, layer in placed.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.base)


@contextmanager
def silent(layers: Iterable[WrittenLinear]) -> Iterator[None]:
    """Inside the block these layers are the base alone."""
    layers = list(layers)
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
