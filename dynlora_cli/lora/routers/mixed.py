"""A layer of several adapters, some of which are more than components: a DoRA, a HiRA.

y = W x + ((x Aᵀ) * G) Bᵀ + Σ_j g_j (layer_j(x) - W x)

An adapter of another kind is a layer of its own on the same base, and what it adds is what it returns above the base's
output. So each costs one more product with W: they are for mixtures of a few.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.multi import Choice, MultiLinear, TokenGates


class MixedLinear(MultiLinear):
    """A frozen linear layer plus the components of some adapters, and other adapters as layers of their own.

    Args:
        base, name, choice: of `MultiLinear`.

    Attributes:
        adapters: those that hold components first, as in `slices`, then those of other kinds, as in `others`.
        others: the layers of the latter, each on the same base.
    """

    def __init__(self, base: nn.Module, name: str, choice: Choice) -> None:
        super().__init__(base, name, choice)
        self.others: tuple[ComponentLinear, ...] = ()

    def add(self, columns: Sequence[int], layers: Sequence[ComponentLinear]) -> None:
        """Take adapters of other kinds, too."""
        self.adapters += columns
        self.others = (*self.others, *(layer.requires_grad_(False).eval() for layer in layers))

    def _routed(self, y: Tensor, x: Tensor, router: TokenGates) -> Tensor:
        if not self.others:
            return super()._routed(y, x, router)
        x_NI = self._input(x)
        h_NR = x_NI @ self.a_RI.T
        gates_NE = router.gates(self, x_NI, h_NR)
        plain, apart = gates_NE.split([len(self.slices), len(self.others)], -1)
        z_NO = (h_NR * plain.index_select(-1, self.owners_R)) @ self.b_OR.T
        for place, layer in enumerate(self.others):
            z_NO = z_NO + apart[:, place, None] * (layer(x) - y).reshape(len(x_NI), -1)
        return y + z_NO.view(y.shape).to(y.dtype)
