"""Rows of other kinds than a run trains on: what it may forget.

    row_sets    the sets of a recipe, `eval.also`, read as the run's own rows are; by default what earlier runs held out
    read_again  the same later on, where they can still be read
    forgotten   what became worse on them: the loss after, less the loss before

Both losses are of the same rows, in nats per target; a negative difference means that the model got better there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from dynlora_cli.adapters.find import find_adapter
from dynlora_cli.data.earlier import earlier_data, lineage, run_folder
from dynlora_cli.data.examples import Classified, Example
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.preferences.examples import TwoLines
from dynlora_cli.data.rows.choice import shared
from dynlora_cli.data.rows.kept import Prompts, PromptsOf
from dynlora_cli.data.sources import BUILT_IN
from dynlora_cli.errors import DataError, DynloraError, UsageError
from dynlora_cli.evaluation.rows import as_trained, of_file
from dynlora_cli.runs.folder import read_record
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.sections import Also
    from dynlora_cli.data.chat.template import Writing
    from dynlora_cli.tasks.task import Task


EARLIER_ROWS = 64  # of each earlier run


class Measured(TypedDict):
    """A loss, and the rows that it is of."""

    rows: int
    targets: int
    """Numbers that the loss is the mean over: tokens, or rows of a classifier."""
    sha256: str
    """Of the rows as tokens."""
    loss: float
    """Nats per target."""


@dataclass(frozen=True)
class RowSet:
    """Rows that are measured together.

    Attributes:
        name: of the set.
        examples: in a fixed order.
        sha256: of the examples.
    """

    name: str
    examples: list[Example]
    sha256: str

    @classmethod
    def of(cls, name: str, examples: Sequence[Example]) -> RowSet:
        """These rows, by a name."""
        hashes = [_digest(example) for example in examples]
        return cls(name, list(examples), hashlib.sha256(b"".join(hashes)).hexdigest())

    def measured(self, loss: float) -> Measured:
        """A loss on these rows, as it goes on record."""
        targets = sum(example.supervised() for example in self.examples)
        return Measured(rows=len(self.examples), targets=targets, sha256=self.sha256, loss=loss)


Read = tuple[RowSet, Prompts]  # a set, and the hash of each row's prompt


@dataclass(frozen=True)
class Reading:
    """How rows become tokens: as those of a run did.

    Attributes:
        tokenizer, task: of the run.
        writing: how the run writes its rows.
        labels: names of its classes, of a classifier.
        table: tokens that the model has rows for; None: nobody knows.
        context: of the model, in tokens; None: it has no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    writing: Writing
    labels: list[str] | None
    table: int | None
    context: int | None


def row_sets(recipe: Recipe, reading: Reading, notes: list[str], *, trained: PromptsOf | None = None) -> list[RowSet]:
    """The sets that a run is measured on beside its own held-out rows: those of its recipe, or of the earlier runs.

    Args:
        recipe: of the run.
        reading: makes tokens of rows.
        notes: told what a person should know.
        trained: hashes of the prompts that the run trains on.

    Raises:
        UsageError, DataError, MachineError: a set of the recipe cannot be read.
    """
    if recipe.eval.also is None:
        read, missing = _earlier(recipe, reading)
        notes += [f"forgetting on {name} is not measured: {why}" for name, why in missing.items()]
    else:
        read = [_asked(also, recipe, reading, notes) for also in recipe.eval.also]
    for rows, prompts in read:
        if trained is not None and (count := shared(prompts, trained.column())):
            text = f"{rows.name}: {count} of {counted(len(prompts), 'row')} have a prompt that is also trained on"
            notes.append(f"{text}, so forgetting looks smaller than it is")
    return [rows for rows, _ in read]


def read_again(names: Collection[str], recipe: Recipe, reading: Reading) -> tuple[list[RowSet], dict[str, str]]:
    """Sets of a run that has ended, as their rows are now.

    Args:
        names: of the sets.
        recipe: of the run.
        reading: makes tokens of rows, as in the run.

    Returns:
        The sets that can be read, and by name why others cannot.
    """
    if recipe.eval.also is None:
        read, missing = _earlier(recipe, reading)
    else:
        read, missing = [], {}
        for also in recipe.eval.also:
            if also.name in names:
                try:
                    read.append(_asked(also, recipe, reading, []))
                except DynloraError as error:
                    missing[also.name] = error.message
    found = [rows for rows, _ in read if rows.name in names]
    unknown = set(names) - {rows.name for rows in found} - missing.keys()
    return found, missing | dict.fromkeys(unknown, "nothing says where its rows are from")


def _asked(also: Also, recipe: Recipe, reading: Reading, notes: list[str]) -> Read:
    return _slice(also.name, *_read(also, recipe, reading, notes), also.rows)


def _earlier(recipe: Recipe, reading: Reading) -> tuple[list[Read], dict[str, str]]:
    """A slice of the rows that each earlier run held out, and by the run's name why there is none."""
    read: list[Read] = []
    missing: dict[str, str] = {}
    for name, folder in _earlier_runs(recipe, missing).items():
        try:
            data = earlier_data(folder, reading.tokenizer, reading.task, table=reading.table, context=reading.context)
            if issubclass(data.kind, TwoLines):
                missing[name] = "it learned from compared or judged answers, each against a reference of its own"
            elif data.val:
                read.append(_slice(name, _renumbered(data, reading.labels), data.prompts["val"].column(), EARLIER_ROWS))
            else:
                missing[name] = f"the run in {folder} held no rows out"
        except DynloraError as error:
            missing[name] = error.message
    return read, missing


def _earlier_runs(recipe: Recipe, missing: dict[str, str]) -> dict[str, Path]:
    """The runs that a run goes on from or replays, and those that these came from: folders by name, oldest first.

    Args:
        recipe: of the run.
        missing: told which are not there, and why.
    """
    folders: dict[Path, Path] = {}
    for named, is_adapter in _origins(recipe).items():
        try:
            folder = find_adapter(Path(named), "adapter.from")[0] if is_adapter else Path(named).expanduser()
            for run in lineage(run_folder(folder), missing):
                folders.setdefault(run.resolve(), run)
        except UsageError as error:
            missing[Path(named).name] = error.message
    found: dict[str, Path] = {}
    for folder in folders.values():
        name, path = str(read_record(folder).get("name") or folder.resolve().name), folder.resolve()
        names = (name, f"{path.parent.name}/{name}", str(path))
        found[next(each for each in names if each not in found)] = folder
    return found


def _origins(recipe: Recipe) -> dict[str, bool]:
    """Folders that a recipe names, and whether it goes on from an adapter there or only replays rows."""
    named = {recipe.adapter.origin: True}
    if recipe.dataset.replay:
        named.setdefault(recipe.dataset.replay.origin, False)
    return {name: is_adapter for name, is_adapter in named.items() if name}


def _renumbered(data: Data, labels: Sequence[str] | None) -> Sequence[Example]:
    """The held-out rows of an earlier run, with the numbers that their classes have now.

    Raises:
        UsageError: it had other classes.
    """
    if not labels or not data.labels or list(labels) == data.labels:
        return data.val
    if not set(data.labels) <= set(labels):
        raise UsageError(f"it has other classes: {', '.join(data.labels)}")
    return [replace(row, label=labels.index(data.labels[row.label])) for row in data.val if isinstance(row, Classified)]


def _slice(name: str, examples: Sequence[Example], prompts: Prompts, most: int) -> Read:
    """A set of at most so many of the rows, and their prompts."""
    picked = picks(examples, most)
    return RowSet.of(name, [examples[index] for index in picked]), prompts[picked]


def picks(examples: Sequence[Example], most: int) -> list[int]:
    """Which of the rows are taken: at most so many, chosen by their hashes, whatever their order; in their order."""
    hashes = [_digest(example) for example in examples]
    return sorted(sorted(range(len(examples)), key=hashes.__getitem__)[:most])


def forgotten(before: Mapping[str, Measured], after: Mapping[str, Measured]) -> dict[str, Any]:
    """What became worse, as summaries have it.

    Args:
        before: by name of the set.
        after: of the same rows.

    Returns:
        also: of each set rows, targets, sha256, before, after and forgetting, which is after - before.
        forgetting: the largest; None where nothing was measured.
    """
    also = {
        name: {
            **{key: one[key] for key in ("rows", "targets", "sha256")},
            "before": before[name]["loss"],
            "after": one["loss"],
            "forgetting": one["loss"] - before[name]["loss"],
        }
        for name, one in after.items()
    }
    return {"also": also, "forgetting": max((one["forgetting"] for one in also.values()), default=None)}


def _read(also: Also, recipe: Recipe, reading: Reading, notes: list[str]) -> tuple[Sequence[Example], Prompts]:
    """All rows of a set, and the hash of each one's prompt.

    Raises:
        DataError, UsageError, MachineError: they cannot be read.
    """
    said: list[str] = []
    source = also.source
    if (source.format, source.columns, source.ignore) == ("auto", {}, []):
        source = as_trained(source, recipe, said)
    try:
        data = load_data(
            of_file(source, recipe),
            reading.tokenizer,
            task=reading.task,
            seed=recipe.seed,
            max_length=reading.context,
            labels=reading.labels,
            writing=reading.writing,
            table=reading.table,
            to_measure=True,
        )
    except DataError as error:
        raise DataError(f"eval.also, {also.name}: {error.message}", error.hint) from None
    # The built-in set keeps rows of its own for measuring.
    part, other = ("val", "train") if also.path in BUILT_IN else ("train", "val")
    about = [note for note in said + data.notes if not note.startswith(f"{other}: ")]
    notes += [f"{also.name}: {note.removeprefix(f'{part}: ')}" for note in about]
    return (data.val if part == "val" else data.train), data.prompts[part].column()


def _digest(example: Example) -> bytes:
    digest = hashlib.sha256()
    for part in (example.input_ids, example.label_ids, example.token_types or ()):
        digest.update(array("i", part).tobytes() + b"|")
    return digest.digest()
