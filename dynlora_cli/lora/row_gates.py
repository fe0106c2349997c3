"""Gate gradients of single rows, from the backward pass of their whole batch.

A component gate g_i scales a component: W' = W + s Σ g_i b_i a_iᵀ, with g = 1. `Pool.gate_gradient_K` reads dL/dg_i
from gradients that are sums over the batch. Here each token t of a row adds its share to that row's own gradient:

    dL_row/dg_i = s Σ_t (a_i · x_t) (b_i · dL/dy_t)          x_t, y_t: the layer's input and output at token t

These are products of C numbers for each token, beside those of I and O that the layer computes anyway. They are exact,
since the loss of a batch is a sum over its rows and no row sees another.

Dimensions: R rows, L lines of the batch (as many, unless packed), T tokens of a line, C components of a layer, K of the
pool, I inputs, O outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch

Span = tuple[int, int, int]  # of a row that shares a line with others: the line, its first token, the token after it


class RowGates:
    """What `row_gates` gives.

    Attributes:
        gradient_RK: dL_row/dg of every row and component so far, in the units of the loss that is passed back. [R, K]
    """

    def __init__(self, pool: Pool, rows: int, width: int | None, spans: Sequence[Span] | None) -> None:
        self.pool, self.rows, self.width, self.spans = pool, rows, width, spans
        self.lines = rows if spans is None else 1 + max(line for line, _, _ in spans)
        self._row_LT: Tensor | None = None
        zeros = partial(pool.values.new_zeros, requires_grad=False)
        self._found = {name: zeros(rows, count) for name, count in pool.counts.items()}

    @property
    def gradient_RK(self) -> Tensor:
        return torch.cat(list(self._found.values()), 1)

    @torch.no_grad()
    def look(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        """Forward hook of a layer. Checkpointing calls it again, for an output that no gradient comes back to."""
        assert isinstance(layer, ComponentLinear)
        if not layer.count or not y.requires_grad:
            return
        a_CI, b_OC = (factor.detach() for factor in layer.factors())
        with torch.autocast(y.device.type, enabled=False):
            h = self._lines(name, inputs[0]).to(a_CI.dtype) @ a_CI.T
        y.register_hook(partial(self._look_back, name, layer, h, b_OC))

    def _look_back(self, name: str, layer: ComponentLinear, h_LTC: Tensor, b_OC: Tensor, gradient: Tensor) -> None:
        z_LTC = self._lines(name, gradient).to(b_OC.dtype) @ b_OC
        shares_LTC = layer.scale * (h_LTC * z_LTC)
        shares_RC = shares_LTC.sum(1) if self.spans is None else self._by_span(shares_LTC)
        shares_RC = shares_RC.unflatten(1, (layer.terms, layer.count)).sum(1)
        self._found[name] += shares_RC if layer.gate is None else shares_RC * layer.gate

    def _by_span(self, shares_LTC: Tensor) -> Tensor:
        """Sums over the tokens of each row, where rows share lines. [R, C]"""
        assert self.spans is not None
        if self._row_LT is None:
            rows = torch.full(shares_LTC.shape[:2], self.rows)  # padding
            for row, (line, start, end) in enumerate(self.spans):
                rows[line, start:end] = row
            self._row_LT = rows.to(shares_LTC.device)
        sums = shares_LTC.new_zeros(self.rows + 1, shares_LTC.shape[2])
        return sums.index_add_(0, self._row_LT.flatten(), shares_LTC.flatten(0, 1))[:-1]

    def _lines(self, name: str, x: Tensor) -> Tensor:
        """A layer's input or the gradient of its output, line by line. [L, T, ...]

        Raises:
            UsageError: nothing says which row each of its vectors belongs to.
        """
        if x.ndim == 3 and len(x) == self.lines:
            return x
        alone = x.ndim == 2 and self.spans is None and len(x) == self.lines  # a classifier's pooled rows
        flat = x.ndim == 2 and self.width is not None and len(x) == self.lines * self.width
        if alone or flat:
            return x.unflatten(0, (self.lines, -1))
        raise UsageError(
            f"{name} is given {list(x.shape)} numbers, which do not tell which row is which",
            "leave the layer out of adapter.target_modules, or use policy fisher",
        )


@contextmanager
def row_gates(
    pool: Pool, rows: int, *, width: int | None = None, spans: Sequence[Span] | None = None
) -> Iterator[RowGates]:
    """Collect the gate gradients of single rows from the forward and backward passes inside the `with` block.

    Fused layers, layers that share their input and checkpointing may be on. Compiled blocks and CUDA graphs may not:
    they run no hooks. Dropout on the components' input is not seen.

    Args:
        pool: on a model.
        rows: of the batch.
        width: tokens of a line, for models whose layers are given all lines in one list.
        spans: where rows share lines: the place of each; None: each row has a line of its own.

    Raises:
        UsageError: the gradient of a layer's rows does not follow from its inputs and outputs.
    """
    for name, layer in pool.layers.items():
        _refuse(name, layer)
    gates = RowGates(pool, rows, width, spans)
    handles = [layer.register_forward_hook(partial(gates.look, name)) for name, layer in pool.layers.items()]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def batch_gates(pool: Pool, batch: Batch) -> Iterator[RowGates]:
    """`row_gates` for the rows of a batch, in the order of `batch.rows`."""
    packed = batch.spans if len(batch.rows) != len(batch.labels) else None
    with row_gates(pool, len(batch.rows), width=batch.inputs["input_ids"].shape[1], spans=packed) as gates:
        yield gates


def _refuse(name: str, layer: ComponentLinear) -> None:
    kind = type(layer)
    parts = ("update", "finished", "forward")
    if any(getattr(kind, part) is not getattr(ComponentLinear, part) for part in parts):
        raise UsageError(
            f"{name} is no plain sum of components, so its rows cannot be told apart", "use policy fisher or magnitude"
        )
    if re.search(r"(^|\.)experts\.", name):
        raise UsageError(
            f"{name} is an expert, which is given tokens without their rows", "use policy fisher or magnitude"
        )
