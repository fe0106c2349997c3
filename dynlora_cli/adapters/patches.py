"""What an adapter changes in stored tensors: W' of the rows that are a layer's, and everything else as it was.

A file of adapters/kinds/ says what W' is; Conv1D and embedding tables are folded in their own layout. A stored tensor
may hold rows of several layers, and a layer may lie in several tensors, see models/layout.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynlora_cli.adapters import kind
from dynlora_cli.adapters.adapter import Factors
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.models.layout import Part, within
from dynlora_cli.models.weights import New, Space, Weights

Rows = slice | Tensor


@dataclass(frozen=True)
class Patch:
    """A change of a part of a stored tensor.

    Attributes:
        part: where.
        factors: of the layer; None: only its weight is another one.
        conv1d: the parameter is [I, O].
        base: makes the whole parameter that is added to, fp32, in its own layout; None: it is what the file holds.
    """

    part: Part
    factors: Factors | None
    conv1d: bool = False
    base: Callable[[], Tensor] | None = None

    @property
    def transposed(self) -> bool:
        """Whether stored rows are inputs of the layer."""
        return self.conv1d != self.part.transposed

    @property
    def needs_all_rows(self) -> bool:
        """Whether W' of one row hangs on other rows, as DoRA's norms do where rows are inputs, or tokens."""
        if self.factors is None or not getattr(kind.of(self.factors), "across_inputs", False):
            return False
        return self.transposed != self.factors.embedding


def patched(weights: Weights, tensor: str, patches: Sequence[Patch], space: Space) -> New:
    """A stored tensor with its changes; where rows can be made alone, they are.

    Raises:
        UsageError: a DoRA whose norms are over rows that lie in several tensors.
    """
    entry = weights.entries[tensor]
    for patch in patches:
        if patch.needs_all_rows and patch.part.rows != slice(0, entry.shape[-2]):
            raise UsageError(f"{entry.file}: {tensor} holds a part of the inputs of a layer with DoRA's magnitudes")

    def make() -> Tensor:
        W = weights.read(tensor, torch.float32)
        matrices = W.view(-1, *W.shape[-2:]) if W.ndim > 1 else W.view(1, *W.shape)
        for patch in patches:
            matrix = matrices[patch.part.matrix]
            _apply(matrix, patch, 0, len(matrix))
        return W

    def rows(first: int, last: int) -> Tensor:
        W = weights.read(tensor, torch.float32, (first, last), space)
        for patch in patches:
            _apply(W, patch, first, last)
        return W

    alone = len(entry.shape) == 2 and not any(patch.base or patch.needs_all_rows for patch in patches)
    return New(entry.dtype, entry.shape, make, rows if alone else None)


def _apply(W: Tensor, patch: Patch, first: int, last: int) -> None:
    """Change rows of a stored matrix, from the first to the last, in place. [rows, columns]"""
    for at, own in within(patch.part, first, last):
        target = W[at]
        if patch.base is not None:
            whole = patch.base()
            parameter = whole.view(-1, *whole.shape[-2:])[patch.part.own_matrix] if whole.ndim > 1 else whole
            target.copy_((parameter.T if patch.part.transposed else parameter)[own])
        if patch.factors is not None:
            folded(target, rows_of(patch.factors, patch.transposed, own), patch.transposed)
        if not isinstance(at, slice):
            W[at] = target


def rows_of(factors: Factors, transposed: bool, rows: Rows) -> Factors:
    """What changes these rows of a weight, [O, I] or, transposed, [I, O]."""
    end = "_I" if transposed else "_O"
    own = {name: tensor[rows] if name.endswith(end) else tensor for name, tensor in factors.own.items()}
    if transposed:
        return replace(factors, a_CI=factors.a_CI[:, rows], own=own)
    return replace(factors, b_OC=factors.b_OC[rows], own=own)


def folded(W: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """W' in the place of W, fp32: [O, I], or [I, O] where transposed.

    Raises:
        MeasureError: it is not finite.
    """
    kind.of(factors).fold(W.T if transposed else W, factors)
    if not all(extreme.isfinite() for extreme in W.aminmax()):
        raise MeasureError("a merged weight is not finite", "look at the base's and the adapter's numbers")
    return W
