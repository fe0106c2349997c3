"""cut.md and cut.svg from cut.jsonl."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import itertools

from quality_tables import draw

Result = dict[str, Any]
AT_SIZE = {
    "energy": "energy share of each layer (PEFT, loraspectra, kohya, Gradience)",
    "global_energy": "σ² per parameter over all layers",
    "magnitude": "dynlora magnitude",
    "activation": "dynlora activation",
    "fisher": "dynlora fisher",
}
TITLES = {
    "energy": "PEFT, loraspectra `--energy`", "mp": "loraspectra `--policy mp`", "gradience_layer": "Gradience, each layer",
    "gradience_median": "Gradience, global median", "gradience_p90": "Gradience, global p90",
    "effective": "Gradience, effective rank", "stable": "Gradience, stable rank",
    "hard_threshold": "Gradience, optimal hard threshold", "kohya_ratio": "kohya sv_ratio",
    "kohya_cumulative": "kohya sv_cumulative", "scaled": "no cut: the update times",
}  # fmt: skip
CURVE = "activation"  # beside which the other rules' sizes are put


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _grid(head: list[str], rows: list[list[object]]) -> str:
    return "\n".join([_line(*head), _line(*["---"] * len(head)), *(_line(*row) for row in rows)])


def adapters(results: list[Result]) -> list[str]:
    return [r["adapter"] for r in results if r["method"] == "uncut"]


def of(results: list[Result], adapter: str) -> dict[tuple[str, Any], Result]:
    return {(r["method"], r["parameter"]): r for r in results if r["adapter"] == adapter}


def curve_at(lines: dict[tuple[str, Any], Result], parameters: int, key: str) -> float | None:
    """What our curve has at a size, on a straight line over the logarithm between its measured sizes."""
    points = [r for (method, _), r in lines.items() if method in (CURVE, "uncut", f"{CURVE} 0.25")]
    points = sorted(points, key=lambda r: r["parameters"])
    for low, high in itertools.pairwise(points):
        if low["parameters"] <= parameters <= high["parameters"]:
            width = math.log(high["parameters"] / low["parameters"])
            share = math.log(parameters / low["parameters"]) / width if width else 0.0
            return float(low[key] + share * (high[key] - low[key]))
    return None


def _at_size(lines: dict[tuple[str, Any], Result], base: Result, uncut: Result) -> str:
    rows: list[list[object]] = []
    for share in sorted({p for m, p in lines if m == CURVE}, reverse=True):
        found = {method: lines[method, share] for method in AT_SIZE if (method, share) in lines}
        size = found["energy"]["parameters"]
        for key, label in (("loss", "loss"), ("general", "forgotten")):
            start = base["general"] if key == "general" else 0.0
            values = [f"{found[m][key] - start:.4f}" if m in found else "" for m in AT_SIZE]
            where = [share, f"{100 * size / uncut['parameters']:.1f} %"] if key == "loss" else ["", ""]
            rows.append([*where, label, *values])
    return _grid(["energy share", "size", "", *AT_SIZE.values()], rows)


def _others(lines: dict[tuple[str, Any], Result], base: Result, uncut: Result) -> str:
    rows: list[list[object]] = []
    for (method, parameter), r in sorted(lines.items(), key=lambda item: -item[1]["parameters"]):
        if method not in TITLES or (method == "energy" and (CURVE, parameter) in lines):
            continue
        ours = curve_at(lines, r["parameters"], "loss")
        name = TITLES[method] + (f" {parameter:g}" if parameter is not None else "")
        beside = "" if ours is None else f"{r['loss'] - ours:+.4f}"
        size = f"{100 * r['parameters'] / uncut['parameters']:.1f} %"
        rows.append([name, size, f"{r['loss']:.4f}", beside, f"{r['general'] - base['general']:+.4f}"])
    return _grid(["rule", "size", "loss", "minus ours at that size", "forgotten"], rows)


def _healed(lines: dict[tuple[str, Any], Result], base: Result, uncut: Result, small: list[Result]) -> str:
    """Each healed adapter below the cut that it began as, and what was trained at a small size from the start."""
    rows: list[list[object]] = []
    told: set[tuple[str, Any]] = set()

    def add(name: str, r: Result) -> None:
        size = f"{100 * r['parameters'] / uncut['parameters']:.1f} %"
        cpu = r["cpu"] + r.get("healing", 0)
        rows.append([name, size, f"{r['loss']:.4f}", f"{r['general'] - base['general']:+.4f}", f"{cpu:.0f}"])

    for (method, rate), r in sorted(lines.items(), key=lambda item: -item[1]["parameters"]):
        policy, _, rest = method.partition(" ")
        if "healed" not in rest:
            continue
        for (other, parameter), cut in lines.items():
            same = other.partition(" ")[0] == policy and "healed" not in other
            near = abs(cut["parameters"] - r["parameters"]) < 0.01 * r["parameters"]
            if same and near and (other, parameter) not in told:
                told.add((other, parameter))
                add(f"{policy}, as cut", cut)
        add(f"{policy}, healed {rest.split('healed')[1].strip()} steps at {rate:g}", r)
    for r in small:
        add(f"trained at this size from the start ({r['adapter']})", r)
    return _grid(["healing", "size", "loss", "forgotten", "CPU seconds"], rows)


def _seconds(results: list[Result]) -> str:
    parts = []
    for method in ("convert_to_lora", "energy", "magnitude", "activation", "fisher"):
        seconds = [r["cpu"] for r in results if r["method"] == method]
        if seconds:
            parts.append(f"{method} {sum(seconds) / len(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})")
    return "; ".join(parts)


def table(results: list[Result]) -> str:
    parts = [
        """# Cutting adapters of stock PEFT on SmolLM2-135M-Instruct: `dynlora prune` and the rules of others

Made by `cut.py table` from cut.jsonl; do not edit. Adapters: alpha 2r, all linear layers, one epoch. Loss: nats per token
of the answers, rows of the test part. Forgotten: the rise of the loss on general text (wikitext2) above the base's. Cuts at
the same energy share have the same number of parameters. All are judged by stock PEFT. Formulas: cut_rules.py.
"""
    ]
    for adapter in adapters(results):
        lines, task = of(results, adapter), adapter.partition("-")[0]
        bases = of(results, f"{task}-base")
        base, uncut = bases["base", None], lines["uncut", None]
        small = [r for r in results if r["method"] == "trained" and r["adapter"].startswith(f"{task}-")]
        parts.append(
            f"## {adapter}\n\nBase {base['loss']:.4f}; uncut {uncut['loss']:.4f} at {uncut['parameters']:,} parameters, "
            f"forgotten {uncut['general'] - base['general']:+.4f}.\n\n{_at_size(lines, base, uncut)}\n"
        )
        if any(method in TITLES and method != "energy" for method, _ in lines):
            parts.append(
                "Rules that choose the size themselves; `ours` is `activation` between its measured sizes:\n\n"
                + _others(lines, base, uncut)
                + "\n"
            )
        if small or any(" " in method for method, _ in lines):
            parts.append(_healed(lines, base, uncut, small) + "\n")
    parts.append(f"CPU seconds of one cut, mean (min to max): {_seconds(results)}.\n")
    return "\n".join(parts)


def picture(results: list[Result]) -> str:
    """Loss over size, both relative to the uncut adapter, in the mean over adapters; empty before there is a line."""
    lines: dict[str, list[tuple[float, float]]] = {}
    names = adapters(results)
    found = {name: of(results, name) for name in names}
    shown = {"energy": "PEFT's rule", "magnitude": "magnitude", "activation": "activation"}
    each = [{p for m, p in found[n] if m == method} for n in names for method in shown]
    shares = set.intersection(*each) if each else set()
    for method, title in shown.items():
        points = [(1.0, 100.0)]
        for share in shares:
            pairs = [(found[n][method, share], found[n]["uncut", None]) for n in names]
            size = sum(a["parameters"] / b["parameters"] for a, b in pairs) / len(pairs)
            points.append((size, 100 * sum(a["loss"] / b["loss"] for a, b in pairs) / len(pairs)))
        lines[title] = points
    if max(map(len, lines.values())) < 3:
        return ""
    return draw(lines, "parameters, relative to the uncut adapter", "held-out loss, % of the uncut adapter")
