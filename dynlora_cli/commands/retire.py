"""`dynlora prune --born RUN`: takes an update out of an adapter again. `run` is the table of contents."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.attach import attached
from dynlora_cli.adapters.base import base_in_memory, find_base, read_tokenizer
from dynlora_cli.adapters.read import read_adapter
from dynlora_cli.adapters.write import save
from dynlora_cli.config.dtypes import FULL
from dynlora_cli.config.recipe import Recipe
from dynlora_cli.data.earlier import earlier_data
from dynlora_cli.data.preferences.examples import TwoLines
from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.evaluation.agreement import agreement, predictions, probe_rows
from dynlora_cli.evaluation.held_out_loss import held_out
from dynlora_cli.evaluation.peft_check import check_files, tell
from dynlora_cli.evaluation.rows import MICRO_BATCH, Rows, held_out_rows, own_recipe, own_table
from dynlora_cli.models.load import Base, precision_of
from dynlora_cli.models.place import Place
from dynlora_cli.models.quiet import quiet
from dynlora_cli.pruning.pruned_folder import write_retired
from dynlora_cli.pruning.retire import Comparison, Retirement, compare, folder_of, in_words, retire
from dynlora_cli.runs import events as run_events
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs.events import Emit
from dynlora_cli.runs.record import Birth
from dynlora_cli.tasks import task as tasks
from dynlora_cli.training.healing.heal import heal


@dataclass(frozen=True)
class Request:
    """What to retire.

    Attributes:
        path: a run folder, or any LoRA folder in PEFT's layout.
        born: of each update its run's name, the run's id or a beginning of it, or its folder.
        out: a new folder.
        heal_steps: training steps afterwards, by the recipe of the last run that stays.
        data: also measure on these rows, a file or a recipe; a recipe is also what is healed by.
        base_name: folder or hub id of the base model, in place of the one on record.
        trust_remote_code: Python code that comes with the base may run.
        max_samples: rows of each run at most.
        measure: measure losses and predictions before and after.
        overwrite: `out` may hold an earlier run.
    """

    path: Path
    born: Sequence[str]
    out: Path
    heal_steps: int = 0
    data: Path | None = None
    base_name: str | None = None
    trust_remote_code: bool = False
    max_samples: int | None = None
    measure: bool = True
    overwrite: bool = False


@quiet
def run(request: Request, emit: Emit = lambda event: None) -> dict[str, Any]:  # noqa: ARG005
    """Take updates out of an adapter, into a new folder; the input stays as it is.

    Args:
        request: what to retire.
        emit: takes notes.

    Returns:
        The summary, as data.

    Raises:
        UsageError: there is no such update, nothing would be left, or nothing says how to heal.
    """
    started, out = time.monotonic(), request.out
    run_folder.refuse_occupied(out, overwrite=request.overwrite, option="--out")
    adapter = read_adapter(request.path, request.base_name)
    run_folder.refuse_inputs(out, [adapter.folder, *([request.data] if request.data else [])])
    if adapter.note:
        emit(run_events.note(adapter.note))
    if (was := (adapter.record.get("summary") or {}).get("save_dtype", FULL)) != FULL:
        text = f"the adapter was saved in {was}; what is left goes into float32, its numbers as they are"
        emit(run_events.note(f"{text}: dynlora export --to peft --dtype {was} makes it small again"))
    retirement, comparison = _compared(retire(adapter, request.born), request.base_name)
    bench = _bench(request, adapter, emit)
    left, events = retirement.left, list[dict[str, Any]]()
    if request.heal_steps:
        assert bench is not None
        recipe = _recipe(left, bench)
        left = heal(left, bench.base, recipe, request.heal_steps, out, partial(_keep, events, emit))
    summary = _summary(request, adapter, retirement, left, comparison)
    summary |= _measured(bench, adapter, retirement, left, emit) if bench else {}
    summary["seconds"] = time.monotonic() - started
    with run_folder.replaced(out, overwrite=request.overwrite) as folder:
        save(left, folder)
        run_folder.copy_tokenizer(adapter.folder, folder)
        summary["peft_check"] = check_files(left, folder, request.base_name, request.trust_remote_code)
        write_retired(folder, adapter, left, summary, retirement.gone, events)
    tell(summary["peft_check"], out, emit)
    return summary


def _keep(events: list[dict[str, Any]], emit: Emit, event: dict[str, Any]) -> None:
    """Keep an event of the healing for the log; notes are for the person as well."""
    events.append(event)
    if event["event"] == "note":
        emit(event)


def _compared(retirement: Retirement, base_name: str | None) -> tuple[Retirement, Comparison | None]:
    """What is left beside the adapter that it is said to be, where that is still there; what differs is not exact."""
    last = retirement.births[-1]
    folder = Path(last["folder"])
    if retirement.why or not ((folder / run_folder.RECORD).is_file() or last["run"].startswith("sha256:")):
        return retirement, None
    try:
        earlier = read_adapter(folder, base_name)
    except DynloraError:  # it has gone, or was damaged since: nothing to compare with
        return retirement, None
    if earlier.births[-1]["run"] != last["run"]:
        return retirement, None
    found = compare(retirement.left, earlier)
    if found.same < found.left:
        other = f"{found.left - found.same} of the components that are left are not those in {folder}"
        return replace(retirement, why=[other]), found
    return retirement, found


@dataclass
class Bench:
    """The base in memory, to measure on."""

    request: Request
    place: Place
    base: Base
    rows: Rows | None

    def loss(self, adapter: Adapter, rows: Rows) -> float:
        """Held-out loss with this adapter, nats per target."""
        model = self.base.model
        with attached(model, adapter):
            batches = rows.batches(cast("int", self.base.tokenizer.pad_token_id), model.device)
            return held_out(model, batches, autocast=precision_of(self.base))["loss"]

    def rows_of(self, birth: Birth, adapter: Adapter) -> Rows:
        """The rows that an update's run held out.

        Raises:
            DynloraError: its folder has gone, its rows have changed, or it held none out.
        """
        folder, files = folder_of(birth, adapter), self.place.files
        if birth["run"].startswith("sha256:"):
            raise UsageError("another tool made it, and nobody says of which rows")
        if folder is None:
            raise UsageError(f"{birth['folder']} does not hold that run any more")
        table = own_table(adapter, self.place) or files.table_rows
        task = tasks.of(self.place.options)
        data = earlier_data(folder, self.base.tokenizer, task, table=table, context=files.context_length)
        if not data.val:
            raise UsageError("its run held no rows out")
        if issubclass(data.kind, TwoLines):
            raise UsageError("it learned from compared or judged answers, each against a reference of its own")
        examples = data.val[: self.request.max_samples]
        longest = max(len(line) for example in examples for line in example.lines)
        return Rows(examples, f"held-out rows of {birth['name']}", data.sha256, longest, MICRO_BATCH, task)


def _bench(request: Request, adapter: Adapter, emit: Emit) -> Bench | None:
    """The base, or None where it is not there and nothing needs it; then a note says so."""
    needed = request.heal_steps or request.data is not None
    if not (needed or request.measure):
        return None
    try:
        place = find_base(adapter, request.base_name, request.trust_remote_code)
        tokenizer = read_tokenizer(adapter, place)
    except (MachineError, UsageError) as error:
        if needed or request.base_name:
            raise
        emit(run_events.note(f"nothing is measured: {error.message}"))
        return None
    most = request.max_samples
    rows = (
        held_out_rows(adapter, place, tokenizer, request.data, max_samples=most, plain=True) if request.data else None
    )
    for note in rows.notes if rows else []:
        emit(run_events.note(note))
    return Bench(request, place, base_in_memory(adapter, place, tokenizer), rows)


def _recipe(left: Adapter, bench: Bench) -> Recipe:
    """What to heal by: the recipe that the person names, or that of the last run that stays.

    Raises:
        UsageError: nobody knows one.
    """
    given = bench.rows.recipe if bench.rows and not bench.rows.is_file else None
    recipe = given or own_recipe(left)
    if recipe is None:
        raise UsageError("--heal needs a recipe to train by", "name one with --data RECIPE.yaml")
    return recipe


def _measured(bench: Bench, before: Adapter, retirement: Retirement, left: Adapter, emit: Emit) -> dict[str, Any]:
    """Losses before and after on the held-out rows of every run, of --data, and what else is predicted otherwise."""
    rows: list[dict[str, Any]] = []
    births = {birth["run"]: birth for birth in [*retirement.births, *retirement.gone]}
    for birth in births.values():
        about = {"update": birth["name"], "run": birth["run"], "retired": birth in retirement.gone}
        try:
            found = bench.rows_of(birth, before)
        except DynloraError as error:
            emit(run_events.note(f"the loss on rows of {birth['name']} is not measured: {error.message}"))
            rows.append({**about, "rows": None, "loss_before": None, "loss_after": None})
            continue
        rows.append({**about, **_losses(bench, before, left, found)})
    if bench.rows:
        about = {"update": str(bench.request.data), "run": None, "retired": False}
        rows.append({**about, **_losses(bench, before, left, bench.rows)})
    own = next(line for line in rows if line["run"] == retirement.births[-1]["run"])
    losses = {key: own[key] for key in ("loss_before", "loss_after", "rows")}
    return {**losses, "rows_by_update": rows, "agreement": _agreement(bench, before, left)}


def _losses(bench: Bench, before: Adapter, left: Adapter, rows: Rows) -> dict[str, Any]:
    losses = {"loss_before": bench.loss(before, rows), "loss_after": bench.loss(left, rows)}
    return {"rows": len(rows.examples), **losses}


def _agreement(bench: Bench, before: Adapter, left: Adapter) -> dict[str, Any]:
    """How far predictions on a few lines of unrelated text have moved."""
    model, longest = bench.base.model, bench.place.files.context_length
    probe = [row[:, :longest] for row in probe_rows(bench.base.tokenizer)]
    found = []
    for adapter in (before, left):
        with attached(model, adapter), precision_of(bench.base)():
            found.append(predictions(model, probe))
    return agreement(found[0], found[1], probe).as_dict()


def _summary(
    request: Request, before: Adapter, retirement: Retirement, left: Adapter, comparison: Comparison | None
) -> dict[str, Any]:
    gone = {birth["run"] for birth in retirement.gone}
    words = in_words(retirement, comparison)
    return {
        "ok": True,
        "command": "prune",
        "output_dir": str(request.out),
        "from": str(before.folder),
        "model": before.config.get("base_model_name_or_path"),
        "born": [{key: birth[key] for key in ("name", "run", "date")} for birth in retirement.gone],
        "left": [birth["name"] for birth in retirement.births if birth["run"] not in gone],
        "exact": retirement.exact,
        "why": retirement.why,
        "words": words,
        "compared": comparison.as_dict() if comparison else None,
        "heal_steps": request.heal_steps,
        "budget_parameters": None,
        "parameters_start": before.parameters,
        "parameters": left.parameters,
        "components_start": before.components,
        "components": left.components,
        "loss_before": None,
        "loss_after": None,
        "rows": None,
        "rows_by_update": [],
        "agreement": None,
        "ranks_before": before.ranks,
        "ranks": {**dict.fromkeys(before.all_ranks, 0), **left.ranks},
        "next": None if retirement.exact or request.heal_steps else _to_heal(request),
    }


def _to_heal(request: Request) -> str:
    """The command that also trains what is left for some steps."""
    born = [word for text in request.born for word in ("--born", text)]
    out = f"{request.out}-healed"
    return shlex.join(["dynlora", "prune", "--adapter", str(request.path), *born, "--heal", "50", "--out", out])
