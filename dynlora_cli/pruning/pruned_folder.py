"""What `dynlora prune` leaves: a run folder like that of a training run, with the pruning in its record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from dynlora_cli import __version__, plugins
from dynlora_cli.adapters.adapter import Adapter
from dynlora_cli.adapters.images.write import file_name
from dynlora_cli.pruning.retire import HEALED, PRUNED
from dynlora_cli.runs import record as records
from dynlora_cli.runs.log import RunLog
from dynlora_cli.runs.record import Birth
from dynlora_cli.runs.report.write import write_card, write_report


def write_record(
    folder: Path,
    before: Adapter,
    after: Adapter,
    summary: dict[str, Any],
    options: dict[str, Any],
    curve: list[dict[str, Any]],
    threshold: float,
    events: list[dict[str, Any]],
) -> None:
    """dynlora.json, rank_events.jsonl, report.html and README.md.

    Args:
        folder: the new one.
        before, after: the adapter, as it was and as it is.
        summary: of the command.
        options: those of the policy itself.
        curve: loss against size.
        threshold: highest score that was removed.
        events: of the loop, where the adapter was trained again after the cut.
    """
    turned = not getattr(plugins.load("policies", summary["policy"]), "as_they_stand", False)
    now = [*([PRUNED] if turned else []), *([HEALED] if events else [])]
    after = _altered(after, [*(before.record.get("altered") or ()), *now])
    _write(folder, before, after, summary, _pruning(summary, options, curve), threshold, events)


def write_retired(
    folder: Path,
    before: Adapter,
    after: Adapter,
    summary: dict[str, Any],
    born: list[Birth],
    events: list[dict[str, Any]],
) -> None:
    """The same where an update was retired: what stays has the record of the last run that stays.

    Args:
        folder: the new one.
        before, after: the adapter, as it was and as it is.
        summary: of the command.
        born: the updates that were retired.
        events: of the loop, where the adapter was trained again after the cut.
    """
    if events:
        after = _altered(after, [*(after.record.get("altered") or ()), HEALED])
    pruning: records.Prune = {"from": summary["from"], "born": born, "exact": summary["exact"], "why": summary["why"]}
    pruning["heal_steps"] = summary.get("heal_steps", 0)
    _write(folder, before, after, summary, pruning, None, events)


def _altered(adapter: Adapter, ways: list[str]) -> Adapter:
    """The adapter with what was done to its components on record, each way once."""
    return replace(adapter, record={**adapter.record, "altered": list(dict.fromkeys(ways))})


def _write(
    folder: Path,
    before: Adapter,
    after: Adapter,
    summary: dict[str, Any],
    pruning: records.Prune,
    threshold: float | None,
    events: list[dict[str, Any]],
) -> None:
    old = after.record
    changed = records.Record(
        schema_version=records.SCHEMA_VERSION,
        dynlora_version=__version__,
        name=Path(summary["output_dir"]).name,
        task=before.task,
        variant="lora" if before.config.get("peft_type") == "VERA" else old.get("variant"),  # read as the LoRA it is
        layers=_layers(before, after),
        base_model=old.get("base_model") or records.BaseModel(name_or_path=summary["model"]),
        births=list(after.births),
        budget=records.Budget(parameters=summary["budget_parameters"], start_parameters=before.parameters),
        prune=pruning,
        trained=old.get("trained") or old.get("summary"),
        summary=summary,
        finished=records.now(),
    )
    if after.image:  # the record is of this file alone
        changed["file"] = file_name(after)
        if after.task not in plugins.names("tasks"):
            changed.pop("task")
    records.write(folder, cast("records.Record", {**old, **changed}))
    with RunLog(folder) as log:
        log(_event(before, summary, threshold))
        for event in events:
            log(event)
    write_report(folder)
    write_card(folder)


def _pruning(summary: dict[str, Any], options: dict[str, Any], curve: list[dict[str, Any]]) -> records.Prune:
    pruning: records.Prune = {"from": summary["from"], "policy": summary["policy"]}
    if options:
        pruning["options"] = options
    pruning |= {"heal_steps": summary.get("heal_steps", 0), "teacher": summary.get("teacher", 0.0)}
    return {**pruning, "curve": curve}


def _layers(before: Adapter, after: Adapter) -> dict[str, records.Layer]:
    """Every layer that training had or the adapter has, with the rank that is left."""
    layers = {
        name: records.Layer(
            rank=after.ranks.get(name, 0),
            importance=after.layers[name].energy() if name in after.layers else 0.0,
            d_in=factors.a_CI.shape[1],
            d_out=factors.b_OC.shape[0],
            born=list(after.born(name)),
        )
        for name, factors in before.layers.items()
    }
    trained = before.record.get("layers") or {}
    gone = {"rank": 0, "importance": 0.0, "born": [0] * len(after.births)}
    return {name: layer | gone for name, layer in trained.items()} | layers


def _event(before: Adapter, summary: dict[str, Any], threshold: float | None) -> dict[str, Any]:
    """The cut, in the form of an event of training."""
    ranks: dict[str, int] = summary["ranks"]
    losses = (summary["loss_before"], summary["loss_after"])
    return {
        "event": "prune",
        "step": 0,
        "target_parameters": summary["budget_parameters"],
        "components_before": before.components,
        "parameters_before": before.parameters,
        "threshold": threshold,
        "removed": {name: rank - ranks[name] for name, rank in before.ranks.items() if rank > ranks[name]},
        "measured_loss_change": None if None in losses else losses[1] - losses[0],
        "components": summary["components"],
        "parameters": summary["parameters"],
        "ranks": ranks,
    }
