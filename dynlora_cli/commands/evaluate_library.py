"""`dynlora eval --library`, and `--router` with adapters: every request decides what speaks.

A decision sees the request alone, never its answer. How rows are measured: routing/measure.py.

Dimensions: R rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.config.mix import BASE
from dynlora_cli.config.options import given
from dynlora_cli.data.examples import Example, OneText
from dynlora_cli.data.sources import BUILTIN
from dynlora_cli.errors import UsageError
from dynlora_cli.evaluation.requests import RequestTexts
from dynlora_cli.evaluation.rows import held_out_rows
from dynlora_cli.evaluation.scores import paired_difference
from dynlora_cli.generation.opening import Wanted as Adapters
from dynlora_cli.generation.opening import open_all
from dynlora_cli.library.activation import Decision, calibration_of
from dynlora_cli.library.answers import answers
from dynlora_cli.library.library import Library
from dynlora_cli.library.loaded import load, refuse_empty
from dynlora_cli.models.place import Place
from dynlora_cli.models.quiet import quiet
from dynlora_cli.routing.measure import AskedRows, Outcome, Setting, measure
from dynlora_cli.routing.router import KEYS, default_router, needs_of, unit_of
from dynlora_cli.tasks.scores import RowSums
from dynlora_cli.text import counted, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tell = Callable[[str], None]
LIBRARY, UNRELATED = "library", "unrelated"


@dataclass(frozen=True)
class Wanted:
    """What a person says of an evaluation.

    Attributes:
        data: files or recipes, each `FILE` or `NAME=FILE`: NAME is the adapter that the rows belong to, or `unrelated`.
            None: the held-out rows of all of them.
        max_samples: rows of each at most.
        answers: prompts to answer, at most.
        base: the base model, in place of the one on record.
        trust_remote_code: code that comes with the base may run.
        router: by name; None: the default.
        options: of the router, as `--set` was given them.
        adapters: folders, where there is no library.
    """

    data: Sequence[str] = ()
    max_samples: int | None = None
    answers: int = 0
    base: str | None = None
    trust_remote_code: bool = False
    router: str | None = None
    options: Sequence[str] = ()
    adapters: Sequence[Path] = ()


@dataclass(frozen=True)
class Ready:
    """What is in memory.

    Attributes:
        setting: the router with base and adapters.
        first: one of the adapters, by which rows are read.
        place: where the base lies.
        tokenizer: of rows that are read from files.
        own: the held-out rows of all adapters.
    """

    setting: Setting
    first: Adapter
    place: Place
    tokenizer: PreTrainedTokenizerBase
    own: Callable[[list[str]], list[AskedRows]]


@quiet
def run(root: Path | None, wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """Decide on every row by its request, and measure base, every adapter and what was decided.

    Args:
        root: the library's folder; None: `wanted.adapters` are meant.
        wanted: what the person says.
        tell: takes a line for each part that begins.

    Returns:
        The report.

    Raises:
        DynloraError: with the exit code that fits.
    """
    notes: list[str] = []
    named = [_origin_of(text) for text in wanted.data]
    library = None if root is None else Library.open(root)
    router = _router(library, wanted, notes)
    if library is not None:
        refuse_empty(library)
        _check([entry.name for entry in library.entries], str(library.root), named)
    ready = _of_library(library, router, wanted) if library else _of_adapters(router, wanted, named)
    sets = _row_sets(ready, named, wanted.max_samples, notes)
    outcomes, said = measure(ready.setting, sets, tell)
    notes += said
    by_threshold = library is not None and library.calibration is not None and KEYS in needs_of(router, library)
    entries = [] if library is None else [library.entry(name) for name in ready.setting.names]
    return {
        "ok": True,
        "library": None if root is None else str(root),
        "router": router,
        "unit": unit_of(router),
        "task": ready.first.task,
        "newest": max(entries, key=lambda entry: entry.date).name if entries else None,
        "sets": [_report(outcome, library) for outcome in outcomes],
        "all": _numbers(outcomes, library),
        "false_activations": _share_active([o for o in outcomes if o.rows.origin == UNRELATED]),
        "rate": calibration_of(library).threshold.rate if library and by_threshold else None,
        "decisions": [one for outcome in outcomes for one in _decisions(outcome)],
        "samples": _answers(ready.setting, outcomes, wanted.answers),
        "notes": list(dict.fromkeys(notes)),
    }


# -- what is meant ---------------------------------------------------------------------------------------------------


def _router(library: Library | None, wanted: Wanted, notes: list[str]) -> str:
    """The name of the router, which can work with what there is."""
    router, said = (wanted.router, "") if wanted.router else default_router(library)
    if said:
        notes.append(said)
    if library is None and KEYS in needs_of(router, library):
        raise UsageError(
            f"the router {router} goes by the keys of a library, and there is none", "name it: --library LIB"
        )
    if library is not None and router == "calibrated":
        refuse_empty(library)
        calibration_of(library)
    return router


def _of_library(library: Library, router: str, wanted: Wanted) -> Ready:
    """A library in memory, with the base of its updates."""
    loaded = load(library.root, wanted.base, wanted.trust_remote_code)
    known = library.seen if router == "calibrated" else [entry.name for entry in library.entries]
    options = given("routers", router, wanted.options)
    setting = Setting(router, loaded.base, known, loaded.adapter, library, loaded.encoder, options)

    def own(notes: list[str]) -> list[AskedRows]:
        if library.calibration is not None:
            notes.append(
                "these rows calibrated the library too; for numbers that owe nothing to that, name others with --data"
            )
        sets = []
        for entry in library.entries:
            if rows := loaded.held_out(entry)[: wanted.max_samples]:
                examples, texts = [row.example for row in rows], [row.text for row in rows]
                sets.append(AskedRows(f"held-out rows of {entry.name}", entry.name, examples, texts))
        if not sets:
            raise UsageError(f"no update of {library.root} has held-out rows", "name rows with --data FILE")
        return sets

    return Ready(setting, loaded.first, loaded.place, loaded.tokenizer, own)


def _of_adapters(router: str, wanted: Wanted, named: Sequence[tuple[str | None, Path]]) -> Ready:
    """Adapters in memory, with their base."""
    opened = open_all(Adapters(wanted.adapters, base=wanted.base, trust_remote_code=wanted.trust_remote_code))
    _check(list(opened.adapters), "--adapter", named)
    options, tokenizer = given("routers", router, wanted.options), opened.base.tokenizer
    setting = Setting(router, opened.base, list(opened.adapters), opened.adapters.__getitem__, options=options)

    def own(notes: list[str]) -> list[AskedRows]:
        sets = []
        for name, adapter in opened.adapters.items():
            rows = held_out_rows(adapter, opened.place, tokenizer, max_samples=wanted.max_samples, passages=False)
            notes += rows.notes
            if rows.objective:
                notes.append(f"{name}: its rows compare or judge answers, so they are left out; name rows with --data")
                continue
            sets.append(_asked(tokenizer, rows.source, name, rows.examples, rows.micro_batch_size))
        return sets

    return Ready(setting, next(iter(opened.adapters.values())), opened.place, tokenizer, own)


# -- rows ------------------------------------------------------------------------------------------------------------


def _origin_of(text: str) -> tuple[str | None, Path]:
    """`NAME=FILE` in its parts; a file whose own name has an = in it is taken as a file."""
    name, equals, path = text.partition("=")
    return (name, Path(path)) if equals and not Path(text).exists() else (None, Path(text))


def _check(names: Sequence[str], where: str, named: Sequence[tuple[str | None, Path]]) -> None:
    """Check rows that the person names.

    Raises:
        UsageError: they belong to an adapter that is not there, or their file is missing.
    """
    known = [UNRELATED, *names]
    for origin, path in named:
        if origin is not None and origin not in known:
            raise UsageError(
                f"--data {origin}={path}: {where} has no update {origin!r}{did_you_mean(origin, known)}",
                f"name one of: {', '.join(known)}; or --data FILE where nobody knows",
            )
        if not path.exists() and str(path) != BUILTIN:
            raise UsageError(f"--data {path} does not exist", "paths start at the current folder")


def _row_sets(
    ready: Ready, named: Sequence[tuple[str | None, Path]], most: int | None, notes: list[str]
) -> list[AskedRows]:
    """The rows that the person names, or the held-out rows of every adapter."""
    return [_from_file(ready, origin, path, most, notes) for origin, path in named] or ready.own(notes)


def _from_file(ready: Ready, origin: str | None, path: Path, most: int | None, notes: list[str]) -> AskedRows:
    rows = held_out_rows(ready.first, ready.place, ready.tokenizer, path, max_samples=most, passages=False, plain=True)
    notes += rows.notes
    asked = _asked(ready.tokenizer, str(path), origin, rows.examples, rows.micro_batch_size)
    if silent := asked.texts.count(""):
        notes.append(f"{path}: {counted(silent, 'row')} without a prompt: there is nothing to decide by but the answer")
    return asked


def _asked(
    tokenizer: PreTrainedTokenizerBase, source: str, origin: str | None, examples: Sequence[Example], size: int
) -> AskedRows:
    texts = RequestTexts(tokenizer)
    asked = ["" if _is_all_answer(example) else texts.of(example) for example in examples]
    return AskedRows(source, origin, examples, asked, size)


def _is_all_answer(example: Example) -> bool:
    """Whether all of a text is to be written, so that it holds no request."""
    return isinstance(example, OneText) and not example.last_answer()[0]


# -- the report ------------------------------------------------------------------------------------------------------


def _answers(setting: Setting, outcomes: Sequence[Outcome], count: int) -> list[dict[str, Any]]:
    """What is answered to the first prompts, and what the base answers."""
    examples = [example for outcome in outcomes for example in outcome.rows.examples]
    decisions = [decision for outcome in outcomes for decision in outcome.decisions]
    return answers(setting.base, examples, decisions, setting.speaking, count)


def _report(outcome: Outcome, library: Library | None) -> dict[str, Any]:
    """What is told of one set of rows."""
    rows = outcome.rows
    told = {"source": rows.source, "origin": rows.origin, **_numbers([outcome], library)}
    if rows.origin is None:
        return told | {"false_activations": None, "right": None}
    right, wrong = zip(*(_judged(outcome, row) for row in range(len(rows.examples))), strict=True)
    return told | {"false_activations": sum(wrong) / len(wrong), "right": sum(right) / len(right)}


def _judged(outcome: Outcome, row: int) -> tuple[float, float]:
    """How much of a row its own adapter spoke, and how much another did: 0 or 1, or a share of the row's tokens."""
    origin, decision = outcome.rows.origin, outcome.decisions[row]
    if not decision.by_token:
        right = not decision.chosen if origin == UNRELATED else origin in decision.chosen
        return float(right), float(bool(set(decision.chosen) - {origin}))
    shares = outcome.active(row)
    mine = shares.pop(str(origin), 0.0)
    return mine, min(1.0, sum(map(abs, shares.values())))


def _numbers(outcomes: Sequence[Outcome], library: Library | None) -> dict[str, Any]:
    """Losses in nats per target, shares of rows by what was active, and what was decided against the base."""
    targets_R = np.concatenate([outcome.targets_R for outcome in outcomes])
    losses = {name: np.concatenate([o.losses[name] for o in outcomes]) for name in outcomes[0].losses}
    oracle_R = np.min(list(losses.values()), axis=0)
    routed_R = np.concatenate([outcome.routed_R for outcome in outcomes])
    if library is not None:
        losses[LIBRARY] = routed_R
    active: Counter[str] = Counter()
    for outcome in outcomes:
        for row in range(len(outcome.decisions)):
            active.update(outcome.active(row))
    ours, base = (RowSums(loss_R, targets_R, np.zeros_like(targets_R)) for loss_R in (routed_R, losses[BASE]))
    return {
        "rows": len(targets_R),
        "tokens": int(targets_R.sum()),
        "losses": {name: float(loss.sum() / targets_R.sum()) for name, loss in losses.items()},
        "routed": float(routed_R.sum() / targets_R.sum()),
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
        "weights": None if decision.by_token else decision.mix,
        "shares": outcome.active(row) if decision.by_token else None,
        "confidence": decision.confidence,
        "reason": decision.reason,
        "key": None if decision.key is None else {"text": decision.key[0], "source": decision.key[1]},
        "loss": float(outcome.routed_R[row]),
        "base_loss": float(outcome.losses[BASE][row]),
    }
