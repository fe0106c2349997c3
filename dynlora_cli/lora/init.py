"""How a run starts: the components of each layer (`rank.allocation`) and their values (`adapter.init_weights`).

    init_weights   A                                          B                    the update at the start
    default        uniform                                    0                    0
    orthogonal     orthonormal rows of the default's size     0                    0
    eva            principal directions of the inputs         0                    0
    pissa          principal triplets of W: √S Vᵀ / √s        U √S / √s            0: lora/pissa.py subtracts it
    loftq          the same of W - Q, Q the 4-bit base        the same             the best of this rank for W - Q

Sources: PiSSA, arXiv 2404.02948; EVA, arXiv 2410.07170; LoftQ, arXiv 2310.08659, with one iteration, since the base in
4 bits stays as it is. LoftQ's start is meant to change the function: it is nearer to the model before quantization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynlora_cli.data.load import Data
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.directions import Directions, orthogonal_start, orthonormal_rows, principal_factors
from dynlora_cli.lora.layer import dense_weight, linear_shape
from dynlora_cli.lora.pissa import RelativeLinear, layer_kind
from dynlora_cli.lora.pool import Pool
from dynlora_cli.models.layout import Layout
from dynlora_cli.models.load import Base, load_structure
from dynlora_cli.models.weights import Weights
from dynlora_cli.pruning.allocation import in_proportion, share_out
from dynlora_cli.pruning.calibration import MEASURES, watch_inputs, weigh
from dynlora_cli.pruning.control import Start
from dynlora_cli.training.setup import attach, make_batches, plan_ranks

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.lora.variant import Variant

SURVEYED = 16  # micro-batches that a survey looks at
EVA_SPREAD = 2  # a layer gets at most so many times its uniform share, EVA's rho


def begin(
    recipe: Recipe,
    variant: Variant,
    base: Base,
    data: Data,
    accelerator: Accelerator,
    counts: Mapping[str, int] | None = None,
) -> tuple[Pool | None, Start | None]:
    """Put components on the model, as many and with such values as the recipe says.

    Every process looks at the same batches, the first of the run; where rounding differs, the first process decides.

    Args:
        counts: of a run that is resumed: the components it began with. Their values come from its checkpoint.

    Raises:
        UsageError: loftq does not find a layer in the model's files.
    """
    if counts is not None or not variant.has_components:
        pool, planned = attach(variant, base, recipe, counts)
        return pool and pool.to(accelerator.device), planned

    def batches() -> Iterator[Batch]:
        rows = make_batches(recipe, data.train, base, shuffle=True)
        steps = (rows.step(0, index) for index in range(rows.steps_per_epoch))
        return (batch.to(accelerator.device) for batch in islice(chain.from_iterable(steps), SURVEYED))

    torch.manual_seed(recipe.seed)  # of the base's own dropout
    layers, start = plan_ranks(recipe, base)
    if recipe.rank.allocation != "uniform":
        counts = _shared_out(recipe, variant, base, layers, start, batches(), accelerator)
        fewest, most = min(counts.values()), max(counts.values())
        data.notes.append(f"rank.allocation: {recipe.rank.allocation} gives the layers {fewest} to {most} components")
    inputs = {}
    if recipe.adapter.init_weights == "eva":
        wanted = start.counts if counts is None else counts
        inputs = watch_inputs(base.model, batches(), layers, wanted, accelerator.autocast)
    pool, planned = attach(variant, base, recipe, counts)
    assert pool is not None
    pool.to(accelerator.device)
    write_start(pool, recipe, base, inputs)
    _from_the_first(pool.values.detach(), accelerator)
    return pool, planned


def _shared_out(
    recipe: Recipe,
    variant: Variant,
    base: Base,
    layers: Mapping[str, nn.Module],
    start: Start,
    batches: Iterator[Batch],
    accelerator: Accelerator,
) -> dict[str, int]:
    """Components of each layer, together as large as the uniform start within one component."""
    kind, how = layer_kind(recipe, variant.Layer), recipe.rank.allocation
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    most = {name: kind.most(*shape) for name, shape in shapes.items()}
    if how == "eva":
        most = {name: min(count, EVA_SPREAD * start.counts[name]) for name, count in most.items()}
        inputs = watch_inputs(base.model, batches, layers, most, accelerator.autocast)
        worth = {name: inputs[name].explained()[: most[name]] for name in layers}
    else:
        weights = weigh(base.model, batches, layers, MEASURES[how], accelerator.autocast)
        if how == "gora":  # whose budget is of smoothed sizes: r = budget · share of the importance / √(d_in + d_out)
            weights = {name: weight / math.sqrt(sum(shapes[name])) for name, weight in weights.items()}
        worth = in_proportion(weights, most)
    counts = share_out(worth, {name: sum(kind.widths(*shape)) for name, shape in shapes.items()}, start.parameters)
    numbers = torch.tensor(list(counts.values()), device=accelerator.device)
    _from_the_first(numbers, accelerator)
    return dict(zip(counts, numbers.tolist(), strict=True))


def _from_the_first(tensor: Tensor, accelerator: Accelerator) -> None:
    """Make a tensor in every process what it is in the first."""
    if accelerator.num_processes > 1:
        torch.distributed.broadcast(tensor, 0)


@torch.no_grad()
def write_start(pool: Pool, recipe: Recipe, base: Base, inputs: Mapping[str, Directions]) -> None:
    """Write the values of `adapter.init_weights` into a new pool.

    Args:
        pool: on the base, with the default's values.
        recipe: of the run.
        base: holds W, or Q and the files that W is in.
        inputs: of each layer, for eva.
    """
    kind, generator = recipe.adapter.init_weights, torch.Generator().manual_seed(recipe.seed)
    files = _files(recipe, base) if kind == "loftq" else None
    for name, layer in pool.layers.items():
        if kind == "orthogonal":
            layer.a_CI.copy_(orthogonal_start(layer.count, layer.in_features, generator))
        elif kind == "eva":
            layer.a_CI.copy_(orthonormal_rows(inputs[name].scaled_CI[: layer.count], layer.count, generator))
        elif isinstance(layer, RelativeLinear):
            layer.begin_at(*principal_factors(dense_weight(layer.base), layer.count, layer.scale))
        elif files is not None:
            lost_OI = _stored(files, name, layer.base).to(pool.values.device) - dense_weight(layer.base)
            a_CI, b_OC = principal_factors(lost_OI, layer.count, layer.scale)
            layer.a_CI.copy_(a_CI)
            layer.b_OC.copy_(b_OC)


def _files(recipe: Recipe, base: Base) -> Layout:
    """Where the base's weights lie, unquantized."""
    return Layout(Weights(base.folder), load_structure(recipe.model, base.folder, None))


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
