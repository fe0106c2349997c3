"""`dynlora eval`: a base model and any number of adapters on the same held-out rows. `run` is the table of contents."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import Place, find_base
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.data.chat_template import Writing
from dynlora_cli.errors import MachineError, MeasureError, UsageError
from dynlora_cli.evaluation import generation
from dynlora_cli.evaluation.held_out_loss import row_sums
from dynlora_cli.evaluation.lm_eval import Harness
from dynlora_cli.evaluation.report import BASE, Found, make_report, other_forms, side_by_side
from dynlora_cli.evaluation.rows import (
    MICRO_BATCH,
    NothingHeldOutError,
    Rows,
    base_in_memory,
    held_out_rows,
    own_table,
    precision_of,
    read_tokenizer,
)
from dynlora_cli.evaluation.scores import RowSums, classification, confusion
from dynlora_cli.evaluation.thresholds import Gates
from dynlora_cli.models.load import Base, context_length, resolve_dtype, table_rows
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.config.sections import Model
    from dynlora_cli.evaluation.generation import Prompt

ONE_BASE = "evaluate them one by one; only numbers on one base compare"
PROMPTS = 32  # that answers are generated for, where nobody says how many
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to measure, beside the loss.

    Attributes:
        base: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run; or the model of the person's recipe, see find_base.
        with_base: measure the base model too.
        max_samples: rows at most; None: as the recipe says of its own rows, and all of a file.
        generate: prompts to answer; 0: none; None: 32 where there are prompts and the packages for it.
        samples: generated answers to show.
        tasks: of lm-evaluation-harness: names, or paths of task files.
        limit: documents of each task at most.
        allow_template_mismatch: measure conversations with another chat template than the adapter was trained with.
        gates: numbers that must be reached.
    """

    base: str | None = None
    trust_remote_code: bool | Model = False
    with_base: bool = True
    max_samples: int | None = None
    generate: int | None = None
    samples: int = 0
    tasks: Sequence[str] = ()
    limit: int | None = None
    allow_template_mismatch: bool = False
    gates: Gates = field(default_factory=Gates)


def run(folders: Sequence[Path], data: Path | None, options: Options, tell: Tell) -> dict[str, Any]:
    """Measure the base and every adapter on the same rows; the base is loaded once.

    Args:
        folders: as `--adapter` names them.
        data: rows of a file, or held-out rows of a recipe; None: those of the first adapter's own run, and none at all
            where it does not know any and there are tasks.
        options: what else to measure.
        tell: takes a line for each part that begins.

    Returns:
        The report. Where a gate failed, `ok` is false, `failed` says what, and all numbers are there all the same.

    Raises:
        DynloraError: with the exit code that fits; a failed gate is no error.
    """
    adapters = [read_adapter(folder, options.base) for folder in folders]
    place = _one_base(adapters, options)
    tokenizer = read_tokenizer(adapters[0], place)
    rows = _rows(adapters[0], place, tokenizer, data, options)
    names = _names(adapters)
    notes = [adapter.note for adapter in adapters if adapter.note] + rows.notes
    read_as = partial(_rows, adapters[0], place, tokenizer, data, options)
    notes += _strangers(adapters, names, rows, read_as, own=data is None)
    notes += other_forms(adapters, names)
    notes += _compare_templates(adapters, names, tokenizer, rows, options.allow_template_mismatch)
    with_base = _base_has_rows(adapters, names, place, rows, int(tokenizer.pad_token_id), notes) and options.with_base
    prompts, scored = _prompts(rows, tokenizer, options, notes)
    options.gates.refuse_unmeasured(*_measured(rows, scored))
    targets = sum(example.supervised() for example in rows.examples)
    options.gates.refuse_other_rows(len(rows.examples), targets, rows.sha256, names)
    harness = None
    if options.tasks:
        if adapters[0].task != "causal-lm":
            raise UsageError(
                f"--tasks are for causal-lm, and {names[0]} is for {adapters[0].task}", "leave out --tasks"
            )
        harness = Harness(options.tasks, limit=options.limit, batch_size=rows.micro_batch_size)

    tell(f"{counted(len(rows.examples), 'row')}, {counted(targets, 'target')}: {rows.source}")
    base = base_in_memory(adapters[0], place, tokenizer)
    measure = _Measure(base, rows, prompts, scored, harness)
    found: dict[str, Found] = {}
    if with_base and _has_answer(base, notes):
        tell("measuring the base model")
        found[BASE] = measure(BASE)
    for name, adapter in zip(names, adapters, strict=True):
        tell(f"measuring {name} ({adapter.folder})")
        with attached(base.model, adapter):
            found[name] = measure(name)
    report = make_report(adapters, names, rows, found, notes)
    scored_references = sum(len(prompt.references) for prompt in prompts[:scored])
    report["generated"] = {"prompts": scored, "references": scored_references}
    report["samples"] = side_by_side(prompts[: options.samples], found)
    failed = options.gates.failures(report["adapters"])
    return report | {"ok": not failed, "failed": failed} | ({"error": "\n".join(failed)} if failed else {})


# -- before anything is loaded ---------------------------------------------------------------------------------------


def _one_base(adapters: Sequence[Adapter], options: Options) -> Place:
    """The base model that all adapters share.

    Raises:
        UsageError: they do not, or its weights are stored otherwise, or they are for different tasks or classes.
    """
    places = [find_base(adapter, options.base, options.trust_remote_code) for adapter in adapters]
    first = places[0]
    for adapter, place in zip(adapters, places, strict=True):
        if place.folder != first.folder:
            raise UsageError(
                f"the adapters belong to different base models: {adapters[0].folder} to {first.folder}, "
                f"{adapter.folder} to {place.folder}",
                ONE_BASE,
            )
        if adapter.record and (differing := _stored_otherwise(first, place)):
            raise UsageError(
                f"{adapters[0].folder} and {adapter.folder} were not trained on the same base model: {differing}",
                ONE_BASE,
            )
        if (adapter.task, place.labels) != (adapters[0].task, first.labels):
            raise UsageError(
                f"{adapters[0].folder} and {adapter.folder} do not answer the same question: "
                f"{_question(adapters[0], first)} and {_question(adapter, place)}",
                "evaluate them one by one",
            )
    return first


def _stored_otherwise(one: Place, other: Place) -> str:
    """In what the weights of two bases differ in memory, as a sentence; empty: in nothing.

    Another tool's adapter does not say how its base was stored, so it may be measured on any.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first, second = _stored(one, device), _stored(other, device)
    keys = [key for key in first if second.get(key, first[key]) != first[key]]
    return ", ".join(f"{key} is {first[key]} for the first and {second[key]} for the second" for key in keys)


def _stored(place: Place, device: torch.device) -> dict[str, str]:
    options = place.options
    names = ["load_in_4bit", "load_in_8bit"]
    if options.load_in_4bit:
        names += ["bnb_4bit_quant_type", "bnb_4bit_use_double_quant"]
    dtype = str(resolve_dtype(options.dtype, device)).removeprefix("torch.")
    return {"model.dtype": dtype} | {f"model.{name}": str(getattr(options, name)).lower() for name in names}


def _question(adapter: Adapter, place: Place) -> str:
    return f"{adapter.task} ({', '.join(place.labels)})" if place.labels else adapter.task


def _rows(
    adapter: Adapter,
    place: Place,
    tokenizer: PreTrainedTokenizerBase,
    data: Path | None,
    options: Options,
    writing: Writing | None = None,
) -> Rows:
    """The rows to measure on: none where tasks are all that is asked for."""
    try:
        return held_out_rows(adapter, place, tokenizer, data, max_samples=options.max_samples, writing=writing)
    except NothingHeldOutError as error:
        if not options.tasks or data is not None:
            raise
        return Rows([], "no rows", "", 0, MICRO_BATCH, [f"{error.message}, so only tasks are run; for a loss: --data"])


def _names(adapters: Sequence[Adapter]) -> list[str]:
    """A name for each adapter: its own, or its folder where two have the same."""
    if len({adapter.folder.resolve() for adapter in adapters}) < len(adapters):
        folders = ", ".join(str(adapter.folder) for adapter in adapters)
        raise UsageError(f"two of these adapters are the same: {folders}", "name each of them once")
    own = Counter([BASE, *(adapter.name for adapter in adapters)])
    return [
        adapter.name if own[adapter.name] == 1 else f"{adapter.folder.parent}/{adapter.folder.name}"
        for adapter in adapters
    ]


def _strangers(
    adapters: Sequence[Adapter], names: Sequence[str], rows: Rows, read_as: Callable[[Writing], Rows], *, own: bool
) -> list[str]:
    """A note for each adapter that was trained on other rows than the run whose held-out rows these are.

    Args:
        read_as: reads these rows as another run would: on another day, pairs as turns.
        own: they are the first adapter's own, of which `held_out_rows` has said what there is to say.
    """
    if rows.is_file or not rows.examples:
        return []
    mine, notes = Writing.of(adapters[0].record), []
    for name, adapter in list(zip(names, adapters, strict=True))[int(own) :]:
        then, writing = (adapter.record.get("data") or {}).get("sha256"), Writing.of(adapter.record)
        if then != rows.sha256 and not (then and writing != mine and then == read_as(writing).sha256):
            notes.append(f"{name} was trained on other rows, or rows read otherwise: some may have been among them")
    return notes


def _base_has_rows(
    adapters: Sequence[Adapter], names: Sequence[str], place: Place, rows: Rows, pad: int, notes: list[str]
) -> bool:
    """Whether the base's table has a row for every token of these rows; a note where only the adapters' own have.

    Raises:
        UsageError: the table of an adapter, its own or the base's, has not.
    """
    table = table_rows(place.folder)
    texts = [ids for row in rows.examples for ids in (row.input_ids, row.labels) if not isinstance(ids, int)]
    needed = 1 + max((max(ids, default=0) for ids in texts), default=0)
    needed = max(needed, pad + 1) if rows.examples else 0
    if table is None or needed <= table:
        return True
    hold = f"these texts hold tokens up to number {needed - 1}"
    for name, adapter in zip(names, adapters, strict=True):
        if (rows_there := own_table(adapter, place) or table) < needed:
            raise UsageError(f"{name}: its table of tokens has {rows_there} rows, and {hold}", ONE_BASE)
    notes.append(
        f"the base model is left out: its table has {table} rows, and {hold}; the adapter brings a larger table"
    )
    return False


def _compare_templates(
    adapters: Sequence[Adapter], names: Sequence[str], tokenizer: PreTrainedTokenizerBase, rows: Rows, allowed: bool
) -> list[str]:
    """Refuse conversations that are written otherwise than in training; gives notes where that cannot be known.

    Raises:
        UsageError: the template in use is another one than an adapter was trained with.
    """
    if "Turns" not in rows.forms:
        return []
    now = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    notes = []
    for name, adapter in zip(names, adapters, strict=True):
        then = adapter.record.get("chat_template_sha256")
        if not adapter.record:
            notes.append(f"{name} does not say which chat template it was trained with; the tokenizer's own is used")
        elif then != now:
            trained = f"was trained with {then[:12]}" if then else "was trained without one"
            text = f"the chat template in use has the hash {now[:12]}, and {name} {trained}"
            if not allowed:
                raise UsageError(
                    text, "use the adapter's own tokenizer files and recipe, or add --allow-template-mismatch"
                )
            notes.append(text)
    return notes


def _prompts(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, options: Options, notes: list[str]
) -> tuple[list[Prompt], int]:
    """What the models are to answer, and to how many of these prompts the answers are scored.

    Raises:
        UsageError: answers are asked for, and the rows hold no prompts.
        MachineError: numbers are asked for, and the packages for them are missing.
    """
    missing, wanted = generation.missing_packages(), options.generate
    if wanted and missing:
        raise MachineError(f"--generate: not installed: {', '.join(missing)}", generation.INSTALL)
    asked = bool(wanted or options.samples)
    if not rows.forms & {"Turns", "Pair"}:
        if asked:
            raise UsageError("these rows have no prompts to answer", "leave out --generate and --samples")
        return [], 0
    if wanted is None:
        wanted = 0 if missing else PROMPTS
        if missing:
            notes.append(f"no answers are generated and scored; for that: {generation.INSTALL}")
    prompts = generation.find_prompts(rows.examples, tokenizer, max(wanted, options.samples))
    if asked and not prompts:
        raise UsageError(
            "these rows have no prompts apart from their answers (dataset.train_on: all)",
            "leave out --generate and --samples",
        )
    scored = min(wanted, len(prompts))
    if unseen := generation.unseen_by_rouge(prompts[:scored]):
        notes.append(f"ROUGE-L sees Latin letters and digits only: {unseen} references have none and score 0 in it")
    return prompts, scored


def _measured(rows: Rows, scored: int) -> tuple[set[str], str]:
    """The metrics that will be there, and why those."""
    if not rows.examples:
        return set(), "only tasks are run"
    if "Labelled" in rows.forms:
        return {"loss", "accuracy", "f1", "matthews"}, "the rows are texts with a class"
    if scored:
        return {"loss", "token_accuracy", *generation.METRICS}, "the rows are prompts with answers"
    return {"loss", "token_accuracy"}, "no answers are generated"


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class _Measure:
    """Measures the model that is in memory at the moment, with whatever is attached to it."""

    base: Base
    rows: Rows
    prompts: list[Prompt]
    scored: int
    harness: Harness | None

    def __call__(self, name: str) -> Found:
        """All numbers.

        Raises:
            MeasureError: the loss is not finite.
        """
        base, rows, autocast = self.base, self.rows, precision_of(self.base)
        sums = self._sums(name) if rows.examples else None
        metrics = self._metrics(sums) if sums else {}
        answers: list[str] = []
        tasks: dict[str, dict[str, float]] = {}
        with autocast():
            if self.prompts:
                answers = generation.generate(
                    base.model,
                    base.tokenizer,
                    self.prompts,
                    batch_size=rows.micro_batch_size,
                    context=context_length(base.folder),
                )
            if self.harness:
                tasks = self.harness.run(base.model, base.tokenizer)
        if self.scored:
            references = [prompt.references for prompt in self.prompts[: self.scored]]
            metrics |= generation.metrics(answers[: self.scored], references)
        return Found(sums, metrics, answers, tasks)

    def _sums(self, name: str) -> RowSums:
        batches = self.rows.batches(int(self.base.tokenizer.pad_token_id), self.base.model.device)
        classify = "Labelled" in self.rows.forms
        sums = row_sums(self.base.model, batches, classify=classify, autocast=precision_of(self.base))
        if not math.isfinite(sums.loss):
            raise MeasureError(f"the held-out loss of {name} is {sums.loss}", "look at its weights and its dtype")
        return sums

    def _metrics(self, sums: RowSums) -> dict[str, Any]:
        if sums.predicted_R is None:
            return {"token_accuracy": sums.accuracy}
        truth_R = np.array([example.labels for example in self.rows.examples])
        return classification(confusion(truth_R, sums.predicted_R, int(self.base.model.config.num_labels or 0)))


def _has_answer(base: Base, notes: list[str]) -> bool:
    """Whether the base model's own checkpoint answers the question; a classifier's head may be new and random."""
    if base.new_head:
        notes.append("the base model has no classifier head of its own, so there is nothing to measure of it")
    return not base.new_head
