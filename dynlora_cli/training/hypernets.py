"""Puts a hypernetwork before the model, for a run that trains it."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dynlora_cli import plugins
from dynlora_cli.adapters.members import KEY
from dynlora_cli.data.grounded import GroundedText
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.hypernets.conditions import Conditions, Descriptions
from dynlora_cli.hypernets.documents import CHUNK, Documents, reader_of
from dynlora_cli.hypernets.files import make_net, write_hypernet
from dynlora_cli.hypernets.generated import Generated
from dynlora_cli.hypernets.hypernet import Hypernet, places_of
from dynlora_cli.hypernets.layer import place_layers
from dynlora_cli.hypernets.reconstructing import Reconstructing
from dynlora_cli.hypernets.targets import Distance, targets_of
from dynlora_cli.lora.start import Start, plan_start
from dynlora_cli.lora.variant import scale_of
from dynlora_cli.models.fingerprint import fingerprint
from dynlora_cli.models.linear import is_transposed, linear_shape
from dynlora_cli.models.randomness import seeded
from dynlora_cli.models.targets import find_targets
from dynlora_cli.retrieval.encoders import BASE, encoder_folder, make_encoder
from dynlora_cli.tasks.loss import evaluating
from dynlora_cli.text import counted, show, size
from dynlora_cli.training.routers import options_of, owners, read_members

if TYPE_CHECKING:
    from pathlib import Path

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.load import Data
    from dynlora_cli.models.load import Base
    from dynlora_cli.training.run import Run

ENCODER = "text_encoder"  # the variant's key that names the encoder of descriptions


def begin_hypernet(recipe: Recipe, base: Base, data: Data, device: torch.device) -> Generated:
    """Put layers on the model that use what a hypernetwork writes; only the network trains.

    Args:
        recipe: of the run.
        base: changed in place.
        data: of the run; gets notes on the texts.
        device: that the model is on.

    Raises:
        UsageError: a row comes without what an adapter is written from, or there is no such encoder.
        MachineError: the encoder is not installed.
    """
    base.model.requires_grad_(False)
    start = plan_layers(recipe, base)
    conditions = _conditions(recipe, base, data, device, start)
    with seeded(recipe.seed, device):
        net = _net(recipe, base, start, conditions.width).to(device)
    written = place_layers(base.model, start.counts, recipe.adapter.dropout)
    generated = Generated(net, written, conditions, start.budget)
    if plugins.declared("objectives", recipe.train.objective, "LIBRARY"):
        generated = _reconstructing(recipe, base, data, generated)
    data.notes.append(_sizes(net, start))
    return generated


def _reconstructing(recipe: Recipe, base: Base, data: Data, generated: Generated) -> Reconstructing:
    """The same network, which writes the z-scores of the adapters from now on and learns from them.

    Args:
        recipe: of the run.
        base: of the adapters as well.
        data: of the run; gets notes on what belongs to which adapter.
        generated: with the network, of a kind that can stand on adapters.

    Raises:
        UsageError: an adapter cannot be written by it, or a description is of two adapters.
    """
    net: Any = generated.net  # the objective refuses kinds that cannot stand on adapters
    members = read_members(recipe, base)
    targets, notes = targets_of(members, net.places, KEY)
    of_row = owners(data, list(members), "descriptions of")
    data.notes += notes
    adapters: dict[Hashable, int] = {}
    for example in data.train:
        adapter = of_row[example.row]
        for text in example.wordings:
            if adapters.setdefault(text, adapter) != adapter:
                first, other = (list(members)[number] for number in (adapters[text], adapter))
                raise UsageError(
                    f"dataset.train: {show(text)} describes {first} and {other}, and a text can be one adapter's alone",
                    "write other descriptions for one of them",
                )
    net.stand_on(targets)
    parts = (net, generated.written, generated.conditions, generated.limit)
    distance = Distance(targets, net.spreads(), net.places)
    return Reconstructing(*parts, members=members, distance=distance, adapters=adapters)


def _sizes(net: Hypernet, start: Start) -> str:
    """How large the network is, and what it writes: a network should be smaller than the adapters of all its tasks."""
    beside = sum(tensor.numel() for tensor in net.state_dict().values()) - net.parameter_count
    kept = f", of which rank.budget keeps {start.budget:,}" if start.budget < start.parameters else ""
    frozen = f" and {beside:,} that do not" if beside else ""
    own = f"the network has {net.parameter_count:,} numbers that train{frozen}"
    return f"{own}; an adapter of it has {start.parameters:,}{kept}"


def plan_layers(recipe: Recipe, base: Base) -> Start:
    """The layers that components are written for, how many each gets, and what a written adapter may hold.

    Raises:
        UsageError: there are no such layers, or the budget is smaller than one component.
    """
    targets = find_targets(base.model, recipe.adapter.target_modules, whole=base.whole)
    shapes = {name: linear_shape(module) for name, module in targets.items()}
    budget = recipe.rank.parsed_budget()
    start = plan_start(shapes, budget, recipe.rank.init)
    exact = plugins.declared("variants", recipe.adapter.variant, "writes_budget")
    if exact and recipe.rank.init == "auto" and budget.kind in ("rank", "parameters"):
        start = plan_start(shapes, budget, max(1, math.ceil(start.average_rank)))
    return replace(start, budget=min(start.budget, start.parameters))


def plan_net(recipe: Recipe, base: Base) -> Hypernet:
    """The network of a run, of shapes without numbers; `base` may be no more than its structure."""
    width = int(base.model.config.get_text_config().hidden_size)
    name = getattr(recipe.adapter, ENCODER, BASE)
    if name != BASE:
        with naming_the_key():
            width = int(read_object(encoder_folder(name) / "config.json")["hidden_size"])
    with torch.device("meta"):
        return _net(recipe, base, plan_layers(recipe, base), width)


def _net(recipe: Recipe, base: Base, start: Start, width: int) -> Hypernet:
    layers = [(name, *linear_shape(base.model.get_submodule(name)), count) for name, count in start.counts.items()]
    return make_net(
        recipe.adapter.variant, options_of(recipe), layers, width, scale_of(recipe.adapter, start.average_rank)
    )


@contextmanager
def naming_the_key() -> Iterator[None]:
    """Errors of this block name the recipe's key of an encoder, and not the option of other commands."""
    try:
        yield
    except DynloraError as error:
        raise type(error)(error.message.replace("--encoder", f"adapter.{ENCODER}"), error.hint) from None


def write_hypernet_of(folder: Path, run: Run, generated: Generated) -> None:
    """Write the network of a run into a folder that exists."""
    base, recipe, conditions = run.base, run.recipe, generated.conditions
    model = recipe.model
    about = {
        "name_or_path": model.name_or_path,
        "reference": base.files.reference,
        "revision": model.revision,
        "model_type": base.model.config.model_type,
        "fingerprint": fingerprint(base.folder, base.files.config),
    }
    encoder = conditions.encoder if isinstance(conditions, Descriptions) else None
    form = {
        "method": recipe.adapter.variant,
        "options": options_of(recipe),
        "budget": generated.limit,
        "transposed": any(is_transposed(layer.base) for layer in generated.written.values()),
        "base": about,
        "encoder": encoder and {"name": encoder.name, "fingerprint": encoder.fingerprint},
    }
    write_hypernet(folder, form, generated.net, conditions.tensors())


def _conditions(recipe: Recipe, base: Base, data: Data, device: torch.device, start: Start) -> Conditions:
    """What the rows of a run come with, as conditions."""
    if plugins.declared("hypernets", recipe.adapter.variant, "READS") == "document":
        return _documents(recipe, base, data, start)
    return _descriptions(recipe, base, data, device)


def _documents(recipe: Recipe, base: Base, data: Data, start: Start) -> Documents:
    layers = [(name, *linear_shape(base.model.get_submodule(name)), count) for name, count in start.counts.items()]
    most, context = getattr(recipe.adapter, CHUNK), base.files.context_length
    reader = reader_of(base.model, base.tokenizer, places_of(layers), most, context)
    found = Documents(reader, base.tokenizer)
    lengths = {
        found.key(row): len(row.context_ids) for row in [*data.train, *data.val] if isinstance(row, GroundedText)
    }
    room, longest = sum(map(reader.room, lengths.values())), max(lengths.values())
    kept = "what its blocks make of it is kept" if room <= reader.limit else f"{size(reader.limit)} of it are kept"
    data.notes.append(
        f"adapters are written from {counted(len(lengths), 'context')} of up to {counted(longest, 'token')}; "
        f"the base reads each, which gives {size(room)}, and {kept}"
    )
    return found


def _descriptions(recipe: Recipe, base: Base, data: Data, device: torch.device) -> Descriptions:
    for part, rows in (("train", data.train), ("val", data.val)):
        if without := next((row for row in rows if not row.description), None):
            raise UsageError(
                f"dataset.{part}: row {without.row} comes without a description, from which variant "
                f"{recipe.adapter.variant} writes its adapter",
                "give each source `descriptions`, or write `tasks:` in place of `dataset:`",
            )
    known = {text for row in data.train for text in row.wordings}
    measured = {row.description for row in data.val}
    name = getattr(recipe.adapter, ENCODER, BASE)
    identity = fingerprint(base.folder, base.files.config)["sampled_sha256"]
    with naming_the_key(), evaluating(base.model):
        encoder = make_encoder(name, base.model, base.tokenizer, identity)
        found = Descriptions.to_train(encoder, known, sorted(measured), device)
    new = f"; {counted(len(measured - known), 'held-out one')} not among them" if measured - known else ""
    data.notes.append(f"adapters are written from {counted(len(known), 'description')}{new}; vectors by {name}")
    if len(known) == 1:
        data.notes.append("all rows have one description, so nothing can be learned of how descriptions differ")
    return found
