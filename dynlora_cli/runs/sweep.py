"""A sweep as data: what became of its runs, and of each combination the mean over its seeds with an interval.

    Row               one run, as sweep.json and sweep.csv hold it
    summarize         rows to combinations, and the best of them
    why_not_compared  what keeps the losses of runs from being compared

`sweep.json` is written anew whenever a run begins or ends. What is to be done is read from the run folders alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from dynlora_cli.files.whole import write_json, write_text
from dynlora_cli.text import MEASURES

RECORD, TABLE, PAGE, CARD = "sweep.json", "sweep.csv", "sweep.html", "README.md"
SCHEMA_VERSION = 1
CONFIDENCE = 0.95
OPTIMISTIC = "chosen by the held-out rows, so its own number there is optimistic: judge it on rows that chose nothing"
OF_SUMMARY = ("loss_before", "parameters", "average_rank", "learning_rate", "steps", "seconds")
State = Literal["waiting", "running", "done", "failed", "interrupted"]


class Row(TypedDict, total=False):
    """One run of a sweep."""

    run: str
    """Name of its folder."""
    folder: str
    """Where that is."""
    values: dict[str, Any]
    """Of the keys that are swept."""
    state: State
    error: str
    """What a failed run said."""
    exit_code: int
    """That it would have ended with."""
    measured: dict[str, float]
    """Of the held-out rows, at the end: loss, and what else its task tells."""
    loss_before: float | None
    """On the same rows, before training."""
    parameters: int
    average_rank: float
    learning_rate: float
    steps: int
    seconds: float
    """In optimizer steps."""


def of_summary(row: Row, summary: Mapping[str, Any]) -> Row:
    """The row of a run that is done, by its summary."""
    found = {measure.key: summary.get(f"{measure.key}_after") for measure in MEASURES}
    done: dict[str, Any] = {key: summary[key] for key in OF_SUMMARY if key in summary}
    done |= {"state": "done", "measured": {key: value for key, value in found.items() if value is not None}}
    return cast("Row", {**row, **done})


def summarize(rows: Sequence[Row], seed: str, *, compared: bool = True) -> list[dict[str, Any]]:
    """The combinations of a sweep: runs that differ by nothing but their seed, as one.

    Args:
        rows: of all runs, in their order.
        seed: the key that is averaged over.
        compared: one of them may be called the best.

    Returns:
        Of each combination: its `values`, the names of its `runs`, how many are `done`, their `mean` and the 95 %
        interval of the mean `loss` over seeds as `low` and `high` (None for fewer than two), `parameters`, `seconds`,
        and whether it is the `best`. `behind`: how much higher its loss is than the best's, with the interval of the
        differences of equal seeds.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rest = {key: value for key, value in row["values"].items() if key != seed}
        groups.setdefault(json.dumps(rest, default=str), []).append(row)
    found = [_combination(members, seed) for members in groups.values()]
    best = _best(found) if compared else None
    for one, members in zip(found, groups.values(), strict=True):
        one["best"] = one is best
        one["behind"] = None
        if best is not None and one is not best:
            one["behind"] = _difference(members, list(groups.values())[found.index(best)], seed)
    return found


def _combination(rows: Sequence[Row], seed: str) -> dict[str, Any]:
    done = [row for row in rows if row["state"] == "done"]
    losses = [row["measured"]["loss"] for row in done if "loss" in row["measured"]]
    mean: dict[str, float] = {}
    for measure in MEASURES:
        several = [row["measured"][measure.key] for row in done if measure.key in row["measured"]]
        if several:
            mean[measure.key] = statistics.fmean(several)
    low, high = interval(losses)
    return {
        "values": {key: value for key, value in rows[0]["values"].items() if key != seed},
        "runs": [row["run"] for row in rows],
        "done": len(done),
        "seeds": [row["values"][seed] for row in done if seed in row["values"]],
        "mean": mean,
        "low": low,
        "high": high,
        "parameters": statistics.fmean(row["parameters"] for row in done) if done else None,
        "seconds": statistics.fmean(row["seconds"] for row in done) if done else None,
    }


def _best(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The lowest mean loss of those that most seeds are done of: a mean over fewer is another mean."""
    measured = [one for one in found if "loss" in one["mean"]]
    most = max((one["done"] for one in measured), default=0)
    complete = [one for one in measured if one["done"] == most]
    return min(complete, key=lambda one: one["mean"]["loss"], default=None) if len(found) > 1 else None


def _difference(rows: Sequence[Row], others: Sequence[Row], seed: str) -> dict[str, Any] | None:
    """By how much the loss is higher than that of others, over the seeds that both have."""

    def by_seed(several: Sequence[Row]) -> dict[Any, float]:
        return {
            row["values"].get(seed): row["measured"]["loss"] for row in several if "loss" in row.get("measured", {})
        }

    first, second = by_seed(rows), by_seed(others)
    differences = [first[key] - second[key] for key in first if key in second]
    if not differences:
        return None
    low, high = interval(differences)
    return {"loss": statistics.fmean(differences), "low": low, "high": high, "seeds": len(differences)}


def best_run(rows: Sequence[Row], combinations: Sequence[Mapping[str, Any]]) -> Row | None:
    """Of the best combination the run with the lowest loss; of a sweep of seeds alone, of them all."""
    best = next((one for one in combinations if one["best"]), combinations[0] if len(combinations) == 1 else None)
    names = best["runs"] if best else ()
    measured = [row for row in rows if row["run"] in names and "loss" in row.get("measured", {})]
    return min(measured, key=lambda row: row["measured"]["loss"], default=None)


# -- intervals -------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of independent values, by Student's t; (None, None) for fewer than two."""
    if len(values) < 2:
        return None, None
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """The t that Student's distribution stays within, on both sides, in 95 % of cases, by bisection.

    The distribution for whole degrees of freedom: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and
    26.7.4.
    """
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The chance that |T| stays below t."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = (math.cos(angle) if odd else 1.0) if freedom > 1 else 0.0
    for number in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (number - 1) / number
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


# -- what compares ---------------------------------------------------------------------------------------------------


def why_not_compared(judged: Iterable[tuple[Row, Mapping[str, Any]]], seed: str) -> list[str]:
    """What keeps the losses of runs from being compared; empty where nothing does.

    Args:
        judged: runs that are done, each with what its loss is measured with: a value for each word that says what.
        seed: the key that runs may differ by: of one seed all must be judged alike.
    """
    by_seed: dict[Any, list[tuple[Row, Mapping[str, Any]]]] = {}
    for row, judge in judged:
        by_seed.setdefault(row["values"].get(seed), []).append((row, judge))
    differing: dict[str, tuple[str, str]] = {}
    for (first, judge), *others in by_seed.values():
        for row, other in others:
            for word in judge:
                if judge[word] != other.get(word):
                    differing.setdefault(word, (first["run"], row["run"]))
    return [f"{one} and {other} are measured with different {word}" for word, (one, other) in differing.items()]


# -- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write sweep.json."""
    write_json(folder / RECORD, record)


def write_table(folder: Path, record: Mapping[str, Any]) -> None:
    """Write sweep.csv."""
    write_text(folder / TABLE, _csv(record["runs"], list(record["keys"])))


def _csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """A line for each run; columns that no run has are left out."""
    told = [measure.key for measure in MEASURES if any(measure.key in row.get("measured", {}) for row in rows)]
    used = [key for key in (*OF_SUMMARY, "exit_code", "error") if any(key in row for row in rows)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *keys, "state", *told, *used])
    for row in rows:
        values = [_cell(row["values"][key]) for key in keys]
        measured = [row.get("measured", {}).get(key) for key in told]
        writer.writerow([row["run"], *values, row["state"], *measured, *(row.get(key) for key in used)])
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A value as the table holds it; lists and null as JSON."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value, default=str)


def is_ours(folder: Path) -> bool:
    """Whether a sweep of dynlora went into this folder."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"dynlora_version", "runs", "keys"} <= found.keys()
