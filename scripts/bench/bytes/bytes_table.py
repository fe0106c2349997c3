"""by_bytes.md, from the lines of by_bytes.jsonl."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from statistics import mean
from typing import Any

Line = dict[str, Any]
Curve = list[tuple[int, float]]  # bytes and loss
NAMES = {
    "float32": "float32", "bf16": "bf16", "fp8": "fp8", "nf4": "NF4", "int4": "4 bits", "int3": "3 bits", "int2": "2 bits",
    "energy3": "3 bits, by squared error", "mixed2.5": "2.5 bits, by energy", "mixed3": "3 bits, by energy",
    "mixed4": "4 bits, by energy",
}  # fmt: skip
PACKED = ("nf4", "int4", "int3", "mixed2.5")


def page(lines: list[Line]) -> str:
    """The page: losses of every format, and the three comparisons."""
    forms = [line for line in lines if line["what"] == "form"]
    cells: dict[tuple[str, str, int], dict[str, Line]] = defaultdict(dict)
    for line in forms:
        if line["seed"] == 0:
            cells[line["task"], line["method"], line["budget"]][line["form"]] = line
    parts = [
        "# Loss against bytes",
        _head(lines, forms),
        *_rounding(cells),
        *_tasks(cells),
        *_comparisons(cells),
        *_real(lines),
    ]
    return "\n\n".join(parts) + "\n"


def _head(lines: list[Line], forms: list[Line]) -> str:
    runs = sum(line["what"] == "run" for line in lines)
    return (
        f"Made by `scripts/bench/bytes/by_bytes.py table` from by_bytes.jsonl: {runs} runs, {len(forms)} measurements. LoRA is "
        "stock PEFT at tuned rates; both go through the same rounding. Losses are of the `test` part, seed 0. Bytes are "
        "those of adapter_model.safetensors, or of both files of a packed adapter."
    )


def _rounding(cells: dict[Any, dict[str, Line]]) -> Iterable[str]:
    """What each format costs, on the same adapters."""
    yield "## What rounding costs"
    rows = ["| format | LoRA | dynlora | largest | adapters | bytes, to float32 |", "|---|---|---|---|---|---|"]
    for form, name in NAMES.items():
        found = [(key[1], of) for key, of in cells.items() if form in of and "float32" in of]
        if form == "float32" or not found:
            continue
        rise = [
            (m, of[form]["test"] / of["float32"]["test"] - 1, of[form]["bytes"] / of["float32"]["bytes"])
            for m, of in found
        ]
        means = [[r for m, r, _ in rise if m == method] for method in ("lora", "dynlora")]
        shown = [f"{mean(each):+.2%}" if each else "" for each in means]
        worst, size = max(r for _, r, _ in rise), mean(b for *_, b in rise)
        rows.append(f"| {name} | {shown[0]} | {shown[1]} | {worst:+.2%} | {len(rise)} | {size:.2f} |")
    yield "\n".join(rows)


def _tasks(cells: dict[Any, dict[str, Line]]) -> Iterable[str]:
    for task in dict.fromkeys(task for task, *_ in cells):
        forms = [form for form in NAMES if any(form in of for key, of in cells.items() if key[0] == task)]
        rows = [f"## {task}", "", "| method, rank | " + " | ".join(NAMES[form] for form in forms) + " |"]
        rows.append("|---" * (len(forms) + 1) + "|")
        for (of_task, method, rank), of in sorted(cells.items(), key=lambda item: (item[0][2], item[0][1])):
            if of_task == task:
                shown = [f"{of[f]['test']:.4f} ({of[f]['bytes'] / 1000:.1f} kB)" if f in of else "" for f in forms]
                rows.append(f"| {'LoRA' if method == 'lora' else method}, {rank} | " + " | ".join(shown) + " |")
        yield "\n".join(rows)


def curve(cells: dict[Any, dict[str, Line]], task: str, method: str, forms: Iterable[str]) -> Curve:
    """The lowest loss at no more bytes, over ranks and formats; sizes rise and losses fall."""
    points = sorted(
        (of[form]["bytes"], of[form]["test"])
        for (of_task, of_method, _), of in cells.items()
        for form in forms
        if (of_task, of_method) == (task, method) and form in of
    )
    best: Curve = []
    for size, loss in points:
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    return best


def at(points: Curve, size: int) -> float | None:
    """The loss at a size, between two points of a curve on logarithmic bytes; None outside."""
    for (low, high_loss), (high, low_loss) in pairwise(points):
        if low <= size <= high:
            share = math.log(size / low) / math.log(high / low)
            return high_loss + share * (low_loss - high_loss)
    return None


def _comparisons(cells: dict[Any, dict[str, Line]]) -> Iterable[str]:
    """dynlora's best format against LoRA's files, at the same bytes."""
    yield "## At the same bytes"
    yield (
        "The loss of dynlora in the formats of the row against that of LoRA in those of the column, where both have files of "
        "one size (interpolated between ranks on logarithmic bytes; every size of a LoRA within dynlora's range is a pair)."
    )
    ours = {"fp8": ("fp8",), "fp8 or packed": ("fp8", *PACKED)}
    theirs = {
        "PEFT's float32 file": ("float32",), "LoRA in bf16": ("bf16",), "LoRA in the same formats": None,
    }  # fmt: skip
    rows = ["| dynlora in | " + " | ".join(theirs) + " |", "|---" * (len(theirs) + 1) + "|"]
    for name, forms in ours.items():
        cols = []
        for other in theirs.values():
            gains = []
            for task in dict.fromkeys(task for task, *_ in cells):
                mine = curve(cells, task, "dynlora", forms)
                against = curve(cells, task, "lora", other or forms)
                gains += [found / loss - 1 for size, loss in against if (found := at(mine, size)) is not None]
            cols.append(f"{mean(gains):+.1%} ({len(gains)} pairs)" if gains else "no size in common")
        rows.append(f"| {name} | " + " | ".join(cols) + " |")
    yield "\n".join(rows)


def _real(lines: list[Line]) -> Iterable[str]:
    """Adapters of a real model."""
    found = [line for line in lines if line["what"] == "real"]
    if not found:
        return
    yield "## On SmolLM2-135M-Instruct"
    yield f"Adapters of others, loss on {found[0]['rows']} rows of the `test` part of e2e; real_forms.py."
    rows = ["| adapter | format | bytes | change of the update | loss |", "|---|---|---|---|---|"]
    rows += [
        f"| {line['adapter']} | {NAMES[line['form']]} | {line['bytes']:,} | {line['changed']:.1%} | {line['test']:.4f} |"
        for line in found
    ]
    yield "\n".join(rows)
