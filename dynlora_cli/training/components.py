"""Puts components on the model: how many in each layer (`rank.allocation`), with which first values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import PLAIN
from dynlora_cli.data.load import Data
from dynlora_cli.errors import UsageError
from dynlora_cli.hypernets.generated import Generated
from dynlora_cli.lora.directions import Directions
from dynlora_cli.lora.init import write_start
from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pissa import layer_kind
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.routers.trained import Routed
from dynlora_cli.lora.start import Start, plan_start, with_counts
from dynlora_cli.lora.whole import WholeModel
from dynlora_cli.models.experts import fused_experts, split
from dynlora_cli.models.linear import linear_shape
from dynlora_cli.models.load import Base
from dynlora_cli.models.peft_types import ends_in, taken_for_experts
from dynlora_cli.models.randomness import seeded
from dynlora_cli.models.targets import find_targets, group_names, layers_left_out, text_part
from dynlora_cli.pruning.allocation import in_proportion, share_out
from dynlora_cli.pruning.bytes_budget import in_parameters
from dynlora_cli.pruning.calibration import MEASURES, watch_inputs, weigh
from dynlora_cli.training.batches import training_batches
from dynlora_cli.training.hypernets import begin_hypernet
from dynlora_cli.training.origin import Begun, put_origin, read_origin, settle, tell
from dynlora_cli.training.routers import begin_router, read_members
from dynlora_cli.training.silent_start import write_silent

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.sections import Rank
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.lora.variant import Variant


CALIBRATION_BATCHES = 16  # micro-batches that are looked at before training
EVA_SPREAD = 2  # a layer gets at most so many times its uniform share, EVA's rho


def begin(
    recipe: Recipe,
    variant: Variant,
    base: Base,
    data: Data,
    accelerator: Accelerator,
    goes_on: Begun | None = None,
) -> tuple[Pool | WholeModel | Routed | Generated, Start | None]:
    """Put components on the model, as many and with such values as the recipe says.

    Every process looks at the same batches, the first of the run; where rounding differs, the first process decides.

    Args:
        recipe: of the run.
        variant: the one that it names.
        base: gets the components, or trains as a whole.
        data: of the run.
        accelerator: of the run.
        goes_on: of a run that is resumed: the components it began with. Their values come from its checkpoint.

    Raises:
        UsageError: loftq does not find a layer in the model's files, or the run cannot go on from `adapter.from`.
    """
    if plugins.declared("variants", recipe.adapter.variant, "routes"):
        return begin_router(recipe, base, data, accelerator.device, read_members(recipe, base)), None
    if plugins.declared("variants", recipe.adapter.variant, "hypernet"):
        data.notes += left_out(base, recipe.adapter)
        return begin_hypernet(recipe, base, data, accelerator.device), None
    if not variant.has_components:
        return WholeModel(base.model), None
    data.notes += left_out(base, recipe.adapter)
    begun = goes_on or read_origin(recipe, base, data)
    layers, start = plan_ranks(recipe.adapter, recipe.rank, base, begun)
    inputs: Mapping[str, Directions] = {}
    if begun is None:
        with seeded(recipe.seed, accelerator.device):  # the base's own dropout
            start, inputs = _measured(recipe, variant, base, data, accelerator, layers, start)
    pool = variant.attach(base.model, layers, start, recipe.adapter, recipe.seed).to(accelerator.device)
    if begun and not goes_on:
        data.notes += tell(begun, start, recipe)
        put_origin(pool, begun)
        with seeded(recipe.seed, accelerator.device):  # what goes into the layers is known with the old components only
            _, inputs = _measured(recipe, variant, base, data, accelerator, pool.layers, start)
    if not goes_on:
        write_start(pool, recipe.adapter.init_weights, base, recipe.model, inputs, recipe.seed)
        if begun and begun.adapter:
            if recipe.adapter.init_weights == "inflora":
                write_silent(pool, recipe, base, data, accelerator, begun.adapter.folder)
            settle(pool, recipe, data)
        _from_the_first(pool.values.detach(), accelerator)
    return pool, start


def left_out(base: Base, options: Adapter) -> list[str]:
    """Notes on what of the base gets no components, though a person may think that it does.

    Args:
        base: without components yet.
        options: the recipe's `adapter` section.
    """
    notes = []
    experts = fused_experts(base.model)
    if experts and not options.names_experts:
        notes.append(
            f"the weights of the experts ({max(experts.values())} in each of {len(experts)} blocks) are not adapted, "
            "nor are the routers: components are in the other linear layers only; "
            "for components in every expert write `adapter.target_modules: [all-linear, experts]`"
        )
    if text := text_part(base.model):
        notes.append(f"the language model in {text} is adapted, on text; what sees or hears beside it stays as it is")
    elif "text_config" in base.files.config and not base.model.config.is_encoder_decoder:
        alone = type(base.model).__name__
        notes.append(f"of the checkpoint, the language model alone is loaded and adapted, as {alone}")
    layers = layers_left_out(base.model)
    for why in dict.fromkeys(layers.values()):
        names = ", ".join(group_names(name for name, reason in layers.items() if reason == why))
        notes.append(f"{names}: not adapted: {why}")
    return notes


def _measured(
    recipe: Recipe,
    variant: Variant,
    base: Base,
    data: Data,
    accelerator: Accelerator,
    layers: Mapping[str, nn.Module],
    start: Start,
) -> tuple[Start, Mapping[str, Directions]]:
    """What is found on the first batches of the run, where the recipe asks for it.

    Returns:
        The components of each layer by `rank.allocation`, and what went into each layer, for `init_weights: eva`.
    """

    def batches() -> Iterator[Batch]:
        rows = training_batches(recipe, data, base)
        steps = (rows.step(0, index) for index in range(rows.steps_per_epoch))
        return (batch.to(accelerator.device) for batch in islice(chain.from_iterable(steps), CALIBRATION_BATCHES))

    if (how := recipe.rank.allocation) != "uniform":
        kind = layer_kind(recipe.adapter, variant.Layer)
        counts = _shared_out(how, kind, base.model, layers, start, batches(), accelerator)
        data.notes.append(
            f"rank.allocation: {how} gives the layers {min(counts.values())} to {max(counts.values())} components"
        )
        start = with_counts(start, counts)
    if recipe.adapter.init_weights != "eva":
        return start, {}
    return start, watch_inputs(base.model, batches(), layers, start.counts, accelerator.autocast)


def _shared_out(
    how: str,
    kind: type[ComponentLinear],
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    start: Start,
    batches: Iterator[Batch],
    accelerator: Accelerator,
) -> dict[str, int]:
    """Components of each layer, together as large as the uniform start within one component.

    Args:
        how: `rank.allocation`.
        kind: the layers that will hold the components.
        model: the base.
        layers: those of its layers that will be replaced.
        start: the uniform one.
        batches: to measure on.
        accelerator: of the run.
    """
    shapes = {name: linear_shape(layer) for name, layer in layers.items()}
    most = {name: kind.most(*shape) for name, shape in shapes.items()}
    if how == "eva":
        most = {name: min(count, EVA_SPREAD * start.counts[name]) for name, count in most.items()}
        inputs = watch_inputs(model, batches, layers, most, accelerator.autocast)
        worth = {name: inputs[name].explained()[: most[name]] for name in layers}
    else:
        weights = weigh(model, batches, layers, MEASURES[how], accelerator.autocast)
        if how == "gora":  # whose budget is of smoothed sizes: r = budget · share of the importance / √(d_in + d_out)
            weights = {name: weight / math.sqrt(sum(shapes[name])) for name, weight in weights.items()}
        worth = in_proportion(weights, most)
    counts = share_out(worth, start.costs, start.parameters)
    numbers = torch.tensor(list(counts.values()), device=accelerator.device)
    _from_the_first(numbers, accelerator)
    return dict(zip(counts, numbers.tolist(), strict=True))


def _from_the_first(tensor: Tensor, accelerator: Accelerator) -> None:
    """Make a tensor in every process what it is in the first."""
    if accelerator.num_processes > 1:
        torch.distributed.broadcast(tensor, 0)


def plan_ranks(
    options: Adapter, rank: Rank, base: Base, begun: Begun | None = None
) -> tuple[dict[str, nn.Module], Start]:
    """The layers that hold components, and how many each starts with: as many everywhere, or what is settled already.

    Args:
        options: the section `adapter` of the recipe.
        rank: its section `rank`.
        base: whose layers they are; experts in it are split where they are targets.
        begun: components that are there already; all of them, where the run is resumed.

    Raises:
        UsageError: PEFT has no such adapter for one of the layers, or the budget is smaller than one component.
    """
    variant = cast("Variant", plugins.load("variants", options.variant))
    if options.names_experts:
        if hasattr(variant, "saved_as"):
            raise UsageError(
                f"adapter.target_modules: variant {options.variant} is no LoRA when it is saved, which is all "
                "that PEFT takes for experts",
                "write `variant: lora`, or leave experts out of adapter.target_modules",
            )
        split(base.model)
    targets = find_targets(base.model, options.target_modules, whole=base.whole)
    taken = ends_in(targets, taken_for_experts(base.model.config.model_type))
    if taken and getattr(variant, "in_modules_only", False):
        raise UsageError(
            f"adapter.variant: PEFT has no {options.variant} for {min(taken)}, which it takes for one of the "
            f"experts in a model of type {base.model.config.model_type}",
            "write `adapter.target_modules: attention`, or `variant: lora`",
        )
    old = begun.old if begun else {}
    layers = {name: module for name, module in base.model.named_modules() if name in targets or name in old}
    shapes = {name: linear_shape(module) for name, module in layers.items()}
    kind = layer_kind(options, variant.Layer)
    plan = partial(plan_start, shapes, init=rank.init, kind=kind, old=old, grows=targets)
    form = getattr(variant, "saved_as", PLAIN)
    start = plan(in_parameters(rank.parsed_budget(), plan, base, shapes, form, options.save_dtype))
    start = replace(start, elastic=rank.elastic)
    return layers, begun.at(start) if begun else start


def attach(
    base: Base, options: Adapter, rank: Rank, seed: int, begun: Begun | None = None
) -> tuple[Pool | WholeModel, Start | None]:
    """`begin` without a look at data: as many components in every layer, with the values of the default start.

    Args:
        base: changed in place.
        options: the section `adapter` of the recipe.
        rank: its section `rank`.
        seed: of the values.
        begun: components that are there already; their values are not written.
    """
    variant = cast("Variant", plugins.load("variants", options.variant))
    if not variant.has_components:
        return WholeModel(base.model), None
    targets, start = plan_ranks(options, rank, base, begun)
    return variant.attach(base.model, targets, start, options, seed), start
