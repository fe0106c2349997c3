"""The data of a run: from the recipe's sources to token ids with labels, split in training and held-out rows.

The walk: `sources.tables` reads, a file of `formats/` gives each row its neutral form, the task's `Encoder` makes
tokens and labels, read.py cuts them to length, and this file splits, counts and reports. Everything that tools tend to
lose in silence (answers cut off, rows without a target, prompts on both sides of a split) is counted, and is an error
where training would be void.
"""

from __future__ import annotations

import copy
import hashlib
import json
from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.chat.fit import resolved
from dynlora_cli.data.chat.template import Writing, date_note, read_template, template_name
from dynlora_cli.data.chat.ways import unread
from dynlora_cli.data.descriptions import describe
from dynlora_cli.data.examples import Example
from dynlora_cli.data.forms import Turns
from dynlora_cli.data.mix import Span, mix_notes, spans_of
from dynlora_cli.data.read import Reader, TaskOfRows, read
from dynlora_cli.data.retrieve import put_passages
from dynlora_cli.data.sources import BUILT_IN
from dynlora_cli.data.splits import (
    Kept,
    advice_for,
    class_names,
    counts_of,
    note_shared,
    number_labels,
    reasons_of,
    split,
)
from dynlora_cli.data.streaming.stream import Stream
from dynlora_cli.data.vocabulary import Vocabulary
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.config.sections import Dataset


@dataclass(slots=True)
class Data:
    """Examples of a run, and what happened to the rows on the way.

    Args:
        train: examples to train on.
        val: held-out examples; may be empty.
        labels: names of the classes, for a classifier.
        notes: sentences for the person who runs it: what was chosen, what to look at.
        counts: for `train` and `val`: rows, tokens, supervised, truncated, cut_answers, dropped.
        sha256: over the options and all examples in order.
        sizing: examples held out from the training rows to choose the rank by; only where that is asked for.
        forms: the neutral forms that rows came in, by name: Turns, Pair, Plain, Labelled.
        writing: how the rows were written; the record of a run keeps it.
        prompts: of `train`, `val` and `replayed`: a hash of each row's prompt, in the order of the rows.
        spans: how many rows of each source an epoch takes, in the order of `train`, and then of `replayed`.
        replayed: examples of earlier runs to train on as well, see data/replay.py.
        replay: of which runs they are, how many of each and their hashes, for the record.
        retrieval: what was looked for and found; None without `dataset.retrieve`.
        prior: what the task lets the model learn beside the rows so that it keeps it, for the record.
        stream: gives the rows that come after `train`, where they are not all read before the run begins.
    """

    train: list[Example]
    val: list[Example]
    labels: list[str] | None
    notes: list[str]
    counts: dict[str, dict[str, int]]
    sha256: str
    sizing: list[Example] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    writing: Writing = field(default_factory=Writing)
    prompts: dict[str, list[bytes]] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    replayed: list[Example] = field(default_factory=list)
    replay: dict[str, Any] | None = None
    retrieval: dict[str, Any] | None = None
    prior: dict[str, Any] | None = None
    stream: Stream | None = None

    @property
    def kind(self) -> type[Example]:
        """The class of its examples, which all batches hold one of."""
        return type(self.train[0])

    @property
    def confidence(self) -> dict[int, float]:
        """How sure the data are of training rows, by `Example.row`; those that are not there count 1."""
        return {example.row: example.confidence for example in self.train if example.confidence != 1}


def load_data(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: TaskOfRows,
    seed: int,
    max_length: int | None = None,
    num_labels: int | None = None,
    labels: list[str] | None = None,
    sizing: int = 0,
    writing: Writing | None = None,
    table: int | None = None,
    own_classes: list[str] | None = None,
    to_measure: bool = False,
) -> Data:
    """Read, tokenise, split and count the rows of a recipe.

    A `chat_template` in the recipe is set on the tokenizer, to be saved with the run.

    Args:
        dataset: the recipe's `dataset` section.
        tokenizer: of the base model.
        task: what the rows are to teach.
        seed: decides which rows are held out, by a hash of their prompts: row order does not matter.
        max_length: caps `dataset.max_length`, such as at the model's context.
        num_labels: classes that the recipe announces, if it does.
        labels: names of the classes in their order, where they are known; by default they are found in the rows.
        sizing: rows to hold out from the training rows as well, at most a tenth of them.
        writing: how the run that they belong to writes its rows; None: a run that begins now.
        table: tokens that the model has rows for; None: nobody knows.
        own_classes: those that the model has a head for, in its order, if it has one.
        to_measure: all rows are to be measured on, so with `dataset.retrieve` none is told its right passage.

    Raises:
        DataError: rows that cannot be trained on; names the place and what to change.
        UsageError: a missing file. MachineError: a hub data set that cannot be reached.
    """
    reader = _reader(dataset, tokenizer, task, max_length, writing or Writing(), table, seed)
    stream = Stream(reader, _share_held_out(dataset)) if dataset.streaming else None
    train, dropped = stream.opening() if stream else read(reader, dataset.train, held_out=False)
    labels = labels or _classes(reader, train, num_labels, own_classes)
    train, val, val_dropped = _held_out(reader, train, seed, stream)
    train, sizing_rows = split(train, min(0.1, sizing / max(1, len(train))), seed + 1, reader.notes)
    parts, lost = {"train": train, "val": val, "sizing": sizing_rows}, {"train": dropped, "val": val_dropped}
    retrieval = put_passages(reader, seed, parts, lost, told=not to_measure)
    if labels is not None and task.has_classes:
        number_labels([kept for part in parts.values() for kept in part], labels, reader.notes)
    _describe(reader, parts, seed)
    counts = {part: counts_of(parts[part], lost[part]) for part in lost}
    _check_supervised(counts, reader, to_measure)
    _note_writing(reader)
    training, measured, sized = (_settled(reader, part) for part in parts.values())
    data = Data(training, measured, labels, reader.notes, counts, "", sized, reader.forms, _written(reader))
    data.prompts, data.retrieval = {part: [kept.prompt for kept in parts[part]] for part in lost}, retrieval
    data.spans, data.stream = [] if stream else spans_of(parts["train"], dataset.train), stream
    data.sha256 = _digest(data, dataset, str(tokenizer.chat_template), reader.max_length)
    data.notes = list(dict.fromkeys([*reader.notes, *mix_notes(data.spans)]))
    if stream:
        data.notes.append(stream.settle(training, counts["train"], parts["sizing"], labels, data.writing))
    return data


def _reader(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskOfRows,
    max_length: int | None,
    writing: Writing,
    table: int | None,
    seed: int,
) -> Reader:
    if dataset.chat_template:
        tokenizer.chat_template = read_template(dataset.chat_template)
    limit = min(dataset.max_length, max_length or dataset.max_length)
    if dataset.streaming:
        tokenizer = copy.deepcopy(tokenizer)  # of the thread that reads on while the run uses its own
    encoder = task.encoder(tokenizer, dataset.train_on, limit)
    encoder.reads = max_length
    return Reader(dataset, tokenizer, task, limit, encoder, writing, Vocabulary(tokenizer, table), seed)


def _classes(
    reader: Reader, train: list[Kept], num_labels: int | None, own_classes: list[str] | None
) -> list[str] | None:
    """Names of the outputs of a model that has some: those of the task, of the run that goes on, or of the rows."""
    if reader.task.outputs or not reader.task.has_classes:
        return reader.task.outputs
    return list(reader.writing.labels) or class_names(train, num_labels, own_classes, reader.notes)


def _share_held_out(dataset: Dataset) -> float:
    """The share of the training rows' prompts to hold out, where nothing else is measured on."""
    own = dataset.val or all(source.path in BUILT_IN for source in dataset.train)
    return 0.0 if own else dataset.val_size


def _held_out(
    reader: Reader, train: list[Kept], seed: int, stream: Stream | None
) -> tuple[list[Kept], list[Kept], int]:
    """Rows to train on, rows to measure on, and how many of the latter were dropped as they were read."""
    dataset = reader.dataset
    val, dropped = read(reader, dataset.val, held_out=True)
    if dataset.val:
        note_shared(reader.notes, train, val)
    elif all(source.path in BUILT_IN for source in dataset.train):
        val, dropped = read(reader, dataset.train[:1], held_out=True, limited=False)
    else:
        train, val = stream.split(train) if stream else split(train, dataset.val_size, seed, reader.notes)
    return train, val, dropped


def _describe(reader: Reader, parts: dict[str, list[Kept]], seed: int) -> None:
    """Descriptions for all rows, those to measure on from their own sources where they have such."""
    dataset = reader.dataset
    for part, rows in parts.items():
        sources = dataset.val if part == "val" and dataset.val else dataset.train
        describe(rows, sources, seed, trained=part == "train")


def _settled(reader: Reader, rows: list[Kept]) -> list[Example]:
    """The examples of one part, each with what it needs of the others."""
    examples = [row.example for row in rows]
    reader.encoder.settle(examples, [row.prompt for row in rows])
    return examples


def _note_writing(reader: Reader) -> None:
    """What a person should know about how texts were put together."""
    template = reader.tokenizer.chat_template
    if reader.dataset.separator and not reader.set_apart:
        reader.notes.append("dataset.separator is not used: no row has bare text as its prompt, without a space behind")
    reader.notes += reader.encoder.notes(template_name(reader.dataset.chat_template))
    in_turns = Turns.__name__ in reader.forms or any(True in turns for turns in reader.turned.values())
    if in_turns and (note := date_note(template, reader.writing.moment)):
        reader.notes.append(note)
    reader.notes += _template_notes(reader, template, in_turns=in_turns)


def _template_notes(reader: Reader, template: object, *, in_turns: bool) -> list[str]:
    """What was said of how conversations are written and is not used, and what another server must be told."""
    dataset = reader.dataset
    sources = (*dataset.train, *dataset.val)
    named = {*dataset.chat_template_kwargs, *(name for one in sources for name in one.chat_template_kwargs)}
    named |= reader.variables  # those of rows as well
    system = dataset.system is not None or any(one.system is not None for one in sources)
    if not in_turns:
        keys = [("chat_template_kwargs", named), ("system", system), ("reasoning", dataset.reasoning != "keep")]
        return [f"dataset.{key} is not used: no row is a conversation" for key, is_set in keys if is_set]
    notes = [note] if (note := unread(template, named)) else []
    if fixed := resolved(dataset.chat_template_kwargs, None):
        notes.append(
            f"rows are written with chat_template_kwargs {json.dumps(fixed)}, and so are requests to this run by "
            "dynlora; any other server must be told (chat_template_kwargs of a request)"
        )
    if any(resolved(one.chat_template_kwargs, None) or one.system is not None for one in dataset.train):
        notes.append(
            "what single sources set (chat_template_kwargs, system) is for their rows alone: a request says it itself"
        )
    return notes


def _written(reader: Reader) -> Writing:
    """How the rows were written: of each format that could be turns whether it was, where that is one answer."""
    found = {name: turns == {True} for name, turns in reader.turned.items() if len(turns) == 1}
    dataset = reader.dataset
    return replace(
        reader.writing,
        turned=found,
        template_kwargs=dict(dataset.chat_template_kwargs),
        system=dataset.system,
        reasoning=dataset.reasoning,
    )


# -- counts ----------------------------------------------------------------------------------------------------------


def _check_supervised(counts: dict[str, dict[str, int]], reader: Reader, to_measure: bool) -> None:
    """Refuse a run that could learn nothing; tell what was lost."""
    train, notes, limit = counts["train"], reader.notes, reader.max_length
    if not train["supervised"]:
        reasons = "; ".join(reasons_of(reader.lost[False]))
        raise DataError(f"dataset.train: no token left to learn from: {reasons}", advice_for(reasons, limit))
    if train["supervised"] < 0.01 * train["tokens"] and train["supervised"] != train["rows"]:
        notes.append(f"only {train['supervised'] / train['tokens']:.2%} of the training tokens carry a loss")
    for part, count in counts.items():
        where = "rows to measure" if to_measure else part
        if count["cut_answers"]:
            notes.append(f"{where}: {count['cut_answers']} of {count['rows']} answers were cut at max_length {limit}")
        if count["dropped"]:
            reasons = "; ".join(reasons_of(reader.lost[part == "val"]))
            notes.append(f"{where}: {counted(count['dropped'], 'row')} dropped: {reasons}")


def _digest(data: Data, dataset: Dataset, template: str, limit: int) -> str:
    options: list[Any] = [dataset.train_on, dataset.overlong, limit, template, data.labels]
    if data.stream:  # the rows of whose files are not read yet
        options.append(data.stream.files)
    digest = hashlib.sha256(json.dumps(options).encode())
    for name, examples in (("train", data.train), ("val", data.val)):
        digest.update(name.encode())
        for example in examples:
            for part in (example.input_ids, example.label_ids, example.token_types or ()):
                digest.update(array("i", part).tobytes() + b"|")
            if example.confidence != 1:
                digest.update(array("d", [example.confidence]).tobytes())
            if example.description:
                digest.update(example.description.encode("utf-8", "surrogatepass") + b"|")
            if len(example.wordings) > 1:  # of which later passes draw others
                digest.update("\n".join(example.wordings).encode("utf-8", "surrogatepass") + b"|")
    return digest.hexdigest()
