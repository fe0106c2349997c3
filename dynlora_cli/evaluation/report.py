"""What an evaluation found, as data: numbers of every model, differences with their intervals, answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynlora_cli.adapters.base import label_names
from dynlora_cli.config.mix import BASE
from dynlora_cli.data.chat.template import Writing
from dynlora_cli.evaluation.scores import paired_difference
from dynlora_cli.tasks.scores import RowSums

if TYPE_CHECKING:
    from dynlora_cli.adapters.adapter import Adapter
    from dynlora_cli.evaluation.generation import Prompt
    from dynlora_cli.evaluation.rows import Rows


@dataclass
class Found:
    """What was measured of one model; no sums where there are no rows."""

    sums: RowSums | None
    metrics: dict[str, Any]
    answers: list[str]
    tasks: dict[str, dict[str, float]]


def make_report(
    adapters: Sequence[Adapter],
    names: Sequence[str],
    rows: Rows,
    found: dict[str, Found],
    forgotten: Sequence[dict[str, Any]],
    notes: list[str],
) -> dict[str, Any]:
    """All numbers, as --json prints them.

    Args:
        adapters: in the order of the table.
        names: of the adapters.
        rows: that the losses were measured on.
        found: by name, what differences are taken to first: `BASE`, or the first adapter.
        forgotten: of each adapter: also and forgetting.
        notes: for the person.
    """
    tasks = sorted({task for each in found.values() for task in each.tasks})
    return {
        "ok": True,
        "rows": len(rows.examples),
        "tokens": sum(example.supervised() for example in rows.examples),
        "data": {"source": rows.source, "sha256": rows.sha256},
        "task": adapters[0].task,
        "objective": rows.task.objective,
        "labels": label_names(adapters[0]),
        "base": _numbers(found[BASE]) if BASE in found else None,
        "adapters": [
            {
                "name": name,
                "folder": str(adapter.folder),
                **_numbers(found[name]),
                "difference": _difference(found, name),
                **lost,
            }
            for name, adapter, lost in zip(names, adapters, forgotten, strict=True)
        ],
        "best": _best(found, names),
        "tasks": {task: {name: each.tasks[task] for name, each in found.items()} for task in tasks},
        "notes": list(dict.fromkeys(notes)),
    }


def other_forms(adapters: Sequence[Adapter], names: Sequence[str]) -> list[str]:
    """A note for each adapter that learned pairs as text where the first one learned them as turns, or reversed."""
    notes, mine = [], Writing.of(adapters[0].record).turned
    for name, adapter in list(zip(names, adapters, strict=True))[1:]:
        for form, turns in Writing.of(adapter.record).turned.items():
            if mine.get(form, turns) != turns:
                learned, asked = ("turns", "text") if turns else ("text", "turns")
                notes.append(
                    f"{name} learned {form} rows as {learned}, and is asked with {asked}, as {names[0]} learned"
                )
    return notes


def side_by_side(prompts: Sequence[Prompt], found: dict[str, Found]) -> list[dict[str, Any]]:
    """Prompts with their references and what every model answered, by its name."""
    return [
        {
            "prompt": prompt.text,
            "references": prompt.references,
            "answers": {name: each.answers[number] for name, each in found.items()},
        }
        for number, prompt in enumerate(prompts)
    ]


def _numbers(found: Found) -> dict[str, Any]:
    if found.sums is None:
        return {"loss": None, "tokens": 0}
    return {"loss": found.sums.loss, "tokens": found.sums.targets} | found.metrics


def _difference(found: dict[str, Found], name: str) -> dict[str, Any] | None:
    """To the base; to the first adapter where the base was not measured; None for what others are compared with."""
    reference = next(iter(found))
    ours, theirs = found[name].sums, found[reference].sums
    if reference == name or ours is None or theirs is None:
        return None
    return {"to": reference, **paired_difference(ours, theirs)}


def _best(found: dict[str, Found], names: Sequence[str]) -> dict[str, Any] | None:
    """The adapter with the lowest loss and its lead over the next; None where there is but one."""
    sums = {name: found[name].sums for name in names}
    known = sorted((s.loss, name, s) for name, s in sums.items() if s is not None)
    if len(known) < 2:
        return None
    (_, first, ours), (_, second, theirs), *_ = known
    return {"name": first, "next": second, "difference": paired_difference(ours, theirs)}
