"""A frozen layer with the components of several adapters side by side, each row of a batch with its own mix of them.

y = W x + ((x Aᵀ) * G) Bᵀ          G is rows x components: what each row takes of each component

A and B hold the components of all adapters, whatever the rank of each, so one sum is every mix: an adapter, the base
alone, a blend, the gates of a router. There is never a tensor of tokens x adapters x outputs, and components that no
row of the batch uses are left out. lora/ways/ has the ways to compute it.

Dimensions, as suffixes of names:
    B  requests of a batch              E  adapters of a bank; E' those that have components in the layer
    N  rows of tokens                   R  components of the layer, all adapters together
    I  inputs of the layer (d_in)       O  outputs of the layer (d_out)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from dynlora_cli.kernels.fused_lora import thin_product
from dynlora_cli.lora.ways.mixes import Mixes
from dynlora_cli.lora.ways.plan import Place, Plan
from dynlora_cli.models.linear import forget_input, linear_shape


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
        gates: weighs the adapters by token; `weights_BE` is not used then.
        mixes: made of `weights_BE`.
    """

    def __init__(self) -> None:
        self.gates: TokenGates | None = None
        self.mixes: Mixes | None = None

    @property
    def weights_BE(self) -> Tensor | None:
        """What each request takes of each adapter of the bank. None: the base alone."""
        return None if self.mixes is None else self.mixes.weights_BE

    @weights_BE.setter
    def weights_BE(self, weights_BE: Tensor | None) -> None:
        self.mixes = None if weights_BE is None else Mixes(weights_BE)


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
    columns_R: Tensor  # whose a component is, as a column of the bank
    owners_R: Tensor  # the same as an index into `adapters`

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
        parts, device = list(parts), self.device
        ends = [0, *accumulate(len(a_CI) for _, a_CI, _ in parts)]
        self.slices = [slice(*pair) for pair in pairwise(ends)]
        with torch.inference_mode(False):  # they may be used with gradients later
            a = torch.empty(ends[-1], self.in_features, device=device)
            # In memory a component's b is one piece, like its a: then those of an adapter are, and products are faster.
            b = torch.empty(ends[-1], self.out_features, device=device)
            for place, (_, a_CI, b_OC) in zip(self.slices, parts, strict=True):
                a[place], b[place] = a_CI.detach(), b_OC.detach().T
        self.register_buffer("a_RI", a, persistent=False)
        self.register_buffer("b_OR", b.T, persistent=False)
        self.number([column for column, _, _ in parts])

    def number(self, adapters: Sequence[int]) -> None:
        """Say which columns of the bank the adapters are that have components here."""
        if self.choice.mixes is not None:
            self.choice.mixes.plans.pop(self, None)
        self.adapters = list(adapters)
        # Made in Python: a dry run, whose tensors have no numbers, comes here as well.
        owners = [owner for owner, place in enumerate(self.slices) for _ in range(place.start, place.stop)]
        owners_R = torch.tensor(owners, dtype=torch.long)
        columns_R = torch.tensor(self.adapters, dtype=torch.long)[owners_R]
        self.register_buffer("owners_R", owners_R.to(self.device), persistent=False)
        self.register_buffer("columns_R", columns_R.to(self.device), persistent=False)

    def places(self) -> list[tuple[int, Place]]:
        """The adapters that have components here, by column of the bank, and which components."""
        return [(column, (s.start, s.stop)) for column, s in zip(self.adapters, self.slices, strict=True)]

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
        choice = self.choice
        plan = self._plan(choice.mixes) if choice.gates is None else None
        if plan is not None and plan.in_place(x):
            y = plan.product(x)
            plan.add_to(y, x)
            return y
        y = self.base(x)
        if y.requires_grad:
            forget_input(self.base, y)
        if choice.gates is not None:
            return self._routed(y, x, choice.gates) if self.adapters else y
        if plan is None:
            return y
        return y + plan.update(self._input(x), plan.tokens(x)).view(y.shape).to(y.dtype)

    def _plan(self, mixes: Mixes | None) -> Plan | None:
        """How to compute for these mixes; None where they use nothing of this layer."""
        if mixes is None:
            return None
        plan = mixes.plans.get(self, mixes)
        if plan is mixes or mixes.trained:  # not made yet; where weights train, each graph has gates of its own
            with torch.inference_mode(False):
                plan = None if mixes.used.isdisjoint(self.adapters) else Plan(self, mixes)
            mixes.plans[self] = plan
        return plan

    def _input(self, x: Tensor) -> Tensor:
        """The rows of x, [N, I], in the type that components compute in."""
        # Autocast casts both operands itself; without it the update is computed in the components' precision.
        if x.dtype != self.a_RI.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.a_RI.dtype)
        return x.reshape(-1, x.shape[-1])

    def _routed(self, y: Tensor, x: Tensor, router: TokenGates) -> Tensor:
        x_NI = self._input(x)
        h_NR = thin_product(x_NI, self.a_RI)
        gates = router.gates(self, x_NI, h_NR)
        if gates.shape[-1] != len(self.a_RI):
            gates = gates.index_select(-1, self.owners_R)
        return y + ((h_NR * gates) @ self.b_OR.T).view(y.shape).to(y.dtype)
