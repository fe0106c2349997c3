"""What a notebook shows of a run: HTML and SVG with its colours inside, since a notebook keeps no style sheet of ours.

Text takes the notebook's own colour, so that one picture serves light and dark themes. Everything from outside is
escaped.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dynlora_cli.runs.layer_grid import layer_grid, shade
from dynlora_cli.runs.log import Event, RunRecord
from dynlora_cli.runs.report.svg import text
from dynlora_cli.text import MEASURES, change, count, number, percent, rate

TEAL, AMBER = "#12897c", "#c2702a"
CELL_WIDTH, CELL_HEIGHT, MOST_TALL = 44, 18, 24  # pixels; with more blocks than that a cell is a thin bar
CHART_WIDTH, CHART_HEIGHT = 320, 120
Columns = Sequence[tuple[str, str, Callable[[float | None], str]]]
_TABLE = 'style="border-collapse:collapse;margin:0 0 8px 0"'
_CELL = 'style="text-align:{side};padding:1px 14px 1px 0;border:0;background:none"'


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook. IPython is asked, and never imported for it."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


def page(body: str, notes: Iterable[str] = ()) -> str:
    """A result with its notes."""
    return f"<div>{body}{''.join(f'<div>note: {text(note)}</div>' for note in notes)}</div>"


def plain(shown: str) -> str:
    """What a terminal shows."""
    return f'<pre style="line-height:1.25">{text(shown)}</pre>'


def lines(said: Sequence[str]) -> str:
    """What has been said so far, the last few lines of it."""
    return "".join(f"<div>{text(line)}</div>" for line in said[-6:])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A small table; the first column is set left, the others right."""

    def line(cells: Sequence[str], tag: str) -> str:
        sides = ["left", *["right"] * (len(cells) - 1)]
        return "".join(
            f"<{tag} {_CELL.format(side=side)}>{text(cell)}</{tag}>" for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<tr>{line(heads, 'th')}</tr>" if any(heads) else ""
    return f"<table {_TABLE}>{head}{body}</table>"


def run(record: RunRecord, summary: Mapping[str, Any]) -> str:
    """A run: its numbers before and after, its losses, and the rank map."""
    start = record.rank_history()[0][1] if record.rank_history() else {}
    ranks = summary.get("ranks") or {}
    parts = [
        f"<div><b>{text(summary.get('output_dir') or record.folder)}</b></div>",
        table(("", "before", "after", ""), before_after(summary)),
        loss_chart(record.metrics, record.evals),
        rank_map({**dict.fromkeys(start, 0), **ranks}, start) if ranks else "",
    ]
    return "".join(parts)


def written(done: str, folder: object, rows: Iterable[Sequence[str]]) -> str:
    """Files that were made: what was done, where they are, and some facts."""
    return f"<div><b>{text(done)}</b> {text(folder)}</div>{table(('', ''), rows)}"


def agreement(check: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How far what was written is from base + adapter, where that was measured."""
    if not check:
        return []
    return [
        ("KL, nats per token", f"{check['kl']:.1e}"),
        (
            "largest difference of a logit",
            f"{check['max_logit_difference']:.1e}, of logits up to {check['max_logit']:.1f}",
        ),
        ("other choices of a token", percent(1 - check["same_choice"])),
    ]


def evaluation(report: Mapping[str, Any], columns: Columns) -> str:
    """The base and every adapter on the same rows.

    Args:
        report: of `dynlora eval`.
        columns: key, heading, and how its values are shown; one without values is left out.
    """
    lines_ = [("base", report["base"])] if report["base"] else []
    lines_ += [(one["name"], one) for one in report["adapters"]]
    shown = [column for column in columns if any(column[0] in values for _, values in lines_)]
    rows = [(name, *(show(values.get(key)) for key, _, show in shown)) for name, values in lines_]
    what = f"{count(report['rows'])} rows: {report['data']['source']}" if report["rows"] else ""
    return f"<div>{text(what)}</div>{table(('', *(head for _, head, _ in shown)), rows)}"


def before_after(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of what a run has changed: losses and sizes; nothing that depends on the clock."""
    rows = []
    for key, label, shown, _ in MEASURES:
        before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
        if after is not None:
            rows.append((f"held-out {label}", shown(before), shown(after), change(before, after)))
    budget = f"budget {count(summary['budget_parameters'])}" if summary.get("budget_parameters") else ""
    for key, note in (("parameters", budget), ("components", "")):
        if summary.get(key) is not None:
            rows.append((key, count(summary.get(f"{key}_start")), count(summary[key]), note))
    return rows


def live(
    step: int,
    steps: int,
    latest: Mapping[str, float],
    held_out: tuple[float | None, float | None],
    ranks: Mapping[str, int],
    start: Mapping[str, int],
) -> str:
    """A run that goes on.

    Args:
        step, steps: done, and in all.
        latest: loss, learning_rate, components, parameters, as far as they are known.
        held_out: the held-out loss at first and now.
        ranks, start: components of each layer now and at the start.
    """
    share = min(1.0, step / steps) if steps else 0.0
    bar = (
        '<div style="background:rgba(127,127,127,.25);height:6px;width:320px;margin:4px 0">'
        f'<div style="background:{TEAL};height:6px;width:{100 * share:.1f}%"></div></div>'
    )
    rows = [
        ("step", f"{count(step)} of {count(steps)}"),
        ("loss", number(latest.get("loss"))),
        ("held out", f"{number(held_out[1])}, at first {number(held_out[0])}" if held_out[1] is not None else ""),
        ("components", count(latest.get("components")) if latest.get("components") is not None else ""),
        ("learning rate", rate(latest.get("learning_rate"))),
    ]
    shown = table(("", ""), [row for row in rows if row[1]])
    return f"<div>{bar}{shown}{rank_map(ranks, start) if ranks else ''}</div>"


def ended(summary: Mapping[str, Any]) -> str:
    """A run that is done, in one line."""
    loss = summary.get("loss_after")
    held = f", held-out loss {number(summary.get('loss_before'))} → {number(loss)}" if loss is not None else ""
    return f"<div>{count(summary.get('steps'))} steps done{held}</div>"


def rank_map(ranks: Mapping[str, int], start: Mapping[str, int]) -> str:
    """Blocks x module types, a cell per layer: the components alive in it, coloured by the share of the start."""
    blocks, modules, cells = layer_grid(ranks)
    height = CELL_HEIGHT if len(blocks) <= MOST_TALL else max(3, MOST_TALL * CELL_HEIGHT // len(blocks))
    margin = 10 + 7 * max((len(block) for block in blocks), default=0)
    width = margin + len(modules) * (CELL_WIDTH + 2)
    body = [
        _words(margin + at * (CELL_WIDTH + 2) + CELL_WIDTH / 2, 12, _short(module), "middle")
        for at, module in enumerate(modules)
    ]
    most = max(ranks.values(), default=0)
    for row, block in enumerate(blocks):
        top = 18 + row * (height + 2)
        if height >= 10 or row % 8 == 0:
            body.append(_words(margin - 6, top + min(height, 14) - 1, block, "end"))
        for column, module in enumerate(modules):
            if name := cells.get((block, module)):
                left = margin + column * (CELL_WIDTH + 2)
                body.append(_cell(left, top, height, name, ranks.get(name, 0), start.get(name) or most))
    tall = 18 + len(blocks) * (height + 2)
    spoken = f"components of {len(cells)} layers, {sum(ranks.values())} in all"
    return (
        f'<svg width="{width}" height="{tall}" viewBox="0 0 {width} {tall}" role="img" aria-label="{text(spoken)}" '
        f'font-family="sans-serif" font-size="11">{"".join(body)}</svg>'
    )


def _cell(left: float, top: float, height: float, name: str, rank: int, start: int) -> str:
    strength = shade(rank, start)
    title = f"<title>{text(name)}: {rank} of {start}</title>"
    box = f'<rect x="{left}" y="{top}" width="{CELL_WIDTH}" height="{height}" rx="2" '
    box += f'fill="{TEAL}" fill-opacity="{strength:.2f}" stroke="{TEAL}" stroke-opacity=".3">{title}</rect>'
    if height < 10:
        return f"<g>{box}</g>"
    colour = "#fff" if strength > 0.55 else "currentColor"
    return f"<g>{box}{_words(left + CELL_WIDTH / 2, top + 13, str(rank) if rank else '·', 'middle', colour)}</g>"


def _short(module: str) -> str:
    name = module.removesuffix("_proj")
    return name if len(name) <= 7 else f"{name[:6]}…"


def _words(x: float, y: float, said: str, anchor: str, colour: str = "currentColor") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text(said)}</text>'


def loss_chart(train: Sequence[Event], held_out: Sequence[Event]) -> str:
    """Losses over steps: the training loss as a line, held-out losses as dots. Empty where there are too few."""
    lines_ = [_points(train), _points(held_out)]
    both = [point for points in lines_ for point in points]
    if len({step for step, _ in both}) < 2:
        return ""
    steps, losses = [step for step, _ in both], [loss for _, loss in both]
    low, high, last = min(losses), max(losses), max(steps)

    def place(point: tuple[int, float]) -> tuple[float, float]:
        across = 46 + (CHART_WIDTH - 56) * point[0] / last
        return across, 10 + (CHART_HEIGHT - 34) * (high - point[1]) / ((high - low) or 1.0)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, lines_[0]))
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{AMBER}"><title>step {point[0]}: {number(point[1])}</title>'
        "</circle>"
        for point in lines_[1]
        for x, y in [place(point)]
    )
    words = _words(40, 14, number(high), "end") + _words(40, CHART_HEIGHT - 20, number(low), "end")
    words += _words(46, CHART_HEIGHT - 4, "loss: line in training, dots held out", "start")
    words += _words(CHART_WIDTH - 10, CHART_HEIGHT - 4, f"step {last}", "end")
    return (
        f'<div><svg width="{CHART_WIDTH}" height="{CHART_HEIGHT}" role="img" aria-label="losses over {last} steps" '
        f'font-family="sans-serif" font-size="11">'
        f'<polyline points="{path}" fill="none" stroke="{TEAL}" stroke-width="1.5"/>{dots}{words}</svg></div>'
    )


def _points(events: Sequence[Event]) -> list[tuple[int, float]]:
    pairs = [(event["step"], event.get("loss")) for event in events]
    return [(step, loss) for step, loss in pairs if loss is not None and math.isfinite(loss)]
