"""Rows to measure an adapter on, and its base model in memory: what `prune`, `eval` and `export` start from.

Nothing asks for the training recipe again: the run folder knows it. Other rows come from a file or another recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from dynlora_cli import plugins
from dynlora_cli.adapters.base import recorded_model
from dynlora_cli.adapters.members import find_members
from dynlora_cli.adapters.own_rows import own_rows
from dynlora_cli.adapters.replaced import replacements
from dynlora_cli.config.adapter_section import LIBRARY_ROWS
from dynlora_cli.config.load import RECIPES, load_recipe
from dynlora_cli.config.plug_in_keys import recipe_form
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.sections import Dataset, Source, TrainSource
from dynlora_cli.data.batches import Batch, Batches
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.examples import Judge
from dynlora_cli.data.forms import Turns
from dynlora_cli.data.load import Data, load_data
from dynlora_cli.data.rows.fitting import fitting_formats
from dynlora_cli.data.sources import tables
from dynlora_cli.data.splits import sizing_rows
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, first_fault
from dynlora_cli.models.place import Place, input_table, structure
from dynlora_cli.runs.folder import RECORD
from dynlora_cli.tasks import objective as objectives
from dynlora_cli.tasks import task as tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.data.examples import Example
    from dynlora_cli.tasks.objective import Objective
    from dynlora_cli.tasks.task import Task

MICRO_BATCH = 8
ALL_OF_A_FILE = "name rows with --data FILE, all of which are used"
# Keys of `dataset` that say how a row becomes an example, and not which rows there are.
OF_A_ROW = (
    "max_length", "train_on", "overlong", "chat", "separator", "chat_template", "chat_template_kwargs",
    "system", "reasoning",
)  # fmt: skip


class NothingHeldOutError(UsageError):
    """No rows are known to measure on: the run trained on all of them, or nobody recorded any."""


@dataclass
class Rows:
    """Rows with a known right answer, that the adapter was not trained on.

    Attributes:
        examples: in a fixed order.
        source: where they come from, for people.
        sha256: of the examples and how they were read.
        max_length: of the longest that was let through.
        micro_batch_size: examples of one forward pass.
        notes: for the person.
        recipe: whose rows they are, where they are a recipe's.
        task: what they are to teach.
        forms: the neutral forms they came in, by name: Turns, Pair, Plain, Labelled.
        is_file: all rows of a file, which nothing says were ever trained on.
        objective: says how good a model is on these rows, where that is not what every task says.
        in_turns: the chat template writes them.
    """

    examples: Sequence[Example]
    source: str
    sha256: str
    max_length: int
    micro_batch_size: int
    task: Task
    notes: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    forms: set[str] = field(default_factory=set)
    is_file: bool = False
    objective: Objective | None = None
    in_turns: bool = False

    def batches(self, pad_id: int, device: torch.device) -> Iterator[Batch]:
        """All rows in order."""
        batches = Batches.in_order(
            self.examples, micro_batch_size=self.micro_batch_size, max_length=self.max_length, pad_id=pad_id
        )
        for index in range(batches.steps_per_epoch):
            yield from (batch.to(device) for batch in batches.step(0, index))


def own_recipe(adapter: Adapter) -> Recipe | None:
    """The recipe that the adapter was trained by; None where another tool made it."""
    recorded = adapter.record.get("recipe")
    if not recorded:
        return None
    model = recorded_model(adapter).model_copy(update={"trust_remote_code": False})
    try:
        return recipe_form(recorded).model_validate(recorded | {"model": model.model_dump()})
    except ValidationError as error:
        fault = first_fault(error)
        raise UsageError(f"{adapter.folder}: the recipe in {RECORD} is damaged: {fault}", COPY_AGAIN) from None


def held_out_rows(
    adapter: Adapter,
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    data: Path | Recipe | None = None,
    *,
    max_samples: int | None = None,
    writing: Writing | None = None,
    passages: bool = True,
    plain: bool = False,
) -> Rows:
    """The rows to measure on.

    Args:
        adapter: says what it was trained on.
        place: its base; no row may be longer than its context.
        tokenizer: makes the tokens; a recipe's `chat_template` is set on it.
        data: a recipe or its file, whose held-out rows are taken; a file of rows, all of which are; None: the run's.
        max_samples: at most so many; None: as the recipe says of its own rows, and all of a file.
        writing: how rows are written; None: as the adapter's own run did.
        passages: rows of a file get passages in their prompts, where the adapter was trained so (`dataset.retrieve`).
        plain: without the objective of the recipe, so by the likelihood of answers.

    Raises:
        UsageError: no rows are known, none are held out, or they cannot be read.
    """
    notes, named = list[str](), data.dataset.train[0].path if isinstance(data, Recipe) else data
    recipe, dataset, is_file = _what_to_read(adapter, data, notes, passages=passages)
    task = fitting_task(place, None if plain else recipe, dataset.train[0] if is_file else None, notes)
    read = own_rows_of(recipe, place, tokenizer) if recipe and not is_file else None
    read = read or load_data(
        dataset,
        tokenizer,
        task=task,
        seed=recipe.seed if recipe else 0,
        max_length=place.files.context_length,
        num_labels=len(place.labels) if place.labels else None,
        labels=place.labels,  # never found in these rows, whose order of classes may be another
        sizing=sizing_rows(recipe) if recipe and not is_file else 0,  # as in training, or the hash would be another
        writing=writing or Writing.of(adapter.record),
        table=own_table(adapter, place) or place.files.table_rows,
        to_measure=is_file,
    )
    if not (examples := read.train if is_file else read.val):
        raise NothingHeldOutError(f"{named or adapter.folder}: the recipe holds no rows out", ALL_OF_A_FILE)
    notes += [*read.notes, *(_changed(adapter, read) if data is None else [])]
    return Rows(
        examples=examples[: max_samples or (recipe.eval.max_samples if recipe and not is_file else None)],
        source=str(named) if is_file else f"held-out rows of {named or adapter.name}",
        sha256=read.sha256,
        max_length=max(len(line) for example in examples for line in example.lines),
        micro_batch_size=recipe.train.micro_batch_size if recipe else MICRO_BATCH,
        task=task,
        notes=notes,
        recipe=recipe,
        forms=read.forms,
        is_file=is_file,
        objective=_judging(examples, recipe, task),
        in_turns=Turns.__name__ in read.forms or any(read.writing.turned.values()),
    )


def is_rows(data: Path) -> bool:
    """Does a path name rows, and no recipe?"""
    return data.suffix.lower() not in RECIPES


def _changed(adapter: Adapter, read: Data) -> list[str]:
    if (adapter.record.get("data") or {}).get("sha256") == read.sha256:
        return []
    return ["the rows, or how they are read, have changed since training: some may have been trained on"]


def _judging(examples: Sequence[Example], recipe: Recipe | None, task: Task) -> Objective | None:
    """The objective that says how good a model is on these rows, where that is not what every task says."""
    if recipe is None or task.objective == plugins.OBJECTIVE:
        return None
    objective = objectives.of(recipe.train)
    objectives.hang(objective, examples)
    return objective if isinstance(objective, Judge) else None


def fitting_task(place: Place, recipe: Recipe | None, source: Source | None, notes: list[str]) -> Task:
    """The task of a base, for the objective of a recipe where the rows of a file are some that it learns from."""
    plain = tasks.of(place.options)
    task = tasks.of(place.options, recipe.train) if recipe else plain
    if source is None or task.forms == plain.forms:
        return task
    _, row = next(tables(source, [], held_out=False)[0].read())
    columns = {*row, *source.columns}
    named = [] if source.format == "auto" else [plugins.load("formats", source.format)]

    def fits(forms: tuple[str, ...]) -> bool:
        return bool([form for form in named if set(form.FORMS) & set(forms)] or fitting_formats(forms, columns))

    if fits(task.forms) or not fits(plain.forms):
        return task
    notes.append(f"{source.path}: its rows are none for {task.objective}: measured is the loss of their answers")
    return plain


def _what_to_read(
    adapter: Adapter, data: Path | Recipe | None, notes: list[str], *, passages: bool
) -> tuple[Recipe | None, Dataset, bool]:
    """The recipe whose rows these are, where there is one; its data settings; and whether they are all rows of a file.

    Raises:
        NothingHeldOutError: nobody says which rows.
    """
    own = own_recipe(adapter)
    if data is None and own is None:
        why = "it was written by a network" if "written" in adapter.record else "it holds no dynlora.json"
        raise NothingHeldOutError(
            f"{adapter.folder} does not say what it was trained on ({why})",
            "name rows with --data FILE, or a recipe with --data RECIPE.yaml",
        )
    if isinstance(data, Recipe):
        return data, data.dataset, False
    is_file = data is not None and is_rows(data)
    recipe = load_recipe(data) if data is not None and not is_file else own
    if data is not None and is_file:
        dataset = of_file(as_trained(Source(path=str(data)), own, notes), own)
        retrieve = own.dataset.retrieve if own and passages else None
        return recipe, dataset.model_copy(update={"retrieve": retrieve}), True
    assert recipe is not None
    return recipe, recipe.dataset, False


def own_rows_of(recipe: Recipe, place: Place, tokenizer: PreTrainedTokenizerBase) -> Data | None:
    """The rows of a recipe whose rows are those of the adapters in its `adapter.library`; None for any other."""
    if recipe.dataset.train[0].path != LIBRARY_ROWS:
        return None
    members, table = find_members(recipe.adapter.library or (), Path(recipe.output_dir)), place.files.table_rows
    task, context = tasks.of(place.options), place.files.context_length
    return own_rows(members, tokenizer, task, table=table, context=context)


def of_file(file: Source, own: Recipe | None) -> Dataset:
    """Data settings under which all rows of a file are read, each as the rows of a recipe are."""
    kept = {} if own is None else {key: getattr(own.dataset, key) for key in OF_A_ROW}
    return Dataset(train=[TrainSource(**file.model_dump())], val_size=0.0, **kept)


def own_table(adapter: Adapter, place: Place) -> int | None:
    """Rows of the table of tokens that an adapter brings with it; None where it brings none."""
    size = place.files.table_rows
    whole = any(tensor.ndim == 2 and tensor.shape[0] != size for tensor in adapter.whole.values())
    if not whole and not any(max(rows.indices) >= (size or 0) for rows in adapter.token_rows.values()):
        return None
    model = structure(place)
    table = input_table(model)
    name = next((name for name, module in model.named_modules() if module is table), None)
    own = replacements(model, adapter).get(f"{name}.weight")
    return None if own is None else own.shape[0]


def as_trained(file: Source, own: Recipe | None, notes: list[str]) -> Source:
    """A file to be read as the training rows were: their columns and format, where all have the same and these fit."""
    ways = [] if own is None else [(s.columns, s.format, s.ignore) for s in own.dataset.train]
    if not ways or any(way != ways[0] for way in ways) or ways[0] == (file.columns, file.format, file.ignore):
        return file
    columns, form, ignore = ways[0]
    there = set.intersection(*(set(next(table.read())[1]) for table in tables(file, [], held_out=False)))
    if columns and there.issuperset(columns.values()):
        there |= set(columns)
        named = ", ".join(f"{ours}={theirs}" for ours, theirs in columns.items())
        notes.append(f"{file.path}: columns as in training: {named}")
    else:
        columns = {}
    fits = form != "auto" and plugins.load("formats", form).matches(there)
    aside = [name for name in ignore if name in there]
    return file.model_copy(update={"columns": columns, "format": form if fits else "auto", "ignore": aside})
