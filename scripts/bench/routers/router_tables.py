"""routers.md, from the lines of routers.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str]  # router and setting

ALL, OTHERS, OUT = "all", "strangers", "without"
PAIRS = {"areas": "restaurants by area (city centre, riverside)", "kinds": "instructions by kind (facts, ideas)"}
HEAD = """# Which routers are worth using?

Made by `run.py` from routers.jsonl; do not edit. How it was measured is said in run.py, make.py and router_rows.py. Held-out
loss in nats per target, the mean over tasks. **right**: requests on which the own adapter was chosen; of routers that decide
by token, had the largest mean share over the tokens of the prompt. **to base**: requests that the base answered. **gain**: of what
the own adapter gains over the base, the share that is had. **strangers**: requests that no adapter is about; how many of
them were answered by an adapter, and the loss against the base. **left out**: requests whose adapter is not in the library;
the loss against the base, the mean of eight tasks and the worst. **time**: of a decision on one prompt, as a multiple of the
base's pass over it; by token, what a pass takes longer. `guarded`: the library's calibration decides whether any adapter is
asked. Mean (lowest to highest) of seeds."""


def page(lines: Sequence[Record]) -> str:
    """routers.md"""
    parts = [HEAD]
    for study in dict.fromkeys(line["study"] for line in lines):
        mine = [line for line in lines if line["study"] == study]
        seeds = sorted({line["seed"] for line in mine})
        parts += [f"## {study}", f"Seeds: {', '.join(map(str, seeds))}.", main_table(mine)]
        for pair, title in PAIRS.items():
            if any(line["part"] == pair for line in mine):
                parts += [f"### Two neighbours: {title}", pair_table(mine, pair)]
        parts += ["### Losses by task", task_table(mine)]
        if confused := mistakes(mine):
            parts += ["### Who answers whose requests, calibrated", confused]
    return "\n\n".join(parts) + "\n"


def keys(lines: Sequence[Record], part: str) -> list[Key]:
    """Routers and settings of a part; marks first."""
    return list(dict.fromkeys((line["router"], line["setting"]) for line in lines if line["part"] == part))


def of(lines: Sequence[Record], part: str, key: Key) -> list[Record]:
    return [line for line in lines if line["part"] == part and (line["router"], line["setting"]) == key]


def by_seed(found: Sequence[Record], number: Callable[[list[Record]], float | None]) -> list[float]:
    """A number of each seed."""
    seeds = sorted({line["seed"] for line in found})
    each = [number([line for line in found if line["seed"] == seed]) for seed in seeds]
    return [value for value in each if value is not None]


def spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    if len(values) == 1 or min(values) == max(values):
        return f"{mean(values):{form}}"
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main_table(lines: Sequence[Record]) -> str:
    rows = [
        "| router | setting | right, % | to base, % | loss | gain, % | strangers answered, % | strangers' loss, % | left out, % | worst, % "
        "| time |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [f"| {' | '.join(main_row(lines, key))} |" for key in keys(lines, ALL)]
    return "\n".join(rows)


def main_row(lines: Sequence[Record], key: Key) -> list[str]:
    own, strange, out = (of(lines, part, key) for part in (ALL, OTHERS, OUT))
    decides = bool(own) and "right" in own[0]
    took = of(lines, "time", key)
    return [
        *key,
        spread(by_seed(own, lambda some: 100 * mean(one["right"] for one in some)), ".1f") if decides else "",
        spread(by_seed(own, lambda some: 100 * mean(one["to_base"] for one in some)), ".1f") if decides else "",
        spread(by_seed(own, lambda some: mean(one["loss"] for one in some)), ".3f"),
        spread(by_seed(own, lambda some: gain(lines, ALL, some)), ".1f"),
        spread(by_seed(strange, lambda some: 100 * mean(1 - one["to_base"] for one in some)), ".1f") if decides else "",
        spread(by_seed(strange, lambda some: mean(above(lines, OTHERS, some))), "+.1f"),
        spread(by_seed(out, lambda some: mean(above(lines, ALL, some))), "+.1f"),
        spread(by_seed(out, lambda some: max(above(lines, ALL, some))), "+.1f"),
        spread([one["ratio"] for one in took], ".2f"),
    ]


def mark(lines: Sequence[Record], part: str, name: str, seed: int, task: str) -> float | None:
    """The loss of the base or the own adapter."""
    found = (line["loss"] for line in of(lines, part, (name, "")) if line["seed"] == seed and line["task"] == task)
    return next(found, None)


def gain(lines: Sequence[Record], part: str, some: Sequence[Record]) -> float | None:
    """Percent of what the own adapters gain, over all tasks."""
    had = possible = 0.0
    for one in some:
        base, oracle = (mark(lines, part, name, one["seed"], one["task"]) for name in ("base", "oracle"))
        if base is None or oracle is None:
            return None
        had, possible = had + base - one["loss"], possible + base - oracle
    return 100 * had / possible if possible else None


def above(lines: Sequence[Record], part: str, some: Sequence[Record]) -> list[float]:
    """Percent by which each loss is above the base's, of the same rows."""
    found = []
    for one in some:
        base = mark(lines, part, "base", one["seed"], one["task"])
        if base is not None:
            found.append(100 * (one["loss"] / base - 1))
    return found or [float("nan")]


def pair_table(lines: Sequence[Record], pair: str) -> str:
    rows = ["| router | setting | right, % | to base, % | loss | gain, % |", "|---|---|---|---|---|---|"]
    for key in keys(lines, pair):
        own = of(lines, pair, key)
        decides = "right" in own[0]
        cells = [
            *key,
            spread(by_seed(own, lambda some: 100 * mean(one["right"] for one in some)), ".1f") if decides else "",
            spread(by_seed(own, lambda some: 100 * mean(one["to_base"] for one in some)), ".1f") if decides else "",
            spread(by_seed(own, lambda some: mean(one["loss"] for one in some)), ".3f"),
            spread(by_seed(own, lambda some: gain(lines, pair, some)), ".1f"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def task_table(lines: Sequence[Record]) -> str:
    tasks = list(dict.fromkeys(line["task"] for line in lines if line["part"] in (ALL, OTHERS)))
    rows = [f"| router | setting | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for key in keys(lines, ALL):
        cells = []
        for task in tasks:
            found = [one["loss"] for part in (ALL, OTHERS) for one in of(lines, part, key) if one["task"] == task]
            cells.append(f"{mean(found):.3f}" if found else "")
        rows.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(rows)


def mistakes(lines: Sequence[Record]) -> str:
    """Shares of the requests of each task by who answered."""
    own = of(lines, ALL, ("calibrated", "guarded"))
    if not own:
        return ""
    tasks = list(dict.fromkeys(line["task"] for line in own))
    rows = [f"| requests of | {' | '.join(tasks)} | base |", "|---|" + "---|" * (len(tasks) + 1)]
    for task in tasks:
        mine = [line["first"] for line in own if line["task"] == task]
        cells = [f"{100 * mean(one.get(name, 0.0) for one in mine):.0f}" for name in (*tasks, "base")]
        rows.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(rows)
