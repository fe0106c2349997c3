"""Keep the components that matter for the rows that the data are sure of, or for those that they are not.

What it does
    As `fisher`, in two ways more exact: every row's gate gradient is squared for itself instead of the step's, and rows
    count by their confidence c, from 0 to 1: F_i = Σ c (dl/dg_i)² / Σ c. c is the row's column `confidence`, 1 where it
    has none; with `dataset.retrieve` it may come from the retriever. With `weigh: doubt` rows count by 1 - c.

When to use it
    `weigh: confidence` where some rows are less to be trusted: components that only these need go first. `weigh: doubt`
    in retrieval-augmented training, to spend the budget on the rows that the retrieved text does not answer. Without
    confidences it is the exact empirical Fisher information; the step takes longer than with `fisher`, by two thin
    products for every layer.

Reference
    This project's own; the formula is that of optimal brain surgery with rows weighted. scripts/bench/NOTES.md has what
    it is worth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynlora_cli.lora.pool import Pool
from dynlora_cli.pruning.row_fisher import RowFisher

OPTIONS = {
    "weigh": {
        "type": "choice",
        "choices": ["confidence", "doubt"],
        "default": "confidence",
        "help": "Rows count by their confidence c, or by 1 - c.",
    },
}
CONFLICTS = [
    {
        "with": "train.compile",
        "at": "pruning.policy",
        "why": "single rows are seen by hooks, which compiled blocks do not run",
        "hint": "use fisher, or leave compile out",
    },
    {
        "with": "train.cuda_graphs",
        "at": "pruning.policy",
        "why": "single rows are seen by hooks, which recorded passes do not run",
        "hint": "use fisher, or leave cuda_graphs out",
    },
    {
        "with": "adapter.dropout",
        "at": "pruning.policy",
        "why": "dropout changes what components are given, and the gradients of single rows do not see it",
        "hint": "use fisher, or leave dropout out",
    },
    {
        "with": "adapter.variant",
        "is": ["hira", "dora"],
        "at": "pruning.policy",
        "why": "the gradients of single rows follow from inputs and outputs in sums of components only",
        "hint": "use fisher",
    },
    {
        "with": "adapter.target_modules",
        "contains": "experts",
        "at": "pruning.policy",
        "why": "experts are given tokens without their rows",
        "hint": "use fisher",
    },
]


def observer(options: Any, training: bool) -> RowFisher:
    """Sums over rows."""
    return RowFisher.of(getattr(options, "weigh", "confidence"), training=training)


def scores(pool: Pool, rows: RowFisher, generator: torch.Generator) -> Tensor:  # noqa: ARG001
    """Root of the rows' mean squared gate gradient per number. [K]"""
    return (rows.mean(pool) / pool.costs_K()).sqrt()
