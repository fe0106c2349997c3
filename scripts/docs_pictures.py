"""The pictures of the documentation as SVG: drawn from a recorded run where they show numbers.

take_run(folder)      what a picture needs of a run folder, as plain data
ranks_svg(run)        components per layer, before and after
schedule_svg(run)     components alive over the steps
terminal_svg(run)     what a terminal shows while a run goes on, and at its end
components_svg()      a weight and the rank-1 components that are added to it
"""

from __future__ import annotations

import io
import json
import re
from html import escape
from pathlib import Path
from typing import Any

from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from dynlora_cli.cli.views.console import Console

INK, PALE, EDGE, BLUE = "#1f2328", "#59636e", "#d1d9e0", (9, 105, 218)
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"

Run = dict[str, Any]
# What a terminal shows of an event.
TOLD = (
    "event", "step", "loss", "learning_rate", "tokens_per_second", "step_seconds", "memory_bytes", "components", "parameters",
    "components_before", "parameters_before", "ranks",
)  # fmt: skip


def take_run(folder: Path) -> Run:
    """Ranks before and after, the prune events and the held-out losses of a run."""
    record = json.loads((folder / "dynlora.json").read_text(encoding="utf-8"))
    lines = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("metrics", "rank_events")
    }
    evals = [line for line in lines["metrics"] if line["event"] == "eval"]
    prunes = [line for line in lines["rank_events"] if line["event"] == "prune"]
    start = record["budget"]["start_components"]
    return {
        "recipe": "recipes/quickstart.yaml",
        "steps": evals[-1]["step"],
        "start": start,
        "end": {name: prunes[-1]["ranks"].get(name, 0) for name in start},
        "start_parameters": record["budget"]["start_parameters"],
        "end_parameters": record["history"][-1][1],
        "events": [[line["step"], line["components"]] for line in prunes],
        "held_out": [[line["step"], round(line["loss"], 4)] for line in evals],
        "told": [
            {key: line[key] for key in TOLD if key in line}
            for line in sorted([*lines["metrics"], *prunes], key=lambda line: line["step"])
            if line["event"] in ("train", "eval", "prune") and line["step"] <= evals[-1]["step"] * 2 // 3
        ],
        "summary": {key: value for key, value in record["summary"].items() if key not in ("next", "notes")},
    }


def ranks_svg(run: Run) -> str:
    """Two rank maps side by side, blocks down and kinds of layers across."""
    before, after = run["start"], run["end"]
    body = [
        grid(24, 78, before, f"at the start: {total(before)} components, {run['start_parameters']:,} parameters"),
        grid(424, 78, after, f"after pruning: {total(after)} components, {run['end_parameters']:,} parameters"),
        text(380, 170, "→", size=30, anchor="middle"),
    ]
    (_, loss_before), (_, loss_after) = run["held_out"][0], run["held_out"][-1]
    foot = (
        f"One run of {run['recipe']}, {run['steps']} steps on one CPU core. "
        f"Held-out loss {loss_before:.2f} before training, {loss_after:.2f} after."
    )
    body.append(text(24, 300, foot, fill=PALE))
    head = text(24, 32, "How many components each layer keeps", size=17, weight=600)
    label = f"Components per layer of a small Llama: {total(before)} at the start, {total(after)} after pruning"
    return svg(800, 320, label, head + "".join(body))


def total(ranks: dict[str, int]) -> int:
    return sum(ranks.values())


def grid(x0: int, y0: int, ranks: dict[str, int], title: str) -> str:
    """One rank map: a square per layer, darker where more components live."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in ranks))
    blocks = list(dict.fromkeys(name.split(".")[2] for name in ranks))
    highest = max(ranks.values())
    parts = [text(x0, y0 - 14, title, fill=PALE)]
    for row, block in enumerate(blocks):
        parts.append(text(x0 + 8, y0 + 26 + row * 28, block, fill=PALE, anchor="middle"))
    for name, rank in ranks.items():
        column, row = kinds.index(name.rpartition(".")[2]), blocks.index(name.split(".")[2])
        x, y, share = x0 + 24 + column * 44, y0 + 8 + row * 28, rank / highest
        fill = "#ffffff" if rank == 0 else f"rgba({BLUE[0]},{BLUE[1]},{BLUE[2]},{0.12 + 0.88 * share:.2f})"
        parts.append(f"<rect x='{x}' y='{y}' width='42' height='26' rx='4' fill='{fill}' stroke='{EDGE}'/>")
        shade = "#ffffff" if share > 0.5 else INK
        parts.append(text(x + 21, y + 18, str(rank) if rank else "·", fill=shade, anchor="middle"))
    for column, kind in enumerate(kinds):
        x = x0 + 45 + column * 44
        parts.append(text(x, y0 + 24 + len(blocks) * 28, kind.removesuffix("_proj"), fill=PALE, anchor="middle"))
    return "".join(parts)


def schedule_svg(run: Run) -> str:
    """Components alive over the steps, with a mark at each event, and the two learning phases around them."""
    start, steps = total(run["start"]), run["steps"]
    width, height, left, top = 720, 300, 64, 60

    def at(step: float, components: float) -> tuple[float, float]:
        return left + step / steps * (width - left - 24), top + (1 - components / start) * (height - top - 56)

    path, alive = [at(0, start)], start
    for step, components in run["events"]:
        path += [at(step, alive), at(step, components)]
        alive = components
    path.append(at(steps, alive))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    x_first, x_last, floor = at(steps * 0.25, 0)[0], at(steps * 0.5, 0)[0], at(0, 0)[1]
    body = [
        f"<rect x='{x_first:.1f}' y='{top}' width='{x_last - x_first:.1f}' height='{floor - top}' fill='#ddf4ff'/>",
        f"<polyline points='{line}' fill='none' stroke='rgb{BLUE}' stroke-width='2.5'/>",
        f"<line x1='{left}' y1='{floor}' x2='{width - 24}' y2='{floor}' stroke='{PALE}'/>",
        text(24, 32, "Components alive during a run", size=17, weight=600),
        text((left + x_first) / 2, top + 20, "all of them learn", fill=PALE, anchor="middle"),
        text((x_first + x_last) / 2, floor - 12, "pruning", fill=PALE, anchor="middle"),
        text((x_last + width - 24) / 2, at(0, alive)[1] - 12, "the survivors train on", fill=PALE, anchor="middle"),
    ]
    for step in (0, steps // 4, steps // 2, steps):
        body.append(text(at(step, 0)[0], floor + 20, f"{step}", fill=PALE, anchor="middle"))
    for components in (0, alive, start):
        body.append(text(left - 8, at(0, components)[1] + 5, str(components), fill=PALE, anchor="end"))
    body.append(text((left + width) / 2, height - 10, f"optimizer step; {run['recipe']}", fill=PALE, anchor="middle"))
    return svg(width, height, f"{start} components until a quarter of the run, {alive} from half of it", "".join(body))


def terminal_svg(run: Run, width: int = 96) -> str:
    """The live picture at two thirds of the run, and the summary of it."""
    told, summary = run["told"], run["summary"]
    about = {"name": "quickstart", "steps": run["steps"], "components": sum(run["start"].values())}
    about |= {key: summary.get(key) for key in ("parameters", "budget_parameters")}
    console = Console(io.StringIO(), terminal=True, width=width, height=40)
    console.rich.record = True
    view = console.train_view()
    layers = [{"name": name, "components": count} for name, count in run["start"].items()]
    for event in ({"event": "start", "run": about, "layers": layers}, *told):
        view.progress.hear(event)
        if event["event"] == "train":  # the log has every tenth of the steps that a terminal hears of
            view.progress.hear(event | {"event": "tick"})
    # The pace is that of the run, not that of this loop.
    view.progress._step_seconds = next(line["step_seconds"] for line in reversed(told) if line["event"] == "train")
    console.line(Text("while it trains", style="label"))
    console.rich.print(view)
    console.line()
    console.line(Text("at the end", style="label"))
    console.show_summary(summary | {"output_dir": "out/quickstart"})
    drawn = console.rich.export_svg(title="dynlora train", theme=SVG_EXPORT_THEME, unique_id="terminal")
    drawn = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)  # nothing is fetched from elsewhere
    return "\n".join(line.rstrip() for line in drawn.replace("Fira Code, monospace", "monospace").splitlines()) + "\n"


def components_svg() -> str:
    """W' = W + s (b_1 a_1 + b_2 a_2 + b_3 a_3), the last one pruned."""
    body = [
        text(24, 32, "A layer is the frozen weight and a sum of components", size=17, weight=600),
        f"<rect x='24' y='64' width='130' height='130' rx='4' fill='#eaeef2' stroke='{PALE}'/>",
        text(89, 126, "W", size=22, anchor="middle"),
        text(89, 148, "frozen", fill=PALE, anchor="middle"),
        text(188, 138, "+ s · (", size=20, anchor="middle"),
    ]
    for index, x in enumerate((232, 392, 552)):
        gone = index == 2
        look = f"fill='none' stroke='{PALE}' stroke-dasharray='4 4'" if gone else f"fill='rgb{BLUE}' stroke='none'"
        ink, number = (PALE if gone else INK), "₁₂₃"[index]
        body += [
            f"<rect x='{x}' y='64' width='14' height='130' rx='3' {look}/>",
            f"<rect x='{x + 22}' y='122' width='84' height='14' rx='3' {look}/>",
            text(x + 7, 214, f"b{number}", fill=ink, anchor="middle"),
            text(x + 64, 156, f"a{number}ᵀ", fill=ink, anchor="middle"),
        ]
        if index:
            body.append(text(x - 22, 137, "+", size=20, anchor="middle"))
    body += [
        text(608, 232, "pruned: no tensor, no moments, no work", fill=PALE, anchor="middle"),
        text(676, 138, ")", size=20, anchor="middle"),
        text(24, 268, "One component is a column b and a row a: d_out + d_in numbers.", fill=PALE),
        text(24, 288, "The components of all layers compete for one budget.", fill=PALE),
    ]
    return svg(760, 308, "A frozen weight W plus s times three rank-1 components, one of them pruned", "".join(body))


def text(
    x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    style = f"font-size='{size}' font-weight='{weight}' fill='{fill}' text-anchor='{anchor}'"
    return f"<text x='{x:g}' y='{y:g}' {style}>{escape(words)}</text>"


def svg(width: int, height: int, label: str, body: str) -> str:
    """A white card, so that it can be read on a dark page too."""
    card = f"<rect x='0.5' y='0.5' width='{width - 1}' height='{height - 1}' rx='8' fill='#ffffff' stroke='{EDGE}'/>"
    parts = (card + body).replace("><", ">\n<")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"role='img' {FONT}>\n<title>{escape(label)}</title>\n{parts}\n</svg>\n"
    )
