"""The adapter that a run goes on from (`adapter.from`): read, checked against the run, and put at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dynlora_cli.adapters.adapter import PLAIN, Adapter, Factors
from dynlora_cli.adapters.find import find_origin, merge_first
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.data.load import Data
from dynlora_cli.data.vocabulary import sha256_of_text
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN
from dynlora_cli.lora.growth import exact, turn_from_old, write_old
from dynlora_cli.lora.pool import Pool
from dynlora_cli.lora.start import Start, with_counts
from dynlora_cli.lora.svd_basis import svd_factors
from dynlora_cli.models.fingerprint import changed_since
from dynlora_cli.models.linear import is_linear, linear_shape
from dynlora_cli.models.load import Base
from dynlora_cli.pruning.retire import altered_births
from dynlora_cli.runs.record import RECORD, Birth
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe

# What becomes of them, by `adapter.old`.
OLD = {
    "tune": "which train on",
    "freeze": "which stay as they are",
    "magnitudes": "whose directions stay as they are and whose magnitudes train",
}
ORTHONORMAL = ("orthogonal", "eva")  # starts whose rows are orthogonal to each other


@dataclass(frozen=True)
class Begun:
    """The components that a run begins with beside its new ones, or all of them where the run goes on.

    Attributes:
        born: components of each layer by birth, without the run's own.
        births: the runs that they began in, oldest first.
        counts: all components of each layer, of a run that goes on; None for a new run.
        adapter: that holds them, for a new run; None for one that goes on, whose checkpoint has the values.
        altered_births: of `births`, the first so many were altered after their runs, as `Record.altered_births`.
    """

    born: Mapping[str, tuple[int, ...]]
    births: tuple[Birth, ...]
    counts: Mapping[str, int] | None = None
    adapter: Adapter | None = None
    altered_births: int = 0

    @property
    def old(self) -> dict[str, int]:
        """Components of each layer that are there already."""
        return {name: sum(born) for name, born in self.born.items() if sum(born)}

    def at(self, start: Start) -> Start:
        """A start with these components, `start.counts` of each layer in all, or as many as are settled already.

        Raises:
            UsageError: of a layer that is trained the run's record says nothing.
        """
        if self.counts is not None:
            if missing := sorted(start.costs.keys() - self.counts.keys()):
                raise UsageError(f"{RECORD} is damaged: budget.start_components lacks {missing[0]!r}", COPY_AGAIN)
            start = with_counts(start, self.counts)
        if not self.births:
            return start
        none = (0,) * len(self.births)
        earlier = {name: tuple(self.born.get(name) or none) for name in start.counts}
        born = {name: (*earlier[name], count - sum(earlier[name])) for name, count in start.counts.items()}
        return replace(start, born=born, births=self.births, altered_births=self.altered_births)

    @classmethod
    def on_record(cls, record: Mapping[str, Any]) -> Begun:
        """Of a run that goes on."""
        budget, births = record["budget"], tuple(record.get("births") or ())
        by_birth = budget.get("start_born") or {}
        born = {name: tuple(counts[:-1]) for name, counts in by_birth.items()}
        altered = record.get("altered_births") or 0
        return cls(born, births[:-1], counts=budget["start_components"], altered_births=altered)

    @classmethod
    def from_adapter(cls, adapter: Adapter) -> Begun:
        """Of a new run that goes on from an adapter."""
        born = {name: adapter.born(name) for name in adapter.layers}
        return cls(born, adapter.births, adapter=adapter, altered_births=altered_births(adapter))


def read_origin(recipe: Recipe, base: Base, data: Data) -> Begun | None:
    """What `adapter.from` holds; None where a run begins with new components alone.

    Args:
        recipe: of a new run.
        base: of the run; gets the classifier's head of the adapter, where it has one.
        data: of the run; gets notes.

    Raises:
        UsageError: the adapter is none that a run on this base and these rows can go on from.
    """
    if recipe.adapter.origin is None:
        return None
    adapter = fitting_origin(recipe, base, data.notes)
    _take_over_whole(adapter, base, data)
    if any(data.writing.turned.values()):
        data.notes += template_notes(adapter.record, adapter.folder, base.tokenizer.chat_template)
    if recipe.adapter.old == "tune":
        adapter = adapter.with_layers({name: factors.turned(svd_factors) for name, factors in adapter.layers.items()})
    return Begun.from_adapter(adapter)


def fitting_origin(recipe: Recipe, base: Base, notes: list[str]) -> Adapter:
    """The adapter of `adapter.from`, which is there, checked against the base alone.

    Args:
        recipe: of a new run.
        base: of the run.
        notes: get what the run should tell.

    Raises:
        UsageError: as `read_origin`.
    """
    assert recipe.adapter.origin is not None
    adapter = read_adapter(find_origin(Path(recipe.adapter.origin), Path(recipe.output_dir)), str(base.folder))
    _refuse_other_forms(adapter)
    _refuse_other_base(adapter, recipe, base, notes)
    for name, factors in adapter.layers.items():
        _refuse_misfit(adapter, name, factors, base)
    _refuse_replaced(adapter, base)
    if adapter.note:
        notes.append(f"adapter.from: {adapter.note}")
    return adapter


def template_notes(record: Mapping[str, Any], folder: Path, template: object) -> list[str]:
    """That an adapter learned conversations in another form than a run's rows have, if so.

    Args:
        record: the adapter's.
        folder: its own.
        template: the chat template that the run writes its rows with.
    """
    then = record.get("chat_template_sha256")
    if not then or then == sha256_of_text(str(template)):
        return []
    kept = folder / "chat_template.jinja"
    advice = f"; set dataset.chat_template: {kept} to go on with its own" if kept.is_file() else ""
    return [f"adapter.from: {folder} learned from another chat template than this run's rows are written with{advice}"]


def put_origin(pool: Pool, begun: Begun) -> None:
    """Write the old components into a new pool."""
    assert begun.adapter is not None
    write_old(pool, {name: (factors.a_CI, factors.b_OC) for name, factors in begun.adapter.layers.items()})


def settle(pool: Pool, recipe: Recipe, data: Data) -> None:
    """Turn the new components away from the old ones, once both are written; notes say what could not be."""
    start = recipe.adapter.init_weights  # inflora's directions are chosen by rows, and turned they would be others
    full = [] if start == "inflora" else turn_from_old(pool, orthonormal=start in ORTHONORMAL)
    if full:
        data.notes.append(
            f"the old components of {counted(len(full), 'layer')} ({full[0]} ...) read all of their inputs, so the new "
            "ones there cannot be orthogonal to them"
        )
    scale = next(iter(pool.layers.values())).scale
    if recipe.adapter.old == "freeze" and not exact(scale):
        data.notes.append(
            f"adapter.old: freeze: the scale {scale:g} is no power of two, so dividing by it and "
            "multiplying again may change the last bit of old numbers; leave `adapter.alpha` out for a scale of 2"
        )


def tell(begun: Begun, start: Start, recipe: Recipe) -> list[str]:
    """Notes on what the run begins with.

    Raises:
        UsageError: the old components stay as they are, and there is no new one: nothing would be learned.
    """
    old, folder = begun.old, recipe.adapter.origin
    new = sum(start.counts.values()) - sum(old.values())
    if not new and recipe.adapter.old == "freeze":
        raise UsageError(
            f"adapter.old: freeze holds all {counted(sum(old.values()), 'component')} of {folder}, and no layer gets a "
            "new one, so there is none to train",
            f"set rank.init above {max(old.values())}, the components that its largest layer has; or write `old: tune`",
        )
    names = " -> ".join(birth["name"] for birth in begun.births)
    what = OLD[recipe.adapter.old]
    notes = [
        f"adapter.from: {folder} ({names}): {counted(sum(old.values()), 'component')} in {counted(len(old), 'layer')}, "
        f"{what}; {counted(new, 'new component')} beside them"
    ]
    more = [name for name, count in old.items() if count == start.counts[name]]
    if more:
        least, most = (pick(old[name] for name in more) for pick in (min, max))
        size = counted(most, "component") if least == most else f"{least} to {most} components"
        notes.append(
            f"{counted(len(more), 'layer')} of the adapter ({size}) get no new ones: they have "
            "rank.init already, or are not in adapter.target_modules"
        )
    return notes


def _refuse_other_forms(adapter: Adapter) -> None:
    """Refuse what is no sum of components of linear layers."""
    what = None
    if adapter.form != PLAIN:
        what = f"is a {adapter.kind}, whose components do not add up to its update"
    elif not adapter.layers:
        what = "has trained rows of tokens alone, and no components that could train on"
    elif adapter.experts:
        what = "has components for each expert, which a run cannot begin with"
    elif tables := [name for name, factors in adapter.layers.items() if factors.embedding]:
        what = f"adapts the embedding {tables[0]}, which trains no components"
    elif adapter.has_lora_bias:
        what = "adds biases to its layers (lora_bias), which do not train here"
    if what:
        raise UsageError(f"adapter.from: {adapter.folder} {what}", merge_first(adapter.folder))


def _refuse_other_base(adapter: Adapter, recipe: Recipe, base: Base, notes: list[str]) -> None:
    """Refuse an adapter of another base or task; of another tool's, only names and shapes can tell."""
    before = (adapter.record.get("base_model") or {}).get("fingerprint") or {}
    if before and (how := changed_since(before, base.folder, base.files.config)):
        raise UsageError(
            f"adapter.from: {adapter.folder} was trained on another base than {recipe.model.name_or_path}: {how}",
            f"train on its own base, {adapter.base_name}, or begin anew without adapter.from",
        )
    if adapter.task != recipe.model.task and (adapter.record or adapter.config.get("task_type")):
        raise UsageError(
            f"adapter.from: {adapter.folder} is for {adapter.task}, and this run is for {recipe.model.task}",
            "set model.task to that, or begin anew without adapter.from",
        )
    named, here = Path(adapter.base_name).name, Path(str(recipe.model.name_or_path)).name
    if not before and named and named not in (here, base.folder.name):
        notes.append(
            f"adapter.from: {adapter.folder} names {adapter.base_name} as its base; that it is the same as "
            f"{recipe.model.name_or_path} is taken from the shapes of its layers alone"
        )


def _refuse_misfit(adapter: Adapter, name: str, factors: Factors, base: Base) -> None:
    """Refuse a layer that the base does not have."""
    try:
        module: nn.Module | None = base.model.get_submodule(name)
    except AttributeError:
        module = None
    if module is None or not is_linear(module):
        what = "has no layer of that name" if module is None else f"has a {type(module).__name__} of that name"
        raise UsageError(
            f"adapter.from: {adapter.folder} adapts {name}, and {base.folder} {what}",
            "name the base that the adapter was trained on in model.name_or_path",
        )
    d_in, d_out = linear_shape(module)
    if (d_in, d_out) != (factors.a_CI.shape[1], factors.b_OC.shape[0]):
        raise UsageError(
            f"adapter.from: {adapter.folder}: {name} is {factors.b_OC.shape[0]} x {factors.a_CI.shape[1]}, and in "
            f"{base.folder} it is {d_out} x {d_in}",
            "name the base that the adapter was trained on in model.name_or_path",
        )


def _refuse_replaced(adapter: Adapter, base: Base) -> None:
    """Refuse what takes the place of parameters that do not train."""
    own = _trained_whole(base)
    others = [name for name in adapter.whole if name not in own]
    if others:
        raise UsageError(
            f"adapter.from: {adapter.folder} holds {others[0]}, which takes the place of the base's own and does not "
            "train here",
            merge_first(adapter.folder),
        )


def _trained_whole(base: Base) -> dict[str, nn.Parameter]:
    """Parameters of the base that train as they are, such as a classifier's head."""
    return {f"{module}.{name}": parameter for module in base.whole for name, parameter in _parameters(base, module)}


def _take_over_whole(adapter: Adapter, base: Base, data: Data) -> None:
    """Put the adapter's classifier head on the base, where it answers with the same classes."""
    own = _trained_whole(base)
    labels = (adapter.record.get("data") or {}).get("labels")
    if labels and labels != data.labels:
        raise UsageError(
            f"adapter.from: {adapter.folder} tells the classes {', '.join(labels)}, and the rows of this run "
            f"{', '.join(data.labels or ())}",
            "train on rows of the same classes, or begin anew without adapter.from",
        )
    for name, tensor in adapter.whole.items():
        if tensor.shape != own[name].shape:
            raise UsageError(
                f"adapter.from: {adapter.folder}: {name} is {list(tensor.shape)}, here it is {list(own[name].shape)}",
                "train on rows of the same classes, or begin anew without adapter.from",
            )
    with torch.no_grad():
        for name, tensor in adapter.whole.items():
            own[name].copy_(tensor)
    if missing := [name for name in own if name not in adapter.whole]:
        data.notes.append(f"adapter.from: {adapter.folder} holds no {missing[0]}, which begins as it is in the base")
    elif own and not labels:
        data.notes.append(f"adapter.from: {adapter.folder} does not name its classes; taken as {data.labels}")


def _parameters(base: Base, module: str) -> list[tuple[str, nn.Parameter]]:
    return list(base.model.get_submodule(module).named_parameters())
