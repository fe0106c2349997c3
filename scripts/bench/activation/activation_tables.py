"""activation.jsonl to activation.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

RESULTS = Path(__file__).with_name("activation.jsonl")
TABLE = RESULTS.with_suffix(".md")
RATE = 0.01

Record = dict[str, Any]


def read() -> list[Record]:
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def write_table() -> None:
    records = read()
    seeds = sorted({record["seed"] for record in records})
    parts = [
        "# Activation",
        f"Written by activation.py. Seeds: {', '.join(map(str, seeds))}; means over them, of test requests.",
        "## Methods",
        "Loss in nats per token. Gain: share of what the own update gains on its requests. False: share of unrelated "
        "requests with an update on, of sources that calibrated and of sources that were kept back. Methods that choose "
        f"do so at a wanted rate of {RATE:.0%}.",
        methods(records),
        "## Gain against false activations",
        curves(records),
        "## How good the confidence is",
        confidence(records),
        "## Only some components of an update",
        by_update(records, "components"),
        "## The first components of an update",
        "Of each layer. `elastic` is trained with `rank.elastic: true`, `plain` without.",
        by_update(records, "prefixes"),
    ]
    TABLE.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(values: Sequence[float]) -> str:
    spread = f" ± {100 * pstdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread} %"


def loss(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}"


def alike(records: Sequence[Record], **wanted: Any) -> list[Record]:
    return [record for record in records if all(record.get(key) == value for key, value in wanted.items())]


def kinds(records: Sequence[Record]) -> list[tuple[str, str | None, str | None]]:
    """Methods that are in the main table, with encoder and keys, in the order of the file."""
    shown = [r for r in records if r["job"] not in ("components", "prefixes") and r.get("rate", RATE) == RATE]
    return list(dict.fromkeys((r["method"], r.get("encoder"), r.get("keys")) for r in shown))


def methods(records: Sequence[Record]) -> str:
    rows = []
    for method, encoder, keys in kinds(records):
        own = [r for r in alike(records, method=method, encoder=encoder, keys=keys) if r.get("rate", RATE) == RATE]
        column = {key: [r[key] for r in own] for key in own[0] if isinstance(own[0][key], float)}
        how = f"{method}: {encoder}, {keys}" if encoder else method
        losses = [loss(column[key]) for key in ("own", "unrelated", "stories")]
        shares = [percent(column[key]) for key in ("utility", "active", "false", "false, kept back")]
        rows.append([how, losses[0], *shares, *losses[1:]])
    heads = ["method", "own requests", "gain", "active on own", "false", "false, kept back", "unrelated", "stories"]
    return table(heads, rows)


def curves(records: Sequence[Record]) -> str:
    chosen = [r for r in records if "rate" in r]
    rates = sorted({r["rate"] for r in chosen})
    rows = []
    for method, encoder, keys in dict.fromkeys((r["method"], r["encoder"], r["keys"]) for r in chosen):
        cells = []
        for rate in rates:
            own = alike(chosen, method=method, encoder=encoder, keys=keys, rate=rate)
            cells.append(f"{100 * mean(r['utility'] for r in own):.1f} at {100 * mean(r['false'] for r in own):.1f}")
        rows.append([f"{method}: {encoder}, {keys}", *cells])
    heads = ["gain at measured false activations, %", *(f"wanted {100 * rate:g} %" for rate in rates)]
    return table(heads, rows)


def confidence(records: Sequence[Record]) -> str:
    rows = []
    for encoder, keys in dict.fromkeys((r["encoder"], r["keys"]) for r in records if "brier" in r):
        own = alike(records, method="calibrated", encoder=encoder, keys=keys, rate=RATE)
        numbers = (mean(r[key] for r in own) for key in ("calibration_error", "brier", "brier_of_constant"))
        rows.append(
            [f"{encoder}, {keys}", *(f"{number:.3f}" for number in numbers), f"{mean(r['pairs'] for r in own):,.0f}"]
        )
    return table(["keys", "calibration error", "Brier", "Brier of one answer for all", "pairs"], rows)


def by_update(records: Sequence[Record], job: str) -> str:
    """Losses of one job, a line for each update and one for their mean."""
    found = alike(records, job=job)
    if not found:
        return "Not measured."
    ways = [key for key in found[0] if key not in ("seed", "job", "method", "update")]
    names = dict.fromkeys(r["update"] for r in found)
    rows = [[name, *(loss([r[way] for r in alike(found, update=name)]) for way in ways)] for name in names]
    rows.append(["mean", *(loss([r[way] for r in found]) for way in ways)])
    return table(["update", *ways], rows)
