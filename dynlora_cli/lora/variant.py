"""What a variant is: a file in lora/variants/ with these names.

has_components = True
    False: everything of the base model trains, or a router; rank and pruning do not apply, and the names below are not
    needed.

routes = True
    With has_components = False: a router over the adapters of `adapter.library` trains. The file has a class `Gates`
    under lora/routers/gates.py: what a token takes of each adapter in a layer. own_rows = True: each adapter's numbers
    learn from the rows of that adapter alone.

takes = ("alpha", "dropout", ...)
    Which of the settings alpha, dropout, penalty, freeze_a and lora_plus_ratio mean something here; the others are
    refused where they are given.

Layer
    A class under `ComponentLinear`. What it overrides says how components are used:
    widths      numbers that one component holds, by default d_in and d_out
    most        components that a layer may begin with
    start       initial values
    factors     A and B of the update s·BA, made of the leaves; enough for whatever is a LoRA in the end
    update      what a layer adds, where that is not s·BA times the inputs
    finished    what becomes of the base's output with that added
    turns       False where the update is no function of BA alone
    ranked, begin_step, penalty, settle_gradient, after_update
                what else happens in training

starts = ("orthogonal", ...)
    Optional: the values of `adapter.init_weights` that it takes besides `default`. All of them write whole factors
    into the leaves, so the leaves must be factors.

in_modules_only = True
    Optional: PEFT reads its kind of adapter as a target module only, and not as a target parameter
    (models/peft_types.py).

attach(model, targets, start, options, seed) -> Pool
    Puts layers on a frozen model; the model's output stays the same, or the file says that it does not. `put` does
    the work.

rounds = True
    Optional: its leaves are the factors that are saved, so that `adapter.save_dtype` may round them.

GOES_BY = "timestep"
    Optional: which components are used depends on the timestep of a denoiser, so that there is no single update.

saved_as = "dora"
    Optional: the kind of adapter (a file of adapters/kinds/) that its factors are saved as; without it, a plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import nn

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start

if TYPE_CHECKING:
    from dynlora_cli.config.adapter_section import Adapter

DEFAULT_SCALE = 2.0  # measured at ranks 1 and 4: scripts/bench/NOTES.md


class Variant(Protocol):
    """The shape of a variant's module."""

    has_components: bool
    takes: tuple[str, ...]
    Layer: type[ComponentLinear]

    def attach(
        self, model: nn.Module, targets: Mapping[str, nn.Module], start: Start, options: Adapter, seed: int
    ) -> Pool:
        """Put components on the target layers of a frozen model, in place.

        Args:
            model: the base.
            targets: its linear layers that get components, by name.
            start: how many components each of them gets.
            options: the section `adapter` of the recipe, with the variant's own keys.
            seed: of whatever is drawn at random.
        """


def scale_of(options: Adapter, rank: float) -> float:
    """s, from the recipe's `scaling` and `alpha`."""
    if options.alpha == "auto":
        return DEFAULT_SCALE
    return options.alpha / (math.sqrt(rank) if options.scaling == "rslora" else rank)


def penalty_weight(options: Adapter, default: float) -> float:
    """The weight of a variant's own penalty: `adapter.penalty`, or its default."""
    return default if options.penalty == "auto" else options.penalty


def put(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    start: Start,
    options: Adapter,
    seed: int,
    make: Callable[[nn.Module, float, float], ComponentLinear],
) -> Pool:
    """Replace every target by a layer that holds it, and give all layers their components.

    Args:
        model: frozen; changed in place.
        targets: linear layers by name.
        start: components of each.
        options: the section `adapter` of the recipe.
        seed: of the initial values.
        make: a layer from (base, s, dropout), such as a class under `ComponentLinear`.
    """
    scale = scale_of(options, start.average_rank)
    layers = {}
    for name, base in targets.items():
        parent, _, leaf = name.rpartition(".")
        layers[name] = make(base, scale, options.dropout)
        setattr(model.get_submodule(parent), leaf, layers[name])
    pool = Pool(layers, start.counts, seed=seed, device=next(model.parameters()).device)
    for name, born in start.born.items():
        pool.layers[name].born_at_start = born
    pool.holds_old = options.old != "tune"
    pool.orthogonality = options.orthogonality
    pool.cast_with(model)
    if options.freeze_a:
        pool.freeze_a()
    return pool
