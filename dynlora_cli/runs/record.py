"""dynlora.json, the record of a run: its keys, and the one place that writes them.

`dynlora train` writes it when a run begins and again when it is done, `dynlora prune` and `dynlora merge` with the
adapter that they make. It is read with `folder.read_record`, and a reader must do without any key: the file may be of
version 0.1, or somebody else's.
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

from dynlora_cli.files.whole import write_json

RECORD = "dynlora.json"
SCHEMA_VERSION = 1
_MOMENT = "%Y-%m-%dT%H:%M:%S%z"
# A word of Python, so no class can have it as a field: the folder that was pruned.
_PruneFrom = TypedDict("_PruneFrom", {"from": str}, total=False)


class _Chain(TypedDict, total=False):
    runs_before: int
    """The run began with what so many births right before it had brought; absent: with those back to the last one whose
    `old` is None. Both are the same but where adapters were merged and trained on."""


class Birth(_Chain):
    """A run in which components of an adapter began."""

    run: str
    """The run's `run_id`; for an adapter of another tool "sha256:" and the first 12 digits of its weights file's."""
    name: str
    """Of the run, or of the adapter's folder."""
    date: str | None
    """When the run started; None where nobody says."""
    data_sha256: str | None
    """Over the rows that it trained on, as in `Data`; None where nobody says."""
    folder: str
    """Where it was read from."""
    old: str | None
    """What the run did to the components it began with: "tune", "freeze" or "magnitudes"; None: there were none."""


class Retired(Birth):
    """An update whose components were taken out of an adapter by `dynlora prune --born`."""

    began_with: int
    """Of the adapter's births, the first so many were there when that run began."""


class BaseModel(TypedDict, total=False):
    """Which model was trained on."""

    name_or_path: str | None
    """As in the recipe, or in the adapter's own config where there is no recipe."""
    reference: str
    """As the adapter's config names it: a folder, or a hub id."""
    revision: str | None
    """Of a model of the hub, where the recipe names one."""
    model_type: str
    """As in the model's config.json."""
    auto_class: str | None
    """The class of transformers that loads it, where that is not the task's usual one."""
    fingerprint: dict[str, Any]
    """What identifies its files, see models/fingerprint.py."""
    quantization: str | None
    """The method by which its weights are stored quantized."""


class Budget(TypedDict, total=False):
    """How large the adapter may be."""

    requested: str | float
    """As in the recipe."""
    parameters: int | None
    """Numbers that may be left at the end; None where the run finds its own budget."""
    bytes: int
    """Bytes that the adapter's file may have, where the budget is of bytes."""
    start_parameters: int
    """Numbers at the start."""
    start_components: dict[str, int]
    """Components of each layer at the start."""
    start_born: dict[str, list[int]]
    """The same by birth: how many of them each run of `births` brought."""


class Data(TypedDict, total=False):
    """What was read."""

    counts: dict[str, dict[str, int]]
    """Of "train" and "val": rows, tokens, supervised, truncated, cut_answers, dropped."""
    train_rows: int
    """Rows that were trained on."""
    val_rows: int
    """Rows that were held out."""
    sha256: str
    """Over the rows as tokens, and the settings they were read with."""
    date: str
    """The date that chat templates wrote into the rows."""
    turned: dict[str, bool]
    """Of each format that could be written as turns, whether it was."""
    template_kwargs: dict[str, Any]
    """Variables of the chat template that the recipe set."""
    system: str | None
    """System message of conversations without one."""
    reasoning: str
    """What became of the assistant's reasoning: keep, mask or drop."""
    separator: str
    """Stood behind bare prompts; of an adapter that a hypernetwork wrote, since the recipe is not its own."""
    labels: list[str] | None
    """Names of the classes, in the order of the classifier's outputs."""
    mix: list[dict[str, Any]]
    """Where an epoch has not every row once: of each source, its rows and how many an epoch draws."""
    replay: dict[str, Any]
    """Where rows of earlier runs are replayed: the share, and of each run its folder, rows, draws and sha256."""
    prior: dict[str, Any]
    """Where pictures that the pipeline drew are learned beside the rows: their caption, how many, and their weight."""
    stream: dict[str, Any]
    """With `dataset.streaming`: rows in memory at a time, blocks and rows read, whole passes, rows left out; `counts`
    and `train_rows` are then of the rows that were read, each once."""
    retrieval: dict[str, Any] | None
    """With `dataset.retrieve`: the corpus and its hash, the retriever, and how often it found the right passage."""


class NewToken(TypedDict):
    """A token whose rows were trained."""

    text: str
    """The token."""
    number: int
    """Its id: its row in the table."""
    special: bool
    """Whether answers are shown without it."""
    known: bool
    """Whether the base's tokenizer had it before."""


class Tokens(TypedDict):
    """Rows of single tokens that were trained, in the order of the adapter's files."""

    table_rows: int
    """So many rows a table must have for the adapter to be loaded."""
    base_rows: int | None
    """So many the base's own has."""
    new: list[NewToken]


class Layer(TypedDict):
    """A layer that holds components, or once held some."""

    rank: int
    """Components that are left."""
    importance: float
    """The Frobenius norm of the layer's update."""
    d_in: int
    """Inputs of the layer."""
    d_out: int
    """Outputs of the layer."""
    born: list[int]
    """Components by the run that they began in, as in `births`; the adapter's files hold them in this order."""


class Member(TypedDict):
    """An adapter that a router learned to choose."""

    name: str
    """As the router calls it."""
    folder: str
    """Where it was read from."""
    sha256: str
    """Over its components, as they were read."""


class Prune(_PruneFrom, total=False):
    """What `dynlora prune` did."""

    policy: str
    """That scored the components."""
    options: dict[str, Any]
    """Of the policy, where it has any."""
    curve: list[dict[str, Any]]
    """Loss against size: parameters, components, energy, loss."""
    born: list[Birth]
    """The updates that were retired, in place of a policy and a curve."""
    exact: bool
    """Whether what is left is what there was before them."""
    why: list[str]
    """If it is not, why."""
    heal_steps: int
    """Training steps after the cut."""
    teacher: float
    """Share of their loss that came from the adapter before it."""


class Written(TypedDict, total=False):
    """Which hypernetwork wrote an adapter, and from what."""

    hypernet: str
    """Its folder."""
    sha256: str
    """Of its hypernet.json, which holds the hash of its numbers."""
    method: str
    """The variant that it was trained as."""
    description: str
    """The text that it wrote from."""
    documents: list[dict[str, Any]]
    """The documents that it wrote from: name, sha256 and characters of each."""
    chunks: int
    """That the base read of them, each alone."""
    parameters_written: int
    """Numbers in all components that it wrote, before the budget."""


class DocumentOf(TypedDict):
    """A document that an adapter was made from."""

    name: str
    """Of the file."""
    sha256: str
    """Of the file's content."""
    characters: int
    """Of its text."""
    chunks: int
    """It was cut into so many."""


class Adapted(TypedDict, total=False):
    """What `dynlora adapt` made an adapter from."""

    id: str
    """Names the work that wrote its rows."""
    asked_sha256: str
    """Over all that decided which rows were written."""
    documents: list[DocumentOf]
    chunk_tokens: int
    """Tokens of a chunk at most."""
    questions: str
    """Who wrote the prompts of the rows: the model, or a file with its sha256."""
    answers: str
    """Who wrote the answers, likewise."""
    teacher: str
    """The model that had the chunks in its prompt."""
    rows: int
    """Rows that were trained on."""
    held_out: int
    """Rows that were held out."""
    loss_with_document: float
    """The teacher's own loss on the held-out rows, with their chunks in its prompt, in nats per token."""
    writing_seconds: float
    """What the rows took."""
    chunks_added: bool
    """Each chunk was trained by itself, and the components put side by side."""


class Record(TypedDict, total=False):
    """The keys of dynlora.json, in the order in which a run writes them."""

    schema_version: int
    """Of this file."""
    dynlora_version: str
    """Of the program that wrote it."""
    run_id: str | None
    """Names the run in its checkpoints; None in a run that version 0.1 began."""
    name: str
    """Of the output folder."""
    task: str
    """What the model is for, as in the recipe."""
    variant: str | None
    """What was trained, as in the recipe."""
    base_model: BaseModel
    births: list[Birth]
    """The runs that components of this adapter began in, oldest first; the last one is this run."""
    budget: Budget | None
    """None where all weights trained."""
    library: list[Member]
    """The adapters that a router learned to choose from, in the order of its columns; absent where there is none."""
    history: list[tuple[int, int]]
    """The pruning events that were planned: step, and numbers that may be left after it."""
    recipe: dict[str, Any]
    """The complete recipe, every default written out."""
    recipe_yaml: str
    """The same, as a file that `dynlora train` takes."""
    tokens: Tokens
    """Absent where no rows of single tokens were trained."""
    rank_by_timestep: dict[str, Any]
    """Of a T-LoRA: how many components are used when, as in the metadata of its tensors' file."""
    data: Data
    tokenizer_sha256: str
    """Over all that the tokenizer does."""
    chat_template_sha256: str | None
    """Over the chat template; None where there is none."""
    versions: dict[str, str]
    """Of Python and of the libraries."""
    seeds: dict[str, int]
    """The seed of everything random, as "seed"."""
    device: str
    """What it ran on, in words."""
    processes: int
    """How many trained together."""
    dtype: str
    """Of the base's weights, and of autocast."""
    elastic_job: str
    """The job of torchrun that ran it last, so that processes which it starts again go on; absent without torchrun."""
    started: str
    """When, with the time zone."""
    adapted: Adapted
    """Of an adapter that was made from documents."""

    # From here on: when the run is done.
    scale: float | None
    """s, which the saved B is multiplied by already; None where all weights trained."""
    layers: dict[str, Layer]
    """Every layer that had components, by name."""
    adapter: str
    """"last" or "best": which state the folder holds."""
    timings: dict[str, float]
    """Seconds in optimizer steps, as "training_seconds"."""
    peak_memory_bytes: int
    """Of the GPU where one trained, else of the process."""
    finished: str
    """When, with the time zone."""
    summary: dict[str, Any]
    """What the command printed at the end, and what its --json prints; a run without one has not ended."""

    # Of `dynlora prune` and `dynlora merge` alone.
    written: Written
    """Of an adapter that a hypernetwork wrote."""
    prune: Prune
    trained: dict[str, Any] | None
    """Of an adapter that was pruned: the summary of its training."""
    altered: list[str]
    """What was done to all components since their training: "pruned" (turned into another basis), "healed"."""
    retired: list[Retired]
    """All updates that were ever taken out of the adapter."""
    altered_births: int
    """Of `births`, the first so many were altered, or had an update taken out, before the later ones began."""
    sha256: str
    """Of a merged adapter: over its tensors' file."""
    file: str
    """Of an adapter for a diffusion pipeline: the name of its file."""


def now() -> str:
    """The moment, as records write it."""
    return time.strftime(_MOMENT)


def is_after(one: object, other: object) -> bool:
    """Whether a moment, as records write it, is after another one; what cannot be read as a moment is not."""
    try:
        return datetime.strptime(str(one), _MOMENT) > datetime.strptime(str(other), _MOMENT)
    except ValueError:
        return False


def write(folder: Path, record: Record) -> None:
    """Put the record into a folder, whole or not at all."""
    write_json(folder / RECORD, record)
