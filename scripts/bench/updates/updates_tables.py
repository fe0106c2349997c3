"""updates.md, from the lines of updates.jsonl.

R[i][j] is what was measured on task j after update i: the loss (nats per target, lower is better), or the share of rows
whose whole answer is right. With T updates, better(x, y) = by how much x is better than y:

    average     mean over j of R[T][j]
    learned     mean over j of R[j][j], each task right after its own update
    forgetting  mean over j < T of max over j <= i < T of better(R[i][j], R[T][j]): what was there once and is lost
    backward    mean over j < T of better(R[T][j], R[j][j]): what later updates gave (below 0: took away)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

Record = dict[str, Any]
Matrix = list[dict[str, float]]
LOSS, EXACT = "loss", "exact"
BASE, JOINT = "base", "joint"
SEQUENTIAL, REPLAYED = "sequential", "sequential, replay 5 %"


@dataclass(frozen=True)
class Numbers:
    """What one run through a stream comes to; None where the method has no such number."""

    average: float
    learned: float | None
    forgetting: float | None
    backward: float | None
    general: float


def numbers(matrix: Matrix, tasks: Sequence[str], measure: str) -> Numbers | None:
    """See above; None while the stream is not through.

    Args:
        matrix: by update: task to value; an update that was measured on its own task alone has an adapter of its own.
        tasks: in the order in which they were learned.
    """
    general = mean(value for row in matrix for task, value in row.items() if task not in tasks)
    if len(matrix) < len(tasks):
        return (
            Numbers(mean(matrix[0][task] for task in tasks), None, None, None, general)
            if tasks[-1] in matrix[0]
            else None
        )
    sign = 1 if measure == LOSS else -1
    learned = mean(row[task] for row, task in zip(matrix, tasks, strict=True))
    if tasks[0] not in matrix[-1]:
        return Numbers(learned, learned, 0.0, 0.0, general)
    last, early = matrix[-1], list(enumerate(tasks))[:-1]
    lost = [max(sign * (last[task] - row[task]) for row in matrix[i:-1]) for i, task in early]
    gained = [sign * (matrix[i][task] - last[task]) for i, task in early]
    general = next(value for task, value in last.items() if task not in tasks)
    return Numbers(mean(last[task] for task in tasks), learned, mean(lost), mean(gained), general)


def matrices(lines: Iterable[Record], stream: str, method: str, measure: str) -> dict[tuple[int, int], Matrix]:
    """By order and seed."""
    found: dict[tuple[int, int], dict[int, dict[str, float]]] = {}
    for line in lines:
        if (line.get("part"), line.get("stream"), line.get("method")) == ("stage", stream, method):
            found.setdefault((line["order"], line["seed"]), {})[line["stage"]] = line[measure]
    return {key: [row for _, row in sorted(rows.items())] for key, rows in found.items()}


def results(lines: list[Record], stream: Any, method: str, measure: str) -> dict[tuple[int, int], Numbers]:
    """By order and seed, of what is through."""
    found = {
        key: numbers(matrix, stream.order(key[0]), measure)
        for key, matrix in matrices(lines, stream.name, method, measure).items()
    }
    return {key: value for key, value in found.items() if value}


# -- text ------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def spread(values: Sequence[float | None], form: str = ".3f") -> str:
    """Mean (lowest to highest)."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = format(mean(known), form)
    return text if len(known) == 1 else f"{text} ({format(min(known), form)} to {format(max(known), form)})"


def summary(lines: list[Record], stream: Any, methods: Iterable[str], measure: str) -> str:
    """A line for each method that is through with the stream at least once."""
    rows = []
    for method in methods:
        found = list(results(lines, stream, method, measure).values())
        if not found:
            continue
        sizes = [line["parameters"] for line in lines if _is(line, stream, method)]
        whole = sum(sizes[: len(stream.tasks)]) if method == "an adapter for each" else max(sizes)
        cells = [
            [getattr(one, name) for one in found]
            for name in ("average", "learned", "forgetting", "backward", "general")
        ]
        forms = [".3f", ".3f", "+.3f", "+.3f", ".3f"]
        columns = cells if measure == LOSS else cells[:-1]
        rows.append([method, *map(spread, columns, forms), f"{whole:,}", str(len(found))])
    shown = ["average", "learned", "forgetting", "backward", stream.general][: 5 if measure == LOSS else 4]
    return table(["method", *shown, "parameters", "runs"], rows)


def _is(line: Record, stream: Any, method: str) -> bool:
    return (line.get("part"), line.get("stream"), line.get("method")) == ("stage", stream.name, method)


def targets(lines: list[Record], stream: Any, methods: Iterable[str]) -> str:
    """Against what the issue asks for: paired by order and seed, on losses."""
    sequential, replayed = (results(lines, stream, name, LOSS) for name in (SEQUENTIAL, REPLAYED))
    rows = []
    for method in methods:
        own = results(lines, stream, method, LOSS)
        shares = _paired(
            own, sequential, lambda a, b: 100 * (a.forgetting or 0) / b.forgetting if b.forgetting else None
        )
        less = _paired(own, replayed, lambda a, b: (a.forgetting or 0) - (b.forgetting or 0))
        better = _paired(own, replayed, lambda a, b: a.average - b.average)
        if method not in (BASE, JOINT, SEQUENTIAL) and shares:
            rows.append([method, spread(shares, ".0f") + " %", spread(less, "+.3f"), spread(better, "+.3f")])
    return table(
        ["method", "forgetting, of sequential's", "forgetting against replay", "average loss against replay"], rows
    )


def _paired(
    ours: Mapping[Any, Numbers], theirs: Mapping[Any, Numbers], of: Callable[[Numbers, Numbers], float | None]
) -> list[float]:
    found = [of(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())]
    return [value for value in found if value is not None]


def loss_matrix(lines: list[Record], stream: Any, method: str) -> str:
    """R, mean over seeds, for the first order."""
    order = stream.orders[0]
    tasks = stream.order(order)
    found = matrices(lines, stream.name, method, LOSS).items()
    whole = [matrix for (number, _), matrix in found if number == order and len(matrix) == len(tasks)]
    if not whole:
        return ""
    rows = (
        [f"after {task}", *(f"{mean(m[i][j] for m in whole):.3f}" if j in whole[0][i] else "" for j in tasks)]
        for i, task in enumerate(tasks)
    )
    return f"{method}:\n\n" + table(["", *tasks], rows)


def rates(lines: list[Record]) -> str:
    found = [line for line in lines if line["part"] == "rate"]
    tried = sorted({line["rate"] for line in found})
    families = list(dict.fromkeys(line["family"] for line in found))
    losses = {(line["family"], line["rate"]): next(iter(line["loss"].values())) for line in found}
    rows = [
        [family, *(f"{losses[family, rate]:.3f}" if (family, rate) in losses else "" for rate in tried)]
        for family in families
    ]
    return table(["family", *(f"{rate:.0e}" for rate in tried)], rows)


STATES = {
    "before": "first",
    "with": "first, second",
    "all": "first, second, third",
    "retired": "... less second",
    "healed": "... and healed",
    "never": "first, third",
}


def retirement(lines: list[Record], tasks: Sequence[str]) -> str:
    """What a retired update leaves behind, on the rows of each of the three updates."""
    found = [line for line in lines if line["part"] == "retirement"]
    text = ""
    for number, task in enumerate(tasks):
        rows = []
        for method in dict.fromkeys(line["method"] for line in found):
            own = [line for line in found if line["method"] == method]
            rows.append([method, *(spread([line["loss"][state][task] for line in own]) for state in STATES)])
        title = f"Loss on the rows of the {('first', 'second, which is retired', 'third')[number]} ({task})"
        text += f"{title}:\n\n" + table(["", *STATES.values()], rows) + "\n"
    equal = ", ".join(
        f"{method}: {sum(line['same_to_the_bit'] for line in found if line['method'] == method)} of "
        f"{sum(line['method'] == method for line in found)}"
        for method in dict.fromkeys(line["method"] for line in found)
    )
    head = "## What a retired update leaves behind\n\nThree updates in a chain; the second is taken out with "
    head += "`dynlora prune --born`, healed: `--heal 20` on the rows of the third. "
    head += f"Right after the second update, taking it out gives the logits of the first to the bit: {equal}.\n\n"
    return head + text if found else ""


def section(lines: list[Record], stream: Any, methods: Sequence[str]) -> str:
    title = {
        "domains": "Five domains, one after the other",
        "tasks": "Ten tasks of continual learning",
        "real": "Three domains on SmolLM2-135M-Instruct",
    }[stream.name]
    known = [name for name in (BASE, *methods, JOINT) if results(lines, stream, name, LOSS)]
    if not set(known) - {BASE}:
        return ""
    orders = "; ".join(", ".join(stream.order(number)) for number in stream.orders)
    text = f"## {title}\n\n{'Order' if len(stream.orders) == 1 else 'Orders'}: {orders}. "
    text += f"{stream.steps} steps of {stream.batch} rows an update, at most {stream.max_length} tokens.\n\n"
    text += summary(lines, stream, known, LOSS)
    if stream.name == "tasks":
        text += "\nThe same in shares of right answers:\n\n" + summary(lines, stream, known, EXACT)
    text += "\nAgainst sequential training and against replay, paired by order and seed:\n\n" + targets(
        lines, stream, known
    )
    if stream.name != "tasks":
        text += "\n" + "\n".join(filter(None, (loss_matrix(lines, stream, name) for name in methods)))
    return text + "\n"


def page(lines: list[Record], streams: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    """updates.md"""
    families = "; ".join(f"{name} -> {method.family}" for name, method in methods.items())
    return f"""# Constant updates

Made by `updates.py` from updates.jsonl; do not edit. What the methods are is said there. Held-out loss in nats per
target. **average**: over all tasks at the end. **learned**: of each task right after its own update. **forgetting**: how
much better a task once was than it is at the end, mean over all tasks but the last. **backward**: how much better a task
is at the end than right after its own update. Mean (lowest to highest) of the runs. All methods end with as many
parameters.

{"".join(section(lines, stream, list(methods)) for stream in streams.values())}{retirement(lines, streams["domains"].tasks[:3])}## Learning rates

Loss on the validation rows of law after the first update, seed 0; the lowest is taken for all updates of the family.
{families}.

{rates(lines)}"""
