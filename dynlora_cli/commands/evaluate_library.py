"""`dynlora eval --library`: every request decides which updates are active. `run` is the table of contents.

A decision sees the request alone, never its answer. Each row is measured with exactly the updates that were chosen for
it, in batches that are the same for all of them: a row that the base answers has the base's loss to the bit.

Dimensions: R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.data.examples import Example, OneText
from dynlora_cli.data.sources import BUILTIN
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.report import BASE
from dynlora_cli.evaluation.rows import MICRO_BATCH, held_out_rows
from dynlora_cli.evaluation.scores import paired_difference
from dynlora_cli.library.activation import Activator, Decision, calibration_of
from dynlora_cli.library.answers import answers
from dynlora_cli.library.library import Library
from dynlora_cli.library.loaded import Loaded, load, refuse_empty
from dynlora_cli.library.losses import Floats, RowLosses
from dynlora_cli.library.requests import RequestTexts
from dynlora_cli.merging.combine import combine
from dynlora_cli.merging.method import Way
from dynlora_cli.models.quiet import quiet
from dynlora_cli.tasks.scores import RowSums
from dynlora_cli.text import counted, did_you_mean

Tell = Callable[[str], None]
LIBRARY, UNRELATED = "library", "unrelated"


@dataclass(frozen=True)
class Wanted:
    """What a person says of an evaluation.

    Attributes:
        data: files or recipes, each `FILE` or `NAME=FILE`: NAME is the update that the rows belong to, or `unrelated`.
            None: the held-out rows of all updates.
        max_samples: rows of each at most.
        answers: prompts to answer, at most.
        base: the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run.
    """

    data: Sequence[str] = ()
    max_samples: int | None = None
    answers: int = 0
    base: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class AskedRows:
    """Rows that are measured together.

    Attributes:
        source: in words.
        origin: the update that they belong to, `unrelated`, or None where nobody says.
        examples: the rows.
        texts: of their requests.
        micro_batch_size: rows of a forward pass.
    """

    source: str
    origin: str | None
    examples: list[Example]
    texts: list[str]
    micro_batch_size: int = MICRO_BATCH


@dataclass
class Outcome:
    """Rows, what was decided on them, and the loss of each row with everything that was measured.

    Attributes:
        rows: these.
        targets_R: of each row.
        decisions: one for each row.
        losses: [R] by `base`, by update, and `library`.
    """

    rows: AskedRows
    targets_R: np.ndarray
    decisions: list[Decision]
    losses: dict[str, Floats] = field(default_factory=dict)


@quiet
def run(root: Path, wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Decide on every row by its request, and measure base, every update and the library's choice.

    Args:
        root: the library's folder.
        wanted: what the person says.
        tell: takes a line for each part that begins.

    Returns:
        The report.

    Raises:
        DynloraError: with the exit code that fits.
    """
    named = [_origin_of(text) for text in wanted.data]
    _check(Library.open(root), named)
    loaded = load(root, wanted.base, wanted.trust_remote_code)
    activator = Activator(loaded.library, loaded.encoder)
    notes = list(activator.notes)
    sets = _row_sets(loaded, named, wanted.max_samples, notes)
    outcomes = [_outcome(loaded, activator, rows, tell) for rows in sets]
    newest = max(activator.finder.entries, key=lambda entry: entry.date).name
    return {
        "ok": True,
        "library": str(root),
        "task": loaded.first.task,
        "newest": newest,
        "sets": [_report(outcome) for outcome in outcomes],
        "all": _numbers(outcomes),
        "false_activations": _share_active([o for o in outcomes if o.rows.origin == UNRELATED]),
        "rate": activator.calibration.threshold.rate,
        "decisions": [one for outcome in outcomes for one in _decisions(outcome)],
        "samples": _answers(loaded, outcomes, wanted.answers),
        "notes": list(dict.fromkeys(notes)),
    }


# -- rows ------------------------------------------------------------------------------------------------------------


def _origin_of(text: str) -> tuple[str | None, Path]:
    """`NAME=FILE` in its parts; a file whose own name has an = in it is taken as a file."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and not Path(text).exists() else (None, Path(text))


def _check(library: Library, named: Sequence[tuple[str | None, Path]]) -> None:
    """What can be said before anything heavy loads.

    Raises:
        UsageError: it is empty or not calibrated, rows belong to an update that it has not, or their file is missing.
    """
    refuse_empty(library)
    calibration_of(library)
    names = [UNRELATED, *(entry.name for entry in library.entries)]
    for origin, path in named:
        if origin is not None and origin not in names:
            raise UsageError(
                f"--data {origin}={path}: {library.root} has no update {origin!r}{did_you_mean(origin, names)}",
                f"name one of: {', '.join(names)}; or --data FILE where nobody knows",
            )
        if not path.exists() and str(path) != BUILTIN:
            raise UsageError(f"--data {path} does not exist", "paths start at the current folder")


def _row_sets(
    loaded: Loaded, named: Sequence[tuple[str | None, Path]], most: int | None, notes: list[str]
) -> list[AskedRows]:
    """The rows that the person names, or the held-out rows of every update."""
    if named:
        return [_from_file(loaded, origin, path, most, notes) for origin, path in named]
    notes.append("these rows calibrated the library too; for numbers that owe nothing to that, name others with --data")
    sets = []
    for entry in loaded.library.entries:
        rows = loaded.held_out(entry)[:most]
        if rows:
            examples, texts = [row.example for row in rows], [row.text for row in rows]
            sets.append(AskedRows(f"held-out rows of {entry.name}", entry.name, examples, texts))
    if not sets:
        raise UsageError(f"no update of {loaded.library.root} has held-out rows", "name rows with --data FILE")
    return sets


def _from_file(loaded: Loaded, origin: str | None, path: Path, most: int | None, notes: list[str]) -> AskedRows:
    rows = held_out_rows(loaded.first, loaded.place, loaded.tokenizer, path, max_samples=most, passages=False)
    notes += rows.notes
    texts = RequestTexts(loaded.tokenizer)
    asked = ["" if _is_all_answer(example) else texts.of(example) for example in rows.examples]
    if silent := asked.count(""):
        notes.append(f"{path}: {counted(silent, 'row')} without a prompt: there is nothing to decide by but the answer")
    return AskedRows(str(path), origin, rows.examples, asked, rows.micro_batch_size)


def _is_all_answer(example: Example) -> bool:
    """Whether all of a text is to be written, so that it holds no request."""
    return isinstance(example, OneText) and not example.last_answer()[0]


# -- measuring -------------------------------------------------------------------------------------------------------


def _outcome(loaded: Loaded, activator: Activator, rows: AskedRows, tell: Tell) -> Outcome:
    """Decisions on rows, and all losses."""
    tell(f"{counted(len(rows.examples), 'row')}: {rows.source}")
    decisions = activator.decide(rows.texts)
    measure = RowLosses(loaded.base, rows.examples, rows.micro_batch_size)
    outcome = Outcome(rows, measure.targets_R, decisions, {BASE: measure.of(None, BASE)})
    for entry in activator.finder.entries:
        outcome.losses[entry.name] = measure.of(loaded.adapter(entry.name), entry.name)
    outcome.losses[LIBRARY] = _chosen(loaded, measure, outcome)
    return outcome


def _chosen(loaded: Loaded, measure: RowLosses, outcome: Outcome) -> Floats:
    """The loss of each row with what was chosen for it."""
    loss_R = outcome.losses[BASE].copy()
    for chosen in dict.fromkeys(decision.chosen for decision in outcome.decisions):
        mine_R = np.array([decision.chosen == chosen for decision in outcome.decisions])
        if len(chosen) == 1:
            loss_R[mine_R] = outcome.losses[chosen[0]][mine_R]
        elif chosen:
            loss_R[mine_R] = measure.of(_sum(loaded, chosen), " + ".join(chosen), mine_R)[mine_R]
    return loss_R


def _answers(loaded: Loaded, outcomes: Sequence[Outcome], count: int) -> list[dict[str, Any]]:
    """What the library answers to the first prompts, and what the base does."""
    examples = [example for outcome in outcomes for example in outcome.rows.examples]
    decisions = [decision for outcome in outcomes for decision in outcome.decisions]
    return answers(loaded.base, examples, decisions, partial(_sum, loaded), count)


def _sum(loaded: Loaded, names: Sequence[str]) -> Adapter:
    """The sum of several updates, exactly: their components side by side."""
    if len(names) == 1:
        return loaded.adapter(names[0])
    return combine([loaded.adapter(name) for name in names], Way(method="exact")).adapter


# -- the report ------------------------------------------------------------------------------------------------------


def _report(outcome: Outcome) -> dict[str, Any]:
    """What is told of one set of rows."""
    rows = outcome.rows
    told = {"source": rows.source, "origin": rows.origin, **_numbers([outcome])}
    if rows.origin is None:
        return told | {"false_activations": None}
    wrong = [bool(set(decision.chosen) - {rows.origin}) for decision in outcome.decisions]
    return told | {"false_activations": sum(wrong) / len(wrong)}


def _numbers(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Losses in nats per target, shares of rows by what was active, and the difference of library and base."""
    targets_R = np.concatenate([outcome.targets_R for outcome in outcomes])
    losses = {name: np.concatenate([o.losses[name] for o in outcomes]) for name in outcomes[0].losses}
    oracle_R = np.min([loss for name, loss in losses.items() if name != LIBRARY], axis=0)
    active = Counter(name for o in outcomes for d in o.decisions for name in d.chosen or (BASE,))
    ours, base = (RowSums(losses[name], targets_R, np.zeros_like(targets_R)) for name in (LIBRARY, BASE))
    return {
        "rows": len(targets_R),
        "tokens": int(targets_R.sum()),
        "losses": {name: float(loss.sum() / targets_R.sum()) for name, loss in losses.items()},
        "oracle": float(oracle_R.sum() / targets_R.sum()),
        "difference": {"to": BASE, **paired_difference(ours, base)},
        "active": {name: count / len(targets_R) for name, count in active.most_common()},
    }


def _share_active(outcomes: Sequence[Outcome]) -> float | None:
    decisions = [decision for outcome in outcomes for decision in outcome.decisions]
    return sum(bool(d.chosen) for d in decisions) / len(decisions) if decisions else None


def _decisions(outcome: Outcome) -> list[dict[str, Any]]:
    """Every decision with its reason and the losses that it made."""
    rows = zip(outcome.rows.texts, outcome.decisions, strict=True)
    return [_decision(outcome, number, request, decision) for number, (request, decision) in enumerate(rows)]


def _decision(outcome: Outcome, row: int, request: str, decision: Decision) -> dict[str, Any]:
    return {
        "source": outcome.rows.source,
        "row": row,
        "request": request,
        "chosen": list(decision.chosen),
        "confidence": decision.confidence,
        "reason": decision.reason,
        "key": None if decision.key is None else {"text": decision.key[0], "source": decision.key[1]},
        "loss": float(outcome.losses[LIBRARY][row]),
        "base_loss": float(outcome.losses[BASE][row]),
    }
