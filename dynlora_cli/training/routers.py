"""Puts the adapters of `adapter.library` and a router over them on the model, for a run that trains the router."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli import plugins
from dynlora_cli.adapters.members import KEY, find_members
from dynlora_cli.adapters.own_rows import own_rows
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.routed import gates_of, make_gates
from dynlora_cli.adapters.side_by_side import SideBySide
from dynlora_cli.config.adapter_section import LIBRARY_ROWS
from dynlora_cli.config.options import options
from dynlora_cli.errors import UsageError
from dynlora_cli.lora.routers.trained import Routed
from dynlora_cli.models.fingerprint import changed_since
from dynlora_cli.models.randomness import seeded
from dynlora_cli.runs import record as records

if TYPE_CHECKING:
    import torch

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.load import Data
    from dynlora_cli.models.base_files import BaseFiles
    from dynlora_cli.models.load import Base
    from dynlora_cli.tasks.task import Task

OR_OWN = f"; or write `dataset: {LIBRARY_ROWS}`, if we trained them here"


def members_of(recipe: Recipe) -> dict[str, Path]:
    """The folders of a recipe's adapters, by name.

    Raises:
        UsageError: as of `find_members`.
    """
    return find_members(recipe.adapter.library or (), Path(recipe.output_dir))


def reads_own_rows(recipe: Recipe) -> bool:
    """Whether the rows are those that the adapters were trained on."""
    return any(source.path == LIBRARY_ROWS for source in recipe.dataset.train)


def read_own_rows(recipe: Recipe, files: BaseFiles, task: Task) -> Data:
    """The rows that the adapters were trained on."""
    return own_rows(members_of(recipe), files.tokenizer, task, table=files.table_rows, context=files.context_length)


def read_members(recipe: Recipe, base: Base) -> dict[str, Adapter]:
    """The adapters of a recipe, by name.

    Raises:
        UsageError: one cannot be read, or is of another base.
    """
    return {name: _read(name, folder, base) for name, folder in members_of(recipe).items()}


def begin_router(
    recipe: Recipe, base: Base, data: Data, device: torch.device, members: Mapping[str, Adapter]
) -> Routed:
    """Put the adapters side by side on the model, and the router over them; only the router trains.

    Args:
        recipe: of the run.
        base: changed in place.
        data: of the run; gets a note on whose rows are whose.
        device: where the seed of the router's first values is set.
        members: the adapters.

    Raises:
        UsageError: an adapter does not fit the base, or is none that this router weighs.
    """
    method = recipe.adapter.variant
    base.model.requires_grad_(False)
    placed = SideBySide(base.model, members, kinds=gates_of(method).mixes_kinds)
    with seeded(recipe.seed, device):
        gates = make_gates(method, options_of(recipe), placed, list(members), base.model)
    placed.choice.gates = gates
    own = plugins.declared("variants", method, "own_rows")
    of_row = owners(data, list(members), "rows that teach the gates of", OR_OWN) if own else {}
    return Routed(gates, of_row, members, watching=gates.watching(base.model))


def library_on_record(members: Mapping[str, Adapter]) -> list[records.Member]:
    """The adapters that a run learns from, with hashes that tell whether they are the same when it goes on."""
    found = []
    for name, adapter in members.items():
        digest = hashlib.sha256()
        for layer, factors in adapter.layers.items():
            digest.update(layer.encode())
            for tensor in (factors.a_CI, factors.b_OC, *factors.own.values()):
                digest.update(tensor.contiguous().numpy().tobytes())
        found.append(records.Member(name=name, folder=str(adapter.folder.resolve()), sha256=digest.hexdigest()))
    return found


def refuse_other_members(before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Check that a run which goes on has the adapters that it began with.

    Raises:
        UsageError: it has not.
    """
    now = {member["name"]: member["sha256"] for member in record.get("library", ())}
    names = [member["name"] for member in before.get("library") or ()]
    if set(names) <= set(now) and names != list(
        now
    ):  # the router's numbers go by place, and a library may be reordered
        raise UsageError(
            f"{KEY}: the run began with the adapters {', '.join(names)} in this order; now they are {', '.join(now)}",
            "name them as they were, or start a new run with another --output-dir",
        )
    for member in before.get("library") or ():
        if now.get(member["name"]) != member["sha256"]:
            raise UsageError(
                f"{KEY}: {member['name']} is not the adapter that the run began with",
                "bring it back as it was, or start a new run with another --output-dir",
            )


def options_of(recipe: Recipe) -> dict[str, Any]:
    """The variant's own keys and their values."""
    return {key: getattr(recipe.adapter, key) for key in options("variants", recipe.adapter.variant)}


def owners(data: Data, names: list[str], what: str, otherwise: str = "") -> dict[int, int]:
    """The column of the adapter that each row belongs to, by the row's number: those of the n-th source to the n-th.

    Args:
        data: of the run; gets a note on which are whose.
        names: of the adapters.
        what: they are, before the words "an adapter".
        otherwise: what else can be done where there are not as many sources as adapters.

    Raises:
        UsageError: there are not as many sources as adapters.
    """
    if len(data.spans) != len(names):
        raise UsageError(
            f"dataset.train: each adapter has rows of its own, and there are {len(data.spans)} sources for "
            f"{len(names)} adapters ({', '.join(names)})",
            f"name one source for each, in their order{otherwise}",
        )
    found: dict[int, int] = {}
    start = 0
    for column, span in enumerate(data.spans):
        found |= {example.row: column for example in data.train[start : start + span.rows]}
        start += span.rows
    shown = ", ".join(f"{span.name} for {name}" for span, name in zip(data.spans, names, strict=True))
    data.notes.append(f"{what} an adapter: {shown}")
    return found


def _read(name: str, folder: Path, base: Base) -> Adapter:
    adapter = read_adapter(folder, str(base.folder))
    before = (adapter.record.get("base_model") or {}).get("fingerprint")
    if before and (what := changed_since(before, base.folder, base.files.config)):
        raise UsageError(
            f"{KEY}: {name} was trained on another model than {base.folder}: {what}",
            "name adapters of the same base in adapter.library, or their base in model.name_or_path",
        )
    return adapter
