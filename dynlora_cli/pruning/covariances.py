"""What flows through the layers, seen through their components: covariances of k x k, never of the layer's size.

    Covariances    collects E[h hᵀ], h = A x, and E[z zᵀ], z = Bᵀ dL/dy, of every layer
    turn           the components that fit them, most important first, and what each of them means to the loss

Removing a part D of an update changes the layer's output by D x. To second order, with the Fisher information as the
curvature, it changes the loss by ½ E(dL/dyᵀ D x)². If x and dL/dy are taken as independent (K-FAC, Martens and Grosse
2015, arXiv 1503.05671), that is ½ ‖Γ^½ D C^½‖², with C = E[x xᵀ] and Γ = E[dL/dy dL/dyᵀ]. So the components to keep
are the largest singular directions of Γ^½ B A C^½. With A C Aᵀ = E[h hᵀ] =: G and Bᵀ Γ B = E[z zᵀ] =: P they are

    P^½ G^½ = U S Vᵀ       B' = B P^-½ U S       A' = Vᵀ G^-½ A       B' A' = B A

Dimensions: C components of a layer, K of the pool, I inputs, O outputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.policy import Observer

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

# Smaller eigenvalues, as a share of the largest, are raised to it: no division by zero where nothing flows.
SMALLEST = 1e-12


class Covariances(Observer):
    """Sums h hᵀ and z zᵀ over the tokens that pass through each layer, forward and backward, and counts the tokens.

    Hooks on the layers see the tokens. Only `dynlora prune` has such hooks, so no policy of training can use this.
    """

    own_basis = True

    def restart(self) -> None:
        super().restart()
        self._energies: dict[str, list[Tensor]] = {}
        self._real_BT: Tensor | None = None

    @contextmanager
    def watching(
        self,
        pool: Pool,
        batch: Batch,  # noqa: ARG002
        *,
        real_BT: Tensor | None = None,
        divisor: float = 1.0,  # noqa: ARG002
    ) -> Iterator[None]:
        """Within the `with` block hooks collect the covariances of all layers."""
        self._real_BT = real_BT
        if not self.seen:
            zeros = partial(torch.zeros, dtype=torch.float64, device=pool.values.device)
            for name, count in pool.counts.items():
                self.seen[f"inputs.{name}"], self.seen[f"outputs.{name}"] = zeros(count, count), zeros(count, count)
                self.seen[f"tokens.{name}"] = zeros(())
        handles = [layer.register_forward_hook(partial(self._look, name)) for name, layer in pool.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(self, pool: Pool, targets: float) -> None:
        """Does nothing: the hooks have seen everything."""

    def _look(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        assert isinstance(layer, ComponentLinear)
        x_NI = self._real(inputs[0].detach())
        with torch.autocast(x_NI.device.type, enabled=False):
            h_NC = (x_NI.to(layer.a_CI.dtype) @ layer.a_CI.detach().T).double()
        self.seen[f"inputs.{name}"] += h_NC.T @ h_NC
        self.seen[f"tokens.{name}"] += len(h_NC)
        y.register_hook(partial(self._look_back, name, layer))

    def _look_back(self, name: str, layer: ComponentLinear, gradient: Tensor) -> None:
        b_OC = layer.scale * layer.b_OC.detach()
        z_NC = (self._real(gradient).to(b_OC.dtype) @ b_OC).double()
        self.seen[f"outputs.{name}"] += z_NC.T @ z_NC

    def _real(self, x: Tensor) -> Tensor:
        """The vectors of real tokens, [N, ...]."""
        if self._real_BT is not None and self._real_BT.shape == x.shape[:-1]:
            return x[self._real_BT]
        return x.reshape(-1, x.shape[-1])

    def mean(self, name: str) -> tuple[Tensor, Tensor]:
        """E[h hᵀ] and E[z zᵀ] of a layer. [C, C], fp64"""
        tokens = self.seen[f"tokens.{name}"].clamp_min(1)
        return self.seen[f"inputs.{name}"] / tokens, self.seen[f"outputs.{name}"] / tokens

    def turn(self, name: str, a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's components in the basis of what flows through it, most important first.

        A layer with components of several births is turned birth by birth, in their order.
        """
        done = self._energies.setdefault(name, [])
        first = sum(map(len, done))
        part = slice(first, first + len(a_CI))
        a, b, energies = turn(a_CI, b_OC, *(covariance[part, part] for covariance in self.mean(name)))
        done.append(energies)
        return a, b

    @property
    def energies_K(self) -> Tensor:
        """The squared singular value of every turned component, ‖Γ^½ b_i a_iᵀ C^½‖². [K]"""
        return torch.cat([energies for parts in self._energies.values() for energies in parts])


def turn(a_CI: Tensor, b_OC: Tensor, inputs_CC: Tensor, outputs_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same update as components that are best for what flows through the layer.

    Args:
        a_CI, b_OC: of the layer.
        inputs_CC: E[h hᵀ], h = A x.
        outputs_CC: E[z zᵀ], z = Bᵀ dL/dy.

    Returns:
        a_CI with rows of one length, b_OC, and the energies S², largest first. [C]
    """
    a, b = a_CI.double(), b_OC.double()
    root_g, inverse_g = _roots(inputs_CC)
    root_p, inverse_p = _roots(outputs_CC)
    u, s, vh = torch.linalg.svd(root_p @ root_g)
    rows, columns = vh @ inverse_g @ a, b @ inverse_p @ (u * s)
    length = (a.norm(dim=1).mean() or 1.0) / rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
    return (rows * length[:, None]).to(a_CI.dtype), (columns / length).to(b_OC.dtype), s.square()


def _roots(covariance_CC: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a covariance, and the inverse of that root. [C, C] each"""
    values, vectors = torch.linalg.eigh(covariance_CC)
    root = values.clamp_min(max(values[-1].item(), torch.finfo(values.dtype).tiny) * SMALLEST).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T
