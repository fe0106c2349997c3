"""What adapters forgot, for `dynlora eval`: their own sets of `eval.also` once more, and sets that a person names.

An adapter's own sets are compared with what its run found before training, if they are still the same rows. Sets that a
person names are compared with the base model, which is measured now.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.base import read_tokenizer
from dynlora_cli.data.batches import Batches
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.errors import MeasureError, UsageError
from dynlora_cli.evaluation import also
from dynlora_cli.evaluation.also import Measured, Reading, RowSet
from dynlora_cli.evaluation.comparable import base_has_rows
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.evaluation.rows import MICRO_BATCH, held_out_rows, own_recipe, own_table
from dynlora_cli.files.foreign import AlsoForm, SummaryForm, fits
from dynlora_cli.models.load import precision_of
from dynlora_cli.runs.folder import RECORD
from dynlora_cli.tasks import task as tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.evaluation.options import Options
    from dynlora_cli.evaluation.thresholds import Thresholds
    from dynlora_cli.models.load import Base
    from dynlora_cli.models.place import Place

TRAINING, BASE = "before training", "base"


@dataclass
class Sets:
    """Rows of other kinds to measure one adapter on.

    Attributes:
        own: its run's, if they are what they were.
        named: those of `--also`.
        before: what was found on a set, by its name: in training, or of the base model.
        missing: its run's that cannot be measured any more, by name, and why.
    """

    own: list[RowSet] = field(default_factory=list)
    named: list[RowSet] = field(default_factory=list)
    before: dict[str, Measured] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all sets."""
        return [rows.name for rows in (*self.own, *self.named)]

    def compared(self, base: Base) -> dict[str, Any]:
        """`also` and `forgetting` of the adapter that is on the base at the moment; `to` says what it is compared with.

        Raises:
            MeasureError: a loss is not finite.
        """
        after = {rows.name: measured(base, rows) for rows in (*self.own, *self.named)}
        found = also.forgotten(self.before, after)
        for rows in self.own:
            found["also"][rows.name]["to"] = TRAINING
        for rows in self.named:
            found["also"][rows.name]["to"] = BASE
        return found


def measured(base: Base, rows: RowSet) -> Measured:
    """The loss of the model in memory on a set.

    Raises:
        MeasureError: it is not finite.
    """
    longest = max(len(line) for example in rows.examples for line in example.lines)
    pad, device = int(base.tokenizer.pad_token_id), base.model.device
    batches = Batches.in_order(rows.examples, micro_batch_size=MICRO_BATCH, max_length=longest, pad_id=pad)
    each = (batch.to(device) for index in range(batches.steps_per_epoch) for batch in batches.step(0, index))
    loss = held_out(base.model, each, autocast=precision_of(base))["loss"]
    if not math.isfinite(loss):
        raise MeasureError(f"the loss on {rows.name} is {loss}", "look at the adapter's weights and at these rows")
    return rows.measured(loss)


def find_sets(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    notes: list[str],
) -> dict[str, Sets]:
    """The sets of every adapter, by its name: those of its run, and those of `--also`, which are read as `--data` is.

    Args:
        adapters, names: in the order of the table.
        place, tokenizer: the base, and what makes tokens of the rows of `--also`.
        options: names the files, and what must be measured.
        notes: for the person.

    Raises:
        UsageError, DataError, MachineError: rows cannot be read, or a threshold is of a set that there is not.
    """
    named = []
    for name, file in options.also.items():
        most = options.max_samples
        rows = held_out_rows(adapters[0], place, tokenizer, file, max_samples=most, passages=False, plain=True)
        notes += [f"{name}: {note}" for note in rows.notes]
        if base_has_rows(adapters, names, place, rows.examples, int(tokenizer.pad_token_id), notes):
            named.append(RowSet.of(name, rows.examples))
    sets = {name: _sets_of(each, name, place, named, notes) for name, each in zip(names, adapters, strict=True)}
    _refuse_unmeasured(options.thresholds, sets)
    return sets


def _refuse_unmeasured(thresholds: Thresholds, sets: Mapping[str, Sets]) -> None:
    missing = {name: each.missing for name, each in sets.items()}
    thresholds.refuse_unforgotten({name: each.names for name, each in sets.items()}, missing)


def _sets_of(adapter: Adapter, name: str, place: Place, named: Sequence[RowSet], notes: list[str]) -> Sets:
    """All that one adapter is measured on.

    Args:
        adapter: whose record is asked.
        name: of the adapter.
        place: its base.
        named: sets of `--also`.
        notes: told which of its own sets are no longer what they were.

    Raises:
        UsageError: a set of `--also` has the name of one of its own, or its record is damaged.
    """
    recorded = _recorded(adapter)
    for rows in named:
        if rows.name in recorded:
            text = f"--also {rows.name}: {name} has a set of that name from its training"
            raise UsageError(text, "give yours another name")
    found, missing = _read_again(adapter, place, recorded)
    own = [rows for rows in found if rows.sha256 == recorded[rows.name]["sha256"]]
    missing |= {rows.name: "its rows are others than in training" for rows in found if rows not in own}
    notes += [f"{name}: forgetting on {one} is not measured: {why}" for one, why in missing.items()]
    return Sets(own, list(named), {rows.name: recorded[rows.name] for rows in own}, missing)


def compare_with_base(sets: Mapping[str, Sets], base: Base, thresholds: Thresholds, *, answers: bool) -> None:
    """Measure the base model on the sets of `--also`; they are left out where it has no answer.

    Raises:
        UsageError: a threshold is of a set that is left out.
        MeasureError: a loss is not finite.
    """
    named = {rows.name: rows for each in sets.values() for rows in each.named} if answers else {}
    before = {name: measured(base, rows) for name, rows in named.items()}
    for each in sets.values():
        each.before |= before
        each.named = [rows for rows in each.named if rows.name in before]
    _refuse_unmeasured(thresholds, sets)


def other_precision(adapter: Adapter, name: str, sets: Sets, base: Base) -> list[str]:
    """A note where the losses in training were computed in another type of numbers than now."""
    then, now = adapter.record.get("dtype"), str(base.dtype).removeprefix("torch.")
    if not sets.own or then in (None, now):
        return []
    return [f"{name}: forgetting is since a training in {then}, and measured in {now}: a part of it is rounding"]


def _recorded(adapter: Adapter) -> dict[str, Measured]:
    """What its run found before training, by name of the set."""
    record = adapter.record
    summary = record.get("trained") if record.get("prune") else record.get("summary")
    if not isinstance(summary, dict):
        return {}
    found = fits(SummaryForm, {"also": summary.get("also")}, adapter.folder / RECORD).also or {}
    return {name: _before(one) for name, one in found.items()}


def _before(one: AlsoForm) -> Measured:
    return Measured(rows=one.rows, targets=one.targets, sha256=one.sha256, loss=one.before)


def _read_again(adapter: Adapter, place: Place, names: Collection[str]) -> tuple[list[RowSet], dict[str, str]]:
    """Sets of an adapter's run, as they are now, and by name why one cannot be read."""
    recipe = own_recipe(adapter) if names else None
    if recipe is None:
        return [], dict.fromkeys(names, f"{adapter.folder} does not say where its rows are from")
    reading = Reading(
        tokenizer=read_tokenizer(adapter, place),
        task=tasks.of(place.options),
        writing=Writing.of(adapter.record),
        labels=place.labels,
        table=own_table(adapter, place) or place.files.table_rows,
        context=place.files.context_length,
    )
    return also.read_again(names, recipe, reading)
