"""What a run's adapter is compared with, where its objective compares: the model that the run began with.

In training that is the model before its first step (training/before/references.py). Afterwards it is put together
again: the base, with the adapter on it that the run went on from, if it did.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.find import find_adapter
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.data.batches import Batches
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.rows import MICRO_BATCH, Rows, own_recipe
from dynlora_cli.models.load import precision_of
from dynlora_cli.runs.record import is_after
from dynlora_cli.tasks import objective as objectives
from dynlora_cli.tasks.preference import PreferenceObjective

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.batches import Batch
    from dynlora_cli.data.examples import Example
    from dynlora_cli.models.load import Base


def origin_of(adapter: Adapter) -> Adapter | None:
    """The adapter that a run went on from; None where it began with the base alone.

    Raises:
        UsageError: it is not there any more, or another one is, or what it was has been trained on.
    """
    recipe = own_recipe(adapter)
    named = recipe.adapter.origin if recipe else None
    if named is None:
        return None
    births = adapter.births
    put_back = "put it back there: the objective compares with it"
    for place in (Path(named), adapter.folder.parent / Path(named).name):
        try:
            found = read_adapter(find_adapter(place, "adapter.from")[0])
        except UsageError:
            continue
        if len(births) > 1 and found.births[-1]["run"] != births[-2]["run"]:
            raise UsageError(f"{adapter.folder} went on from another adapter than the one that is in {place}", put_back)
        if is_after(found.record.get("finished"), births[-1]["date"]):
            raise UsageError(
                f"the adapter in {place} was trained on after {adapter.folder} had gone on from it",
                "put back what it was then: the objective compares with it",
            )
        return found
    raise UsageError(f"{adapter.folder} went on from the adapter in {named}, which is not there", put_back)


def _remember(objective: PreferenceObjective, origin: Adapter | None, base: Base, batches: Iterable[Batch]) -> None:
    with attached(base.model, origin) if origin else nullcontext():
        objective.remember(base.model, batches, precision_of(base))


def state_for(adapter: Adapter, recipe: Recipe, base: Base, examples: Sequence[Example]) -> dict[str, Tensor]:
    """What an objective has to know to train on from an adapter, and not from what it is by now; empty for most.

    Args:
        adapter: whose run may have gone on from another one, which is the reference.
        recipe: that is trained by.
        base: in memory, without an adapter.
        examples: all rows that will be looked at.

    Raises:
        UsageError: the run went on from an adapter that is not there any more.
    """
    objective = objectives.of(recipe.train)
    if not isinstance(objective, PreferenceObjective) or not objective.needs_reference:
        return {}
    longest, pad = max(len(line) for example in examples for line in example.lines), int(base.tokenizer.pad_token_id)
    rows = Batches.in_order(examples, micro_batch_size=MICRO_BATCH, max_length=longest, pad_id=pad)
    batches = (batch for index in range(rows.steps_per_epoch) for batch in rows.step(0, index))
    _remember(objective, origin_of(adapter), base, (batch.to(base.model.device) for batch in batches))
    return objective.state_dict()


def learn_reference(adapter: Adapter, rows: Sequence[Rows], base: Base) -> list[str]:
    """Have the model that a run began with look at rows that are judged by comparison with it.

    Args:
        adapter: of the run.
        rows: to be measured on; most are judged by nothing, and nothing happens.
        base: in memory, without an adapter.

    Returns:
        Notes for the person.

    Raises:
        UsageError: the run went on from an adapter that is not there any more.
    """
    notes = []
    for each in rows:
        objective = each.objective
        if not isinstance(objective, PreferenceObjective) or not objective.needs_reference:
            continue
        origin = origin_of(adapter)
        _remember(objective, origin, base, each.batches(int(base.tokenizer.pad_token_id), base.model.device))
        what = f"the adapter in {origin.folder}, from which {adapter.name} went on" if origin else "the base"
        notes.append(f"rewards are measured from {what}, whose own are 0")
    return notes
