"""How a run starts: the components of each layer (`rank.allocation`) and their values (`adapter.init_weights`).

    init_weights   A                                          B                    the update at the start
    default        uniform                                    0                    0
    orthogonal     orthonormal rows of the default's size     0                    0
    eva            principal directions of the inputs         0                    0
    inflora        those that earlier rows did not have       0                    0: lora/complement.py
    pissa          principal triplets of W: √S Vᵀ / √s        U √S / √s            0: lora/pissa.py subtracts it
    loftq          the same of W - Q, Q the 4-bit base        the same             the best of this rank for W - Q

Sources: PiSSA, arXiv 2404.02948; EVA, arXiv 2410.07170; LoftQ, arXiv 2310.08659, with one iteration, since the base in
4 bits stays as it is. LoftQ's start is meant to change the function: it is nearer to the model before quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynlora_cli.errors import UsageError
from dynlora_cli.lora.directions import Directions, orthogonal_start, orthonormal_rows, principal_factors
from dynlora_cli.lora.pissa import RelativeLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.linear import dense_weight
from dynlora_cli.models.load import Base, load_structure
from dynlora_cli.models.weights import Weights

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Model


@torch.no_grad()
def write_start(pool: Pool, kind: str, base: Base, options: Model, inputs: Mapping[str, Directions], seed: int) -> None:
    """Write the first values of the components into a new pool; those that came from an adapter stay.

    Args:
        pool: on the base, with the default's values.
        kind: `adapter.init_weights` of the recipe.
        base: holds W, or Q and the files that W is in.
        options: the section `model` of the recipe, by which loftq reads those files.
        inputs: of each layer, for eva.
        seed: of what is drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    files = _files(options, base) if kind == "loftq" else None
    for name, layer in pool.layers.items():
        if kind == "orthogonal":
            new_CI = layer.a_CI[layer.old :, : layer.in_features]
            new_CI.copy_(orthogonal_start(len(new_CI), layer.in_features, generator))
        elif kind == "eva":
            new_CI = layer.a_CI[layer.old :, : layer.in_features]
            new_CI.copy_(orthonormal_rows(inputs[name].scaled_CI[: len(new_CI)], len(new_CI), generator))
        elif isinstance(layer, RelativeLinear):
            layer.begin_at(*principal_factors(dense_weight(layer.base), layer.count, layer.scale))
        elif files is not None:
            lost_OI = _stored(files, name, layer.base).to(pool.values.device) - dense_weight(layer.base)
            a_CI, b_OC = principal_factors(lost_OI, layer.count, layer.scale)
            layer.a_CI.copy_(a_CI)
            layer.b_OC.copy_(b_OC)


def _files(options: Model, base: Base) -> Layout:
    """Where the base's weights lie, unquantized."""
    return Layout(Weights(base.folder), load_structure(options, base.folder, None))


def _stored(files: Layout, name: str, layer: nn.Module) -> Tensor:
    """A layer's weight as it is in the model's files. [O, I], fp32

    Raises:
        UsageError: they hold no such weight, or one of another form.
    """
    found = files.find(f"{name}.weight")
    if found is None:
        raise UsageError(
            f"adapter.init_weights: loftq finds no weight of {name} in {files.weights.folder}", "choose another start"
        )
    weight = files.read(found, partial(files.weights.read, dtype=torch.float32))
    return weight.T if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D) else weight
