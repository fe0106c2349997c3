"""speed.md from the lines of speed.jsonl; see speed.py."""

from __future__ import annotations

from itertools import groupby
from statistics import median
from typing import Any

SHAPE = ("model", "rank", "tokens", "base", "compiled")
HEADER = """# Speed: a step against the frozen model's own cost

Made by `scripts/bench/speed/speed.py` from speed.jsonl; how: its first lines. Median (min to max) over rounds.
"""
SCALING = """Time of a step against layers, tokens and rank (512 wide, the others fixed; ms, median): the frozen model alone (its lean
floor), and what the components add, in all and for each of what is varied.
"""
Record = dict[str, Any]


def table(records: list[Record]) -> str:
    """The newest run of each shape on each machine, in brief, what it grows with, and in full."""
    records = [{"compiled": False} | record for record in records]
    newest = {(*machine(record), *(record[key] for key in SHAPE)): record for record in records}
    shown = sorted(newest.values(), key=lambda r: (*machine(r), *(r[key] for key in ("base", "compiled")), sizes(r)))
    machines = [list(group) for _, group in groupby(shown, machine)]
    return "\n".join([HEADER, *map(brief, machines), *map(scaling, machines), *map(details, shown)])


def machine(record: Record) -> tuple[str, int]:
    """Threads count where they compute."""
    return record["device"], record["threads"] if record["type"] == "float32" else 0


def sizes(record: Record) -> tuple[str, int, int]:
    return record["model"], record["tokens"], record["rank"]


def brief(records: list[Record]) -> str:
    """One line for each shape, of one machine."""
    rivals = ("PEFT LoRA", "PEFT AdaLoRA", "PEFT DoRA")
    ours = ("dynlora", "dynlora, recorded", "dynlora, half left", "dynlora, a quarter left")
    head = ["shape", "tokens", "rank", "threads", "ours / floor", "recorded", "half left", "a quarter left"]
    head += [*(f"{name} / ours" for name in rivals), "peak, ours / PEFT"]
    lines = [f"{records[0]['device']}:\n", *heading(head)]
    for record in records:
        seconds, peak = record["seconds"], record["peak_bytes"]
        cells = [
            ", ".join([record["model"], *["nf4"] * (record["base"] == "nf4"), *["compiled"] * record["compiled"]]),
            f"{record['tokens']}",
            f"{record['rank']}",
            f"{record['threads']}",
        ]
        cells += [ratio(seconds[name], seconds["floor"]) if name in seconds else "" for name in ours]
        cells += [ratio(seconds[name], seconds["dynlora"]) if name in seconds else "" for name in rivals]
        cells += [f"{peak['dynlora'] / peak['PEFT LoRA']:.2f}" if "PEFT LoRA" in peak else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scaling(records: list[Record]) -> str:
    """What a step costs more with more layers, tokens or rank, of one machine; nothing where nothing was varied."""
    found = {}
    for record in records:
        hidden, _, layers = record["model"].partition("x")
        if hidden == "512" and record["base"] == "plain" and {"lean floor", "dynlora"} <= record["seconds"].keys():
            found[int(layers), record["tokens"], record["rank"]] = record["seconds"]
    lines = []
    for place, name in enumerate(("layers", "tokens", "rank") if found else ()):
        fixed = {key[:place] + key[place + 1 :] for key in found}
        line = max(([key for key in found if key[:place] + key[place + 1 :] == rest] for rest in fixed), key=len)
        for key in sorted(line) if len(line) > 2 else ():
            floor, ours = (median(found[key][method]) * 1e3 for method in ("lean floor", "dynlora"))
            cells = [name, *map(str, key), f"{floor:.0f}", f"{ours - floor:.0f}", f"{(ours - floor) / key[place]:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    head = ["varied", "layers", "tokens", "rank", "frozen", "components add", "for each"]
    return "\n".join([SCALING, *heading(head), *lines]) + "\n" if lines else ""


def details(record: Record) -> str:
    """All methods on one shape."""
    floors, plain = record["seconds"]["floor"], record["seconds"].get("PEFT LoRA")
    lines = [
        f"{record['model']}, rank {record['rank']}, {record['tokens']} tokens; base {record['base']}"
        f"{', compiled' if record['compiled'] else ''}, "
        f"{record['type']}, {record['device']}, {record['threads']} threads, torch {record['torch']}, "
        f"peft {record['peft']}, {record['date']}"
        + (f"; products: {record['product_flops_per_second'] / 1e12:.3g} TFLOP/s at most" if "flops" in record else "")
        + "\n"
    ]
    lines += heading(
        ["", "step / floor", "PEFT LoRA / step", "tokens/s", "frozen products, share of the peak", "peak, MiB"]
    )
    for name, times in record["seconds"].items():
        seconds = median(times)
        known = "flops" in record and name != "full fine-tuning"  # which has more of them
        share = record["flops"] / seconds / record["product_flops_per_second"] if known else None
        cells = [name, ratio(times, floors), ratio(plain, times) if plain else "", f"{record['tokens'] / seconds:,.0f}"]
        cells += [f"{share:.0%}" if share else "", f"{record['peak_bytes'][name] / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def heading(names: list[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Of times of the same rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
