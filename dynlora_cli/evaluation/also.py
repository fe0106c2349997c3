"""Rows of other kinds than a run trains on: what it may forget.

    row_sets    the sets of a recipe, `eval.also`, read as the run's own rows are
    forgotten   what became worse on them: the loss after, less the loss before

Both losses are of the same rows, in nats per target; a negative difference means that the model got better there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from dynlora_cli.data.load import load_data
from dynlora_cli.data.sources import BUILTIN
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.evaluation.rows import as_trained, of_file
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.config.sections import Also
    from dynlora_cli.data.chat_template import Writing
    from dynlora_cli.data.examples import Example
    from dynlora_cli.tasks.task import Task


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


def row_sets(recipe: Recipe, reading: Reading, notes: list[str], *, trained: Collection[bytes] = ()) -> list[RowSet]:
    """The sets that a run is measured on beside its own held-out rows.

    Args:
        recipe: of the run.
        reading: makes tokens of rows.
        notes: told what a person should know.
        trained: hashes of the prompts that the run trains on.

    Raises:
        UsageError, DataError, MachineError: a set of the recipe cannot be read.
    """
    known, sets = set(trained), []
    for also in recipe.eval.also or ():
        rows, prompts = _slice(also.name, *_read(also, recipe, reading, notes), also.rows)
        sets.append(rows)
        if shared := sum(prompt in known for prompt in prompts):
            text = f"{also.name}: {shared} of {counted(len(prompts), 'row')} have a prompt that is also trained on"
            notes.append(f"{text}, so forgetting looks smaller than it is")
    return sets


def row_set(name: str, recipe: Recipe, reading: Reading) -> RowSet:
    """One of the sets of a run, as its rows are now.

    Raises:
        UsageError, DataError, MachineError: it cannot be read.
    """
    for also in recipe.eval.also or ():
        if also.name == name:
            return _slice(name, *_read(also, recipe, reading, []), also.rows)[0]
    raise UsageError("its recipe has no such set")


def _slice(name: str, examples: list[Example], prompts: list[bytes], most: int) -> tuple[RowSet, list[bytes]]:
    """A set of at most so many of the rows, and their prompts."""
    picked = picks(examples, most)
    return RowSet.of(name, [examples[index] for index in picked]), [prompts[index] for index in picked]


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


def _read(also: Also, recipe: Recipe, reading: Reading, notes: list[str]) -> tuple[list[Example], list[bytes]]:
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
        )
    except DataError as error:
        raise DataError(f"eval.also, {also.name}: {error.message}", error.hint) from None
    # The built-in set keeps rows of its own for measuring.
    part, other = ("val", "train") if also.path == BUILTIN else ("train", "val")
    about = [note for note in said + data.notes if not note.startswith(f"{other}: ")]
    notes += [f"{also.name}: {note.removeprefix(f'{part}: ')}" for note in about]
    return (data.val if part == "val" else data.train), data.prompts[part]


def _digest(example: Example) -> bytes:
    digest = hashlib.sha256()
    for part in (example.input_ids, example.label_ids, example.token_types or ()):
        digest.update(array("i", part).tobytes() + b"|")
    return digest.digest()
