"""`dynlora prune`: makes a trained adapter smaller. `run` is the table of contents."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

from dynlora_cli import plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import bytes_of, save
from dynlora_cli.config.budget import Budget
from dynlora_cli.config.dtypes import FULL, rounding_note
from dynlora_cli.config.options import given
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.config.types import Section
from dynlora_cli.errors import MachineError, MeasureError, UsageError
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.evaluation.peft_check import check_files, tell
from dynlora_cli.evaluation.references import learn_reference
from dynlora_cli.evaluation.rows import NothingHeldOutError, Rows, held_out_rows, is_rows, own_recipe
from dynlora_cli.models.load import Base, precision_of
from dynlora_cli.models.place import Place
from dynlora_cli.models.quiet import quiet
from dynlora_cli.pruning import images
from dynlora_cli.pruning.bytes_budget import in_kilobytes, most_within
from dynlora_cli.pruning.curve import Curve
from dynlora_cli.pruning.policy import observer_of
from dynlora_cli.pruning.posthoc import Order, parameters_of, smallest_within
from dynlora_cli.pruning.pruned_folder import write_record
from dynlora_cli.pruning.row_fisher import weights_note
from dynlora_cli.pruning.rows import halves, some_of
from dynlora_cli.rounding.floats import changed
from dynlora_cli.runs import events as run_events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit
from dynlora_cli.text import counted
from dynlora_cli.training.healing.heal import heal, recipe_of
from dynlora_cli.training.healing.teacher import NOT_BY_TOKEN, Teacher, learns_tokens

AUTO = "auto"
WITH_ROWS, WITHOUT_ROWS = "activation", "magnitude"  # what `auto` is, by what there is to look at


@dataclass(frozen=True)
class Request:
    """What to prune, and how.

    Attributes:
        path: a run folder, any LoRA folder in PEFT's layout, or the file of an adapter for a diffusion pipeline.
        budget: as in a recipe; a share is of the parameters there are now; auto: as few as `tolerance` allows.
        out: a new folder.
        policy: scores the components; a file of policies/, or auto: by what there is to look at.
        options: those that the policy itself brings; None: their defaults.
        data: rows to look at and to measure on, a file or a recipe; None: the run's own held-out rows.
        tolerance: with budget auto, the share by which the held-out loss may rise.
        heal_steps: training steps after the cut.
        teacher: share of the loss of these that comes from the adapter before.
        base_name: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: Python code that comes with the base may run.
        max_samples: rows at most; None: all that were held out, and of a file so many as tell enough.
        measure: measure the loss where rows are known; False: only where it is needed.
        overwrite: `out` may hold an earlier run.
        seed: of policies that choose at random.
        dtype: of the factors of the result, of config/dtypes.py; "": float32, and of a pipeline's file as it came.
    """

    path: Path
    budget: Budget
    out: Path
    policy: str = AUTO
    options: Section | None = None
    data: Path | None = None
    tolerance: float = 0.005
    heal_steps: int = 0
    teacher: float = 0.0
    base_name: str | None = None
    trust_remote_code: bool = False
    max_samples: int | None = None
    measure: bool = True
    overwrite: bool = False
    seed: int = 0
    dtype: str = ""


@quiet
def run(request: Request, emit: Emit = lambda event: None) -> dict[str, Any]:  # noqa: ARG005
    """Prune an adapter into a new folder; the input stays as it is.

    Args:
        request: what to prune, and how.
        emit: takes notes and points of the curve as they are found.

    Returns:
        The summary, as data.
    """
    started, out, budget = time.monotonic(), request.out, request.budget
    run_folder.refuse_occupied(out, overwrite=request.overwrite, option="--out")
    adapter = read_adapter(request.path, request.base_name, images=True)
    request = _fitted(request, adapter)
    if not adapter.layers:
        raise UsageError(
            f"{adapter.folder} has no components to prune: {adapter.own_numbers()}", "it is as small as it gets"
        )
    run_folder.refuse_inputs(out, [adapter.folder, *([request.data] if request.data else [])])
    if adapter.note:
        emit(run_events.note(adapter.note))
    _tell_dtype(request, adapter, emit)
    own = _own_recipe(request, adapter, emit)
    teacher = _teacher(request, adapter)
    bench = _bench(request, adapter, emit, heals_by_file=own is None)
    recipe = own or (bench.rows.recipe if bench else None)
    request, order = _ordered(request, adapter, bench, emit)
    curve = _curve(request, order, bench, emit)
    target = _target(order, budget, adapter, curve, request)
    if budget.kind != "auto":
        curve.measure_sizes(target)
    keep_K, threshold = order.keep(target)
    smaller = order.cut(keep_K)
    events: list[dict[str, Any]] = []
    if request.heal_steps:
        assert bench is not None
        assert recipe is not None
        keep = partial(_keep, events, emit)
        smaller = heal(smaller, bench.base, recipe, request.heal_steps, out, keep, teacher)
    saved = smaller.rounded(request.dtype)
    summary = _summary(request, adapter, saved, curve, target, keep_K)
    summary["rows"] = len(bench.rows.examples) if bench and (curve.loss_of or request.heal_steps) else None
    if bench and request.heal_steps:
        share = teacher.share if teacher else 0.0
        summary |= {"heal_steps": request.heal_steps, "teacher": share, "loss_after": bench.loss(smaller)}
    if request.dtype != FULL:
        summary |= _rounding(request, smaller, saved, bench, summary["loss_after"], emit)
    summary["seconds"] = time.monotonic() - started
    options = request.options.model_dump() if request.options else {}
    with run_folder.replaced(out, overwrite=request.overwrite) as folder:
        file = save(saved, folder, dtype=request.dtype)
        summary["adapter_bytes"] = file.stat().st_size
        run_folder.copy_tokenizer(adapter.folder, folder)
        summary["peft_check"] = check_files(saved, folder, request.base_name, request.trust_remote_code)
        write_record(folder, adapter, saved, summary, options, curve.points, threshold, events)
    tell(summary["peft_check"], out, emit)
    return summary


def _rounding(
    request: Request, smaller: Adapter, saved: Adapter, bench: Bench | None, before: float | None, emit: Emit
) -> dict[str, Any]:
    """What rounding changed, for the summary: the loss is that of what is saved."""
    pairs = [[(f.a_CI, f.b_OC) for f in each.layers.values()] for each in (smaller, saved)]
    lost = changed(*pairs)
    after = bench.loss(saved) if bench and (request.measure or request.heal_steps) else None
    emit(run_events.note(rounding_note(request.dtype, lost, before, after)))
    found = {"save_dtype": request.dtype, "rounding": lost}
    return found if after is None else found | {"loss_float32": before, "loss_after": after}


@dataclass
class Bench:
    """The base in memory, the rows to measure on, and those that a policy looks at; None: the same."""

    place: Place
    base: Base
    rows: Rows
    choosing: Rows | None = None

    def batches(self, rows: Rows | None = None) -> Any:
        """All rows, anew at each call."""
        return (rows or self.rows).batches(cast("int", self.base.tokenizer.pad_token_id), self.base.model.device)

    def loss(self, adapter: Adapter) -> float:
        """Held-out loss with this adapter, nats per target.

        Raises:
            MeasureError: it is not finite.
        """
        with attached(self.base.model, adapter):
            loss = held_out(self.base.model, self.batches(), autocast=precision_of(self.base))["loss"]
        if not math.isfinite(loss):
            raise MeasureError(f"the held-out loss is {loss}", "look at the adapter and at the rows")
        return loss


def _fitted(request: Request, adapter: Adapter) -> Request:
    """The request with its number format; refused where it needs a pipeline that nobody puts in memory."""
    if not adapter.image:
        return replace(request, dtype=request.dtype or FULL)
    needing: dict[str, object] = {"--heal": request.heal_steps, "--data": request.data, "--base": request.base_name}
    looks = request.policy != AUTO and _looks(plugins.load("policies", request.policy), request.options)
    needing["--budget auto"] = request.budget.kind == "auto"
    images.refuse(adapter, request.policy, needing, looks=looks)
    return replace(request, measure=False, dtype=request.dtype or adapter.image.dtype)


def _tell_dtype(request: Request, adapter: Adapter, emit: Emit) -> None:
    if request.dtype == FULL and (was := (adapter.record.get("summary") or {}).get("save_dtype", FULL)) != FULL:
        emit(
            run_events.note(f"the adapter was saved in {was}; this one goes into float32, or with --dtype {was} again")
        )


def _own_recipe(request: Request, adapter: Adapter, emit: Emit) -> Recipe | None:
    """The recipe that the adapter was trained by; None where nobody knows it, and nothing asks for it."""
    own = own_recipe(adapter)
    if request.heal_steps and own is None and request.data is None:
        raise UsageError(
            "--heal needs rows to train on, and nothing says what the adapter was trained on",
            "name them with --data FILE, or a recipe with --data RECIPE.yaml",
        )
    if request.heal_steps and own and request.data:
        text = "heals by the recipe and rows of the adapter's own run; those of --data choose and measure"
        emit(run_events.note(text))
    return own


def _keep(events: list[dict[str, Any]], emit: Emit, event: dict[str, Any]) -> None:
    """Keep an event of the healing for the log; notes are for the person as well."""
    events.append(event)
    if event["event"] == "note":
        emit(event)


def _bench(request: Request, adapter: Adapter, emit: Emit, *, heals_by_file: bool) -> Bench | None:
    """What measuring needs, or None where it is not there and the policy can do without; then a note says so."""
    looks = request.policy != AUTO and _looks(plugins.load("policies", request.policy), request.options)
    needed = looks or request.budget.kind == "auto" or request.heal_steps or request.data is not None
    if not (needed or request.measure):
        return None
    place: Place | None = None
    data: Path | Recipe | None = request.data
    try:
        place = find_base(adapter, request.base_name, request.trust_remote_code)
        tokenizer = read_tokenizer(adapter, place)
        if request.heal_steps and heals_by_file and request.data and is_rows(request.data):
            data = recipe_of(place.options, request.data, out=request.out)
        rows = held_out_rows(adapter, place, tokenizer, data, max_samples=request.max_samples)
    except (MachineError, UsageError) as error:
        if isinstance(error, NothingHeldOutError) and isinstance(data, Recipe):
            text = f"{request.data}: none of its rows can be kept from healing to measure on"
            raise UsageError(
                text, "name a file of at least two rows with different prompts, or leave --heal out"
            ) from None
        if needed or (request.base_name and place is None):
            raise
        fix = "" if request.data else "; --data FILE names rows, by which components are chosen better, too"
        emit(run_events.note(f"the loss is not measured: {error.message}{fix}"))
        return None
    rows = some_of(rows, emit) if request.data and request.max_samples is None else rows
    whole, choosing = rows, None
    measures = request.measure or request.budget.kind == "auto" or request.heal_steps
    if measures and request.data and (looks or request.policy == AUTO):
        choosing, rows = halves(rows, emit)
    done = "measured on" if measures else "chosen by"
    emit(run_events.note(f"{done} {counted(len(rows.examples), 'row')}: {rows.source}"))
    for note in [*rows.notes, *weights_note(request.policy, request.options, whole.examples)]:
        emit(run_events.note(note))
    base = base_in_memory(adapter, place, tokenizer)
    for note in learn_reference(adapter, [whole], base):
        emit(run_events.note(note))
    return Bench(place, base, rows, choosing)


def _looks(policy: ModuleType, options: Section | None) -> bool:
    return observer_of(policy, options, training=False) is not None


def _ordered(request: Request, adapter: Adapter, bench: Bench | None, emit: Emit) -> tuple[Request, Order]:
    """The components in their order, and the request with the policy that made it."""
    if request.policy != AUTO:
        if request.options is None:
            request = replace(request, options=given("policies", request.policy, ()))
        return request, _order(request, adapter, bench)
    if bench is not None:
        by_rows = replace(request, policy=WITH_ROWS, options=given("policies", WITH_ROWS, ()))
        try:
            return by_rows, _order(by_rows, adapter, bench)
        except UsageError as error:  # it cannot judge this kind of adapter
            emit(run_events.note(f"policy {WITHOUT_ROWS}: {error.message}"))
    without = replace(request, policy=WITHOUT_ROWS, options=given("policies", WITHOUT_ROWS, ()))
    return without, _order(without, adapter, None)


def _order(request: Request, adapter: Adapter, bench: Bench | None) -> Order:
    policy = plugins.load("policies", request.policy)
    how: dict[str, Any] = {"options": request.options, "seed": request.seed}
    if bench is None:
        return Order.by_policy(adapter, policy, None, None, **how)
    shown = partial(bench.batches, bench.choosing)
    return Order.by_policy(adapter, policy, bench.base.model, shown, autocast=precision_of(bench.base), **how)


def _target(order: Order, budget: Budget, adapter: Adapter, curve: Curve, request: Request) -> int:
    """The parameters that may stay."""
    if budget.kind == "auto":
        full = curve.loss(adapter.parameters)
        limit = full + abs(full) * request.tolerance
        return smallest_within(curve.loss, order.least, order.adapter.parameters, limit)
    if budget.kind == "bytes":
        return _within_bytes(order, int(budget.value), adapter, request)
    target = parameters_of(budget, [adapter])
    if target < order.least:
        what = (
            "each magnitude of a DoRA, and each bias of a layer, needs one component"
            if adapter.keeps_one
            else "the largest component"
        )
        raise UsageError(
            f"--budget allows {target:,} parameters, and there must be {order.least:,}: {what}", "allow more"
        )
    if target >= adapter.parameters:
        raise UsageError(
            f"the adapter has {adapter.parameters:,} parameters, which is within the budget of {target:,} already",
            "ask for fewer, such as --budget 0.5 for half of them",
        )
    return target


def _within_bytes(order: Order, limit: int, adapter: Adapter, request: Request) -> int:
    """The parameters that may stay for the file to be within so many bytes.

    Raises:
        UsageError: not even the least that could stay is, or everything is.
    """
    within = f"--budget {limit:,} bytes in {request.dtype}"
    target = most_within(limit, order, request.dtype, order.least, order.adapter.parameters)
    if not target:
        smallest = bytes_of(order.cut(order.keep(order.least)[0]), request.dtype)
        raise UsageError(
            f"{within} are too few: the least that could stay makes a file of {smallest:,}",
            f"allow more, at least {in_kilobytes(smallest)}",
        )
    if target >= adapter.parameters:
        size = bytes_of(adapter, request.dtype)
        raise UsageError(
            f"{within}: all of the adapter is within that already, with {size:,} bytes",
            "to change the number format alone: "
            f"dynlora export --to {adapter.file_form if adapter.image else 'peft'} --dtype ...",
        )
    return target


def _curve(request: Request, order: Order, bench: Bench | None, emit: Emit) -> Curve:
    """The loss against the size; of the whole adapter, what the policy's own pass over the same rows has found."""
    if bench is None or not (request.measure or request.budget.kind == "auto"):
        return Curve(order, None, emit)
    return Curve(order, bench.loss, emit, order.loss if bench.choosing is None else None)


def _teacher(request: Request, adapter: Adapter) -> Teacher | None:
    """The adapter before the cut, where it is to teach what is left of it."""
    if not request.teacher:
        return None
    if not learns_tokens(adapter.task):
        raise UsageError(NOT_BY_TOKEN, "leave it out")
    return Teacher(adapter, request.teacher)


def _summary(
    request: Request, before: Adapter, after: Adapter, curve: Curve, target: int, keep_K: torch.Tensor
) -> dict[str, Any]:
    order = curve.order
    losses = {point["parameters"]: point["loss"] for point in curve.points}
    return {
        "ok": True,
        "command": "prune",
        "output_dir": str(request.out),
        "from": str(before.folder),
        "model": before.config.get("base_model_name_or_path"),
        "policy": request.policy,
        "budget_parameters": target,
        **({"budget_bytes": int(request.budget.value)} if request.budget.kind == "bytes" else {}),
        "parameters_start": before.parameters,
        "parameters": after.parameters,
        "components_start": before.components,
        "components": after.components,
        "energy_kept": order.energy_kept(keep_K),
        "loss_before": losses.get(order.adapter.parameters),
        "loss_after": losses.get(after.parameters),
        "ranks_before": before.ranks,
        "ranks": {**dict.fromkeys(before.all_ranks, 0), **after.ranks},
        "curve": curve.points,
    }
