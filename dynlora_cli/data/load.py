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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dynlora_cli.data.chat.fit import resolved
from dynlora_cli.data.chat.template import Writing, date_note, read_template, template_name
from dynlora_cli.data.chat.ways import unread
from dynlora_cli.data.descriptions import describe
from dynlora_cli.data.examples import Example
from dynlora_cli.data.forms import Turns
from dynlora_cli.data.mix import Span, mix_notes, spans_of
from dynlora_cli.data.read import Reader, read
from dynlora_cli.data.retrieve import put_passages
from dynlora_cli.data.rows.cache import Entry, opened
from dynlora_cli.data.rows.choice import split
from dynlora_cli.data.rows.fitting import TaskOfRows
from dynlora_cli.data.rows.kept import KeptList, KeptRows, PromptsOf, listed
from dynlora_cli.data.rows.sequences import confidences_of, numbers_of
from dynlora_cli.data.sources import BUILT_IN
from dynlora_cli.data.splits import advice_for, class_names, note_shared, number_labels, reasons_of
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

    train: Sequence[Example]
    val: Sequence[Example]
    labels: list[str] | None
    notes: list[str]
    counts: dict[str, dict[str, int]]
    sha256: str
    sizing: Sequence[Example] = field(default_factory=list)
    forms: set[str] = field(default_factory=set)
    writing: Writing = field(default_factory=Writing)
    prompts: dict[str, PromptsOf] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    replayed: Sequence[Example] = field(default_factory=list)
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
        sure, rows = confidences_of(self.train), numbers_of(self.train)
        return dict(zip(rows[sure != 1].tolist(), sure[sure != 1].tolist(), strict=True))


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
    tell: Callable[[str], None] = lambda _: None,
) -> Data:
    """Read, tokenise, split and count the rows of a recipe, whose `chat_template` is set on the tokenizer, to be saved.

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
        tell: takes sentences for the person who waits, while rows are read.

    Raises:
        DataError: rows that cannot be trained on; names the place and what to change.
        UsageError: a missing file. MachineError: a hub data set that cannot be reached.
    """
    reader = _reader(dataset, tokenizer, task, max_length, writing or Writing(), table, seed)
    stream = Stream(reader, _share_held_out(dataset)) if dataset.streaming else None
    entry = None if stream else opened(reader, tell)
    train, dropped = stream.opening() if stream else read(reader, dataset.train, held_out=False, opened=entry)
    labels = labels or _classes(reader, train, num_labels, own_classes)
    train, val, val_dropped = _held_out(reader, train, seed, stream, entry)
    train, sizing_rows = split(train, min(0.1, sizing / max(1, len(train))), seed + 1, reader.notes)
    parts, lost = {"train": train, "val": val, "sizing": sizing_rows}, {"train": dropped, "val": val_dropped}
    retrieval = put_passages(reader, seed, parts, lost, told=not to_measure)
    if labels is not None and task.has_classes:
        number_labels([kept for part in parts.values() for kept in listed(part)], labels, reader.notes)
    _describe(reader, parts, seed)
    counts = _counts({part: parts[part] for part in lost}, lost, reader, to_measure)
    _note_writing(reader, entry)
    training, measured, sized = (_settled(reader, part) for part in parts.values())
    data = Data(training, measured, labels, reader.notes, counts, "", sized, reader.told.forms, _written(reader))
    data.prompts, data.retrieval = {part: PromptsOf.of(parts[part]) for part in lost}, retrieval
    data.spans, data.stream = [] if stream else spans_of(parts["train"].sources, dataset.train), stream
    data.sha256 = _sha256(reader, data, parts)
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
    reader: Reader, train: KeptRows, num_labels: int | None, own_classes: list[str] | None
) -> list[str] | None:
    """Names of the outputs of a model that has some: those of the task, of the run that goes on, or of the rows."""
    if reader.task.outputs or not reader.task.has_classes:
        return reader.task.outputs
    return list(reader.writing.labels) or class_names(listed(train), num_labels, own_classes, reader.notes)


def _share_held_out(dataset: Dataset) -> float:
    """The share of the training rows' prompts to hold out, where nothing else is measured on."""
    own = dataset.val or all(source.path in BUILT_IN for source in dataset.train)
    return 0.0 if own else dataset.val_size


def _held_out(
    reader: Reader, train: KeptRows, seed: int, stream: Stream | None, entry: Entry | None
) -> tuple[KeptRows, KeptRows, int]:
    """Rows to train on, rows to measure on, and how many of the latter were dropped as they were read."""
    dataset = reader.dataset
    val, dropped = read(reader, dataset.val, held_out=True, opened=entry)
    if dataset.val:
        note_shared(reader.notes, train, val)
    elif all(source.path in BUILT_IN for source in dataset.train):
        val, dropped = read(reader, dataset.train[:1], held_out=True, limited=False)
    else:
        train, val = stream.split(train) if stream else split(train, dataset.val_size, seed, reader.notes)
    return train, val, dropped


def _describe(reader: Reader, parts: dict[str, KeptRows], seed: int) -> None:
    """Descriptions for all rows, those to measure on from their own sources where they have such."""
    dataset = reader.dataset
    for part, rows in parts.items():
        sources = dataset.val if part == "val" and dataset.val else dataset.train
        if any(source.descriptions for source in sources):
            describe(listed(rows), sources, seed, trained=part == "train")


def _settled(reader: Reader, rows: KeptRows) -> Sequence[Example]:
    """The examples of one part, each with what it needs of the others; stored ones need nothing of each other."""
    examples = rows.examples
    if isinstance(rows, KeptList):
        reader.encoder.settle(examples, [row.prompt for row in rows])
    return examples


def _note_writing(reader: Reader, entry: Entry | None) -> None:
    """What a person should know about how texts were put together."""
    template = reader.tokenizer.chat_template
    if reader.dataset.separator and not reader.told.set_apart:
        reader.notes.append("dataset.separator is not used: no row has bare text as its prompt, without a space behind")
    reader.notes += entry.remarks if entry else reader.encoder.notes(template_name(reader.dataset.chat_template))
    in_turns = Turns.__name__ in reader.told.forms or any(True in turns for turns in reader.told.turned.values())
    if in_turns and (note := date_note(template, reader.writing.moment)):
        reader.notes.append(note)
    reader.notes += _template_notes(reader, template, in_turns=in_turns)


def _template_notes(reader: Reader, template: object, *, in_turns: bool) -> list[str]:
    """What was said of how conversations are written and is not used, and what another server must be told."""
    dataset = reader.dataset
    sources = (*dataset.train, *dataset.val)
    named = {*dataset.chat_template_kwargs, *(name for one in sources for name in one.chat_template_kwargs)}
    named |= reader.told.variables  # those of rows as well
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
    found = {name: turns == {True} for name, turns in reader.told.turned.items() if len(turns) == 1}
    dataset = reader.dataset
    return replace(
        reader.writing,
        turned=found,
        template_kwargs=dict(dataset.chat_template_kwargs),
        system=dataset.system,
        reasoning=dataset.reasoning,
    )


# -- counts ----------------------------------------------------------------------------------------------------------


def _counts(
    parts: dict[str, KeptRows], lost: dict[str, int], reader: Reader, to_measure: bool
) -> dict[str, dict[str, int]]:
    """Count the rows; refuse a run that could learn nothing, and tell what was lost."""
    counts = {part: rows.counts() | {"dropped": lost[part]} for part, rows in parts.items()}
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
    return counts


def _sha256(reader: Reader, data: Data, parts: dict[str, KeptRows]) -> str:
    template, dataset = str(reader.tokenizer.chat_template), reader.dataset
    given: list[Any] = [dataset.train_on, dataset.overlong, reader.max_length, template, data.labels]
    if data.stream:  # the rows of whose files are not read yet
        given.append(data.stream.files)
    options = json.dumps(given)
    what = f"sha256 {options} {parts['val']}"
    return parts["train"].remembered(what, lambda: _digest(options, data)).tobytes().hex()


def _digest(options: str, data: Data) -> NDArray[np.uint8]:
    digest = hashlib.sha256(options.encode())
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
    return np.frombuffer(digest.digest(), np.uint8)
