"""What does not go with a variant: settings that it has no use for, and what routers and hypernetworks cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dynlora_cli import plugins
from dynlora_cli.config.sections import Settings


class Conflict(NamedTuple):
    """A setting that does not go with another: the key to change, the other key, and why."""

    key: str
    other: str
    text: str


def variant_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """Settings that do not go with the variant of a recipe."""
    yield from _own_settings(recipe)
    yield from _router_conflicts(recipe)
    yield from _hypernet_conflicts(recipe)


def _own_settings(recipe: Settings) -> Iterator[Conflict]:
    """Settings that the variant has no use for: it names those that it takes, see lora/variant.py."""
    adapter, variant = recipe.adapter, recipe.adapter.variant
    takes = plugins.declared("variants", variant, "takes") or ()
    given = {
        "adapter.alpha": adapter.alpha != "auto",
        "adapter.dropout": adapter.dropout > 0,
        "adapter.penalty": adapter.penalty != "auto",
        "adapter.freeze_a": adapter.freeze_a,
        "train.lora_plus_ratio": recipe.train.lora_plus_ratio is not None,
    }
    for key, is_given in given.items():
        if is_given and key.split(".")[1] not in takes:
            yield Conflict(key, "adapter.variant", f"variant {variant} has no use for it")
    if variant != "lora" and adapter.origin is None and not plugins.declared("variants", variant, "routes"):
        text = f"variant {variant} begins without old components; leave it out, or write `variant: lora`"
        yield from _unused(recipe, "adapter", ("old", "orthogonality"), text)
    if adapter.scaling == "rslora" and adapter.alpha == "auto":
        yield Conflict("adapter.scaling", "adapter.alpha", "rslora divides alpha by sqrt(r): write `alpha: 16`, say")


def _router_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What does not go with a variant that learns to choose among adapters, and with one that does not."""
    adapter, variant = recipe.adapter, recipe.adapter.variant
    if not plugins.declared("variants", variant, "routes"):
        objective = getattr(recipe.train, "objective", plugins.OBJECTIVE)
        if adapter.library is not None and not plugins.declared("objectives", objective, "LIBRARY"):
            text = f"variant {variant} does not choose among adapters; leave it out, or choose a variant that does"
            yield Conflict("adapter.library", "adapter.variant", text)
        return
    if adapter.library is None:
        text = f"variant {variant} learns to choose among adapters; name their folders, or that of a library"
        yield Conflict("adapter.library", "adapter.variant", text)
    if recipe.train.compile:
        yield Conflict("train.compile", "adapter.variant", f"variant {variant} is not compiled; set it to false")
    if plugins.declared("tasks", recipe.model.task, "SILENT"):
        text = f"variant {variant} weighs adapters of models that write text"
        yield Conflict("model.task", "adapter.variant", text)
    text = f"the adapters of a library stay as they are, so variant {variant} has no use for it"
    yield from _unused(recipe, "adapter", ("from", "old", "target_modules", "scaling", "orthogonality"), text)
    yield from _unused(recipe, "adapter", ("init_weights",), text)
    yield from _unused(recipe, "rank", tuple(type(recipe.rank).model_fields), text)
    yield from _unused(recipe, "pruning", tuple(type(recipe.pruning).model_fields), text)


def _hypernet_conflicts(recipe: Settings) -> Iterator[Conflict]:
    """What does not go with a variant that learns to write adapters."""
    adapter, variant, data = recipe.adapter, recipe.adapter.variant, recipe.dataset
    if not plugins.declared("variants", variant, "hypernet"):
        return
    by_row = f"variant {variant} writes an adapter for each row"
    objective = getattr(recipe.train, "objective", plugins.OBJECTIVE)
    forms = set(plugins.declared("objectives", objective, "FORMS", ()))
    reads = variant in plugins.names("hypernets") and plugins.declared("hypernets", variant, "READS")
    compares = {"Preference", "Judged"} & forms and reads != "document"
    refused = {
        "model.task": recipe.model.task != "causal-lm" and "it is for models that write text: causal-lm",
        "dataset.packing": data.packing and f"{by_row}, which share none; set it to false",
        "dataset.replay": data.replay is not None and "rows of earlier runs come without descriptions; leave it out",
        "eval.also": recipe.eval.also and f"{by_row}, and these come without descriptions; leave it out",
        "train.compile": recipe.train.compile and f"variant {variant} is not compiled; set it to false",
        "train.objective": compares and f"{objective} compares with a model that starts alike; write `objective: sft`",
        "adapter.target_modules": adapter.names_experts and "experts get tokens of all rows, and adapters are by row",
        "rank.budget": recipe.rank.parsed_budget().kind == "auto" and "a written adapter is cut to a number; write one",
    }
    for key, text in refused.items():
        if text:
            yield Conflict(key, "adapter.variant", text)
    if reads == "document" and "Grounded" not in forms:
        text = f"variant {variant} reads the contexts of rows, which {objective} leaves out"
        yield Conflict("train.objective", "adapter.variant", f"{text}; write `objective: context-distillation`")
    text = f"variant {variant} prunes nothing while it trains: an adapter is cut to rank.budget when it is written"
    yield from _unused(recipe, "pruning", tuple(type(recipe.pruning).model_fields), text)
    if reads == "description":
        for part in ("train", "val"):
            for at, source in enumerate(getattr(data, part)):
                if not source.descriptions:
                    text = f"variant {variant} writes adapters from texts; give this source `descriptions: [TEXT]`"
                    yield Conflict(f"dataset.{part}.{at}", "adapter.variant", text)


def _unused(recipe: Settings, section: str, keys: tuple[str, ...], text: str) -> Iterator[Conflict]:
    """Settings of a section that are given, and are of no use."""
    values = getattr(recipe, section)
    for key in keys:
        if getattr(values, key) != type(values).model_fields[key].get_default(call_default_factory=True):
            yield Conflict(f"{section}.{key}", "adapter.variant", text)
