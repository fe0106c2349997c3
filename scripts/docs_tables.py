"""Tables of docs/performance.md and docs/benchmarks.md, from those of scripts/bench; of docs/migrate/, from the importers;
and of docs/recipes.md, the recipes for named models, from their headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import yaml

from dynlora_cli import plugins
from dynlora_cli.config import foreign_names

BENCH = Path(__file__).parent / "bench"
ROOT = Path(__file__).parent.parent

# Columns of speed.md that a user asks for, and what they are called in the documentation.
SPEED = {
    "shape": "model",
    "tokens": "tokens a step",
    "rank": "rank",
    "ours / floor": "step / frozen model's",
    "recorded": "with CUDA graphs",
    "PEFT LoRA / ours": "PEFT's LoRA / ours",
    "PEFT DoRA / ours": "PEFT's DoRA / ours",
    "peak, ours / PEFT": "peak memory, ours / PEFT's",
}
EQUAL = {
    "LoRA, at": "LoRA, stock PEFT",
    "DoRA, ours of its size, at": "DoRA, where dynlora has as many parameters",
    "components removed at random, at": "the same run, components removed at random",
    "the ranks found, shuffled, at": "its own ranks, shuffled over the layers",
    "LoRA of 4x, then compressed by PEFT, at": "LoRA of four times the size, cut afterwards by PEFT",
}
LARGER = {"LoRA of twice the size, at": "LoRA of twice the size"}
RANKS = (1, 2, 4)
# Methods of updates/updates.md, and what they are called in the documentation.
UPDATES = {
    "sequential": "going on with `adapter.from`",
    "sequential, replay 5 %": "the same, `replay` with a share of 5 %",
    "sequential, replay 20 %": "the same, `replay` with a share of 20 %",
    "growth, tune": "new components beside the old, `old: tune`",
    "growth, freeze": "new components beside the old, `old: freeze`",
    "O-LoRA": "`old: freeze`, `orthogonality: 0.5` (O-LoRA)",
    "growth, freeze, replay 5 %, half rate": "`old: freeze`, `replay` with a share of 5 %, half the rate",
    "growth, freeze, replay 20 %, half rate": "`old: freeze`, `replay` with a share of 20 %, half the rate",
    "an adapter for each": "an adapter for each update, the right one chosen",
    "joint": "all rows at once, nothing comes later",
}


def speed() -> str:
    """The first table of each machine."""
    page = (BENCH / "speed" / "speed.md").read_text(encoding="utf-8")
    parts = []
    for machine, body in re.findall(r"^(\S[^|\n]*):\n\n((?:\|.*\n)+)", page, flags=re.MULTILINE):
        rows = rows_of(body)
        shown = [column for column in SPEED if any(row[column] for row in rows)]
        name = "2 cores of an x86-64 CPU" if machine == "x86_64" else machine
        values = ([row[key] for key in shown] for row in rows)
        parts.append(f"### {name}\n\n" + table([SPEED[key] for key in shown], values))
    return "\n".join(parts)


def memory() -> str:
    """The table of memory.md; its head has two columns of one name."""
    page = (BENCH / "speed" / "memory.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^\|.*\n", page, flags=re.MULTILINE))
    return lines.replace("| shape | base | optimizer |", "| model | base in | optimizer |")


def against(names: dict[str, str]) -> str:
    """Ours against others on the six language tasks, one column for each rank."""
    page = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    section = page.split("## Ours against one other at a time")[1].split("\n## ")[0]
    rows = {row["ours against"]: row["language models alone"] for row in rows_of(section[section.index("|") :])}
    lines = ([shown, *(rows.get(f"{name} {rank}", "") for rank in RANKS)] for name, shown in names.items())
    return table(["against", *(f"rank {rank}" for rank in RANKS)], lines)


def afterwards() -> str:
    """Pruning after training, on rows like those of training: PEFT's loss, and our difference to it."""
    page = (BENCH / "posthoc.md").read_text(encoding="utf-8")
    losses, differences = (rows_of(body) for body in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)[-2:])
    lines = (
        [loss["parameters left"], three(loss["PEFT"]), three(row["magnitude"]), three(row["activation"])]
        for loss, row in zip(losses, differences, strict=True)
    )
    return table(["parameters left", "loss with PEFT", "`magnitude`, no data", "`activation`, 100 rows"], lines)


def updates() -> str:
    """What is forgotten over five updates, by method."""
    page = (BENCH / "updates" / "updates.md").read_text(encoding="utf-8")
    section = page.split("## Five domains")[1].split("\n\n")
    rows = {row["method"]: row for row in rows_of(next(part for part in section if part.startswith("|")))}
    lines = (
        [shown, rows[name]["average"], rows[name]["forgetting"], rows[name]["runs"]] for name, shown in UPDATES.items()
    )
    return table(["method", "loss in the end", "forgotten", "seeds"], lines)


def out_of_the_box() -> str:
    """dynlora with nothing set and what other tools ship, against the best of a sweep, on a real model."""
    page = (BENCH / "REAL.md").read_text(encoding="utf-8")
    section = page.split("## Against the best of a sweep")[1].split("\n## ")[0]
    rows = rows_of(section)
    unfinished = re.search(r"^The sweep is not finished.*\n", section, flags=re.MULTILINE)
    shown = table(list(rows[0]), (list(row.values()) for row in rows)) if rows else ""
    return shown + (f"\n{unfinished[0]}" if unfinished else "")


def three(text: str) -> str:
    """Every number of a text with three digits behind the point, its sign kept."""
    return re.sub(
        r"[+-]?\d+\.\d+", lambda match: format(float(match[0]), "+.3f" if match[0][0] in "+-" else ".3f"), text
    )


def keys_of(importer: str) -> str:
    """What becomes of a tool's keys: its importer's own lines, and those of the table of all tools that are its."""
    name = plugins.declared("importers", importer, "NAME")
    known = plugins.declared("importers", importer, "DEFAULTS")
    shared = {key: alias for key, alias in foreign_names.KEYS.items() if alias.tool == name or key in known}
    lines = []
    for key, alias in sorted((shared | foreign_names.keys_of(importer)).items(), key=lambda one: one[0].lower()):
        here, _, value = alias.here.partition(": ")
        ours = f"`{here}`" + (f", {value}" if value else "") if here else "none" if alias.lost else "not needed"
        remark = re.sub(r"`(\w+(?:\.\w+)?: [^`]+)`", r"\1", alias.remark)
        lines.append([f"`{key}`", ours, cell(remark)])
    return table(["key", "here", ""], lines)


def named() -> str:
    """Every recipe for a model by its name on the hub: those in recipes/untested, and those that were run."""
    rows = []
    for path in sorted([*(ROOT / "recipes").glob("smollm2-*.yaml"), *(ROOT / "recipes" / "untested").glob("*.yaml")]):
        text = path.read_text(encoding="utf-8")
        model = yaml.safe_load(text)["model"]
        options = {"name_or_path": model} if isinstance(model, str) else model
        header = dict(re.findall(r"(?m)^# (\w+): *(.*)", text))
        kind = "QLoRA" if options.get("load_in_4bit") else "LoRA"
        kind += {"sequence-classification": ", classes", "embedding": ", vectors"}.get(options.get("task", ""), "")
        needs = re.sub(r" by --dry-run.*", "", header["Hardware"])
        run = "no" if "untested" in path.parts else "yes"
        rows.append([f"`{options['name_or_path']}`", f"`{path.relative_to(ROOT)}`", kind, needs, run])
    return table(["model", "recipe", "kind", "needs", "run with its weights"], sorted(rows))


BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("performance.md", "speed"): speed,
    ("performance.md", "memory"): memory,
    ("benchmarks.md", "equal"): lambda: against(EQUAL),
    ("benchmarks.md", "larger"): lambda: against(LARGER),
    ("benchmarks.md", "box"): out_of_the_box,
    ("benchmarks.md", "afterwards"): afterwards,
    ("benchmarks.md", "updates"): updates,
    **{
        (f"migrate/{name}.md", "keys"): partial(keys_of, name)
        for name in ("axolotl", "llama-factory", "trl", "torchtune", "ms-swift", "unsloth")
    },
    ("recipes.md", "named"): named,
}


def rows_of(body: str) -> list[dict[str, str]]:
    """The rows of a table in Markdown, by the names of its columns."""
    lines = (line for line in body.splitlines() if line.startswith("|"))
    head, _, *rows = [[entry.strip() for entry in line.strip("|\n").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def cell(text: str) -> str:
    """A text that may stand in a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
