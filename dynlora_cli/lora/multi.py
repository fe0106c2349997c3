"""A frozen layer with the components of several adapters side by side, each row of a batch with its own mix of them.

y = W x + ((x Aᵀ) * G) Bᵀ          G is rows x components: what each row takes of each component

A and B hold the components of all adapters, whatever the rank of each, so one sum is every mix: an adapter, the base
alone, a blend, the gates of a router. There is never a tensor of tokens x adapters x outputs.

Dimensions, as suffixes of names:
    B  requests of a batch              E  adapters of a bank; E' those that have components in the layer
    N  rows of tokens                   R  components of the layer, all adapters together
    I  inputs of the layer (d_in)       O  outputs of the layer (d_out)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynlora_cli.models.linear import linear_shape


class TokenGates(Protocol):
    """A router that weighs the adapters anew for each token, in each layer."""

    def gates(self, layer: MultiLinear, x_NI: Tensor, h_NR: Tensor) -> Tensor:
        """What each token takes of the layer's adapters, or of each component.

        Args:
            layer: its `adapters` and `slices` say whose components the columns of h are.
            x_NI: the layer's input, in the type that components compute in.
            h_NR: x Aᵀ.

        Returns:
            [N, E'], columns in the order of `layer.adapters`, or [N, R].
        """
        ...


class Choice:
    """What the next forward passes use of a bank's adapters. All layers of a bank share one.

    Attributes:
        weights_BE: what each request takes of each adapter of the bank. None: the base alone.
        gates: weighs the adapters by token; `weights_BE` is not used then.
    """

    def __init__(self) -> None:
        self.weights_BE: Tensor | None = None
        self.gates: TokenGates | None = None


class MultiLinear(nn.Module):
    """A frozen linear layer plus the components of several adapters.

    Args:
        base: the frozen layer; maps [..., I] to [..., O].
        name: of the layer in the model.
        choice: says who uses which adapters.

    Attributes:
        a_RI, b_OR: the components, adapter after adapter, fp32; the scale is in B.
        adapters: the columns of the bank that have components here.
        slices: of R, one for each of `adapters`.
    """

    a_RI: Tensor
    b_OR: Tensor

    def __init__(self, base: nn.Module, name: str, choice: Choice) -> None:
        super().__init__()
        self.base, self.name, self.choice = base, name, choice
        self.in_features, self.out_features = linear_shape(base)
        self.adapters: list[int] = []
        self.slices: list[slice] = []
        self.hold([])

    def hold(self, parts: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Take these components in place of those before.

        Args:
            parts: the adapter's column in the bank, its a [C, I] and its b [O, C] with the scale in it.
        """
        parts = list(parts)
        device = self.device
        self.adapters = [column for column, _, _ in parts]
        self.slices, end = [], 0
        for _, a_CI, _ in parts:
            self.slices.append(slice(end, end + len(a_CI)))
            end += len(a_CI)
        a = [a_CI.detach().to(device, torch.float32) for _, a_CI, _ in parts]
        b = [b_OC.detach().to(device, torch.float32) for _, _, b_OC in parts]
        self.register_buffer("a_RI", torch.cat([torch.empty(0, self.in_features, device=device), *a]), False)
        self.register_buffer("b_OR", torch.cat([torch.empty(self.out_features, 0, device=device), *b], 1), False)

    @property
    def device(self) -> torch.device:
        """Where the base's weight lies."""
        return self.weight.device

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
            ValueError: the rows of x cannot be told apart by request.
        """
        y = self.base(x)
        choice = self.choice
        if not self.adapters or (choice.gates is None and choice.weights_BE is None):
            return y
        # Autocast casts both operands itself; without it the update is computed in the components' precision.
        if x.dtype != self.a_RI.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a_RI.dtype)
        x_NI = x.reshape(-1, x.shape[-1])
        h_NR = F.linear(x_NI, self.a_RI)
        if choice.gates is not None:
            gates = self.by_component(choice.gates.gates(self, x_NI, h_NR))
            h_NR = h_NR * gates
        else:
            assert choice.weights_BE is not None
            gates_BR = self.by_component(choice.weights_BE.to(h_NR.device)[:, self.adapters])
            h_NR = (h_NR.view(len(gates_BR), self._tokens(x, len(gates_BR)), -1) * gates_BR[:, None]).flatten(0, 1)
        return y + F.linear(h_NR, self.b_OR).view(*x.shape[:-1], -1).to(y.dtype)

    def by_component(self, gates: Tensor) -> Tensor:
        """Gates of the layer's adapters [..., E'] as gates of its components [..., R]; those of components as is."""
        if gates.shape[-1] == len(self.a_RI):
            return gates
        ranks = torch.tensor([part.stop - part.start for part in self.slices], device=gates.device)
        return gates.repeat_interleave(ranks, -1)

    def _tokens(self, x: Tensor, requests: int) -> int:
        """Rows of tokens that each request has in x, one request after the other."""
        lead = x.shape[0] if x.ndim > 2 else x.numel() // max(1, x.shape[-1])
        if lead % requests:
            raise ValueError(f"{self.name} is given {tuple(x.shape)}, which are no rows of {requests} requests")
        return x.numel() // max(1, x.shape[-1]) // requests
