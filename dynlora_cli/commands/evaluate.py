"""`dynlora eval`: a base model and any number of adapters on the same held-out rows. `run` is the table of contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.base import base_in_memory, read_tokenizer
from dynlora_cli.config.mix import BASE
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.data.forms import PREFERRING
from dynlora_cli.errors import MachineError, UsageError
from dynlora_cli.evaluation import generation
from dynlora_cli.evaluation.comparable import base_has_rows, compare_templates, one_base, strangers
from dynlora_cli.evaluation.forgetting import compare_with_base, find_sets, other_precision
from dynlora_cli.evaluation.lm_eval import Harness
from dynlora_cli.evaluation.measure import Measure, has_answer
from dynlora_cli.evaluation.options import Options
from dynlora_cli.evaluation.references import learn_reference
from dynlora_cli.evaluation.report import Found, make_report, other_forms, side_by_side
from dynlora_cli.evaluation.rows import MICRO_BATCH, NothingHeldOutError, Rows, held_out_rows
from dynlora_cli.hypernets.conditions import texts_of
from dynlora_cli.hypernets.measured import NetworkAdapter, put_on, read_measured, refuse_without_texts
from dynlora_cli.models.load import CAUSAL, auto_name
from dynlora_cli.models.place import Place
from dynlora_cli.models.quiet import quiet
from dynlora_cli.tasks import task as tasks
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.evaluation.generation import Prompt

PROMPTS = 32  # how many prompts are answered by default
Tell = Callable[[str], None]


@quiet
def run(folders: Sequence[Path], data: Path | None, options: Options, tell: Tell) -> dict[str, Any]:
    """Measure the base and every adapter on the same rows; the base is loaded once.

    Args:
        folders: as `--adapter` names them.
        data: rows of a file, or held-out rows of a recipe; None: those of the first adapter's own run, and none at all
            where it does not know any and there are tasks.
        options: what else to measure.
        tell: takes a line for each part that begins.

    Returns:
        The report. If a threshold is missed, `ok` is false and `failed` says which; all numbers are there as well.

    Raises:
        DynloraError: with the exit code that fits; a missed threshold is no error.
    """
    adapters = [read_measured(folder, options.base) for folder in folders]
    place = one_base(adapters, options)
    tokenizer = read_tokenizer(adapters[0], place)
    rows = _rows(adapters[0], place, tokenizer, data, options)
    refuse_without_texts(adapters, rows, options)
    names = _names(adapters)
    notes = [adapter.note for adapter in adapters if adapter.note] + rows.notes
    read_as = partial(_rows, adapters[0], place, tokenizer, data, options)
    notes += strangers(adapters, names, rows, read_as, own=data is None)
    notes += other_forms(adapters, names)
    notes += compare_templates(adapters, names, tokenizer, rows, options.allow_template_mismatch)
    pad = int(tokenizer.pad_token_id)
    with_base = base_has_rows(adapters, names, place, rows.examples, pad, notes) and options.with_base
    sets = find_sets(adapters, names, place, tokenizer, options, notes)
    prompts, scored = _prompts(adapters, rows, tokenizer, options, notes)
    options.thresholds.refuse_unmeasured(*_measured(rows, scored))
    targets = sum(example.supervised() for example in rows.examples)
    options.thresholds.refuse_other_rows(len(rows.examples), targets, rows.sha256, names)
    harness = _harness(adapters[0], names[0], place, options, rows)

    tell(f"{counted(len(rows.examples), 'row')}, {counted(targets, 'target')}: {rows.source}")
    base = base_in_memory(adapters[0], place, tokenizer)
    notes += learn_reference(adapters[0], [rows], base)
    measure = Measure(base, rows, prompts, scored, harness)
    found: dict[str, Found] = {}
    answers = (with_base or options.also) and has_answer(base, notes)
    if with_base and answers:
        tell("measuring the base model")
        found[BASE] = measure(BASE)
    compare_with_base(sets, base, options.thresholds, answers=bool(answers))
    forgotten: list[dict[str, Any]] = []
    for name, adapter in zip(names, adapters, strict=True):
        tell(f"measuring {name} ({adapter.folder})")
        with put_on(base, adapter, rows) as writer:
            found[name] = measure(name, writer)
            forgotten.append(sets[name].compared(base))
        notes += other_precision(adapter, name, sets[name], base)
    report = make_report(adapters, names, rows, found, forgotten, notes)
    scored_references = sum(len(prompt.references) for prompt in prompts[:scored])
    report["generated"] = {"prompts": scored, "references": scored_references}
    report["samples"] = side_by_side(prompts[: options.samples], found)
    failed = options.thresholds.failures(report["adapters"])
    return report | {"ok": not failed, "failed": failed} | ({"error": "\n".join(failed)} if failed else {})


# -- before anything is loaded ---------------------------------------------------------------------------------------


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
        return Rows(
            examples=[],
            source="no rows",
            sha256="",
            max_length=0,
            micro_batch_size=MICRO_BATCH,
            task=tasks.of(place.options),
            notes=[f"{error.message}, so only tasks are run; for a loss: --data"],
        )


def _harness(adapter: Adapter, name: str, place: Place, options: Options, rows: Rows) -> Harness | None:
    """What runs the tasks, if any are asked for.

    Raises:
        UsageError: the adapters are not for tasks.
    """
    if not options.tasks:
        return None
    if auto_name(place.options) != CAUSAL:
        raise UsageError(f"--tasks are for causal-lm, and {name} is for {adapter.task}", "leave out --tasks")
    return Harness(options.tasks, limit=options.limit, batch_size=rows.micro_batch_size)


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


def _prompts(
    adapters: Sequence[Adapter],
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: Options,
    notes: list[str],
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
    if not rows.forms & {"Turns", "Pair", *PREFERRING}:
        if asked:
            raise UsageError("these rows have no prompts to answer", "leave out --generate and --samples")
        return [], 0
    if wanted is None and rows.objective:  # answers that are preferred are no references
        wanted = 0
    if wanted is None:
        wanted = 0 if missing else PROMPTS
        if missing:
            notes.append(f"no answers are generated and scored; for that: {generation.INSTALL}")
    apart = texts_of if any(isinstance(adapter, NetworkAdapter) for adapter in adapters) else None
    prompts = generation.find_prompts(rows.examples, tokenizer, max(wanted, options.samples), apart)
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
    if scored:
        return {*rows.task.tells, *generation.METRICS}, "the rows are prompts with answers"
    return set(rows.task.tells), rows.task.why_measured


# -- measuring -------------------------------------------------------------------------------------------------------
