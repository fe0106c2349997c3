"""What a sweep leaves for people: the page `sweep.html` and a table in Markdown, made from the record alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.files.whole import write_text
from dynlora_cli.runs.report import svg
from dynlora_cli.runs.report.page import ASSETS
from dynlora_cli.runs.report.svg import Frame, text
from dynlora_cli.runs.sweep import CARD, OPTIMISTIC, PAGE
from dynlora_cli.text import MEASURES, count, counted, duration, number, short

AGAINST = "against the best"
MOST_SERIES = 6  # lines of a chart that colours can tell apart
Combination = Mapping[str, Any]


def said(values: Mapping[str, Any]) -> str:
    """The values of a run or a combination: `rank.budget=4, seed=0`."""
    return ", ".join(f"{key}={_value(value)}" for key, value in values.items()) or "all runs"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def loss_of(one: Combination) -> str:
    """A mean loss with half the width of its interval, where it has one: `1.2345 ± 0.0123`."""
    loss = one["mean"].get("loss")
    return number(loss) if one["low"] is None else f"{number(loss)} ± {number(one['high'] - loss)}"


def behind(one: Combination) -> str:
    """How much worse than the best: `+0.0123 (+0.0100 to +0.0146)`."""
    if one["best"]:
        return "best"
    if not one["behind"]:
        return ""
    back = one["behind"]
    return f"{back['loss']:+.4f}" + ("" if back["low"] is None else f" ({back['low']:+.4f} to {back['high']:+.4f})")


def told(combinations: Sequence[Combination]) -> list[tuple[str, str, Callable[[float | None], str]]]:
    """Key, name and form of what is told beside the loss."""
    beside = [measure for measure in MEASURES if measure.key not in ("loss", "perplexity")]  # which is exp(loss)
    return [measure[:3] for measure in beside if any(measure.key in one["mean"] for one in combinations)]


def heads(combinations: Sequence[Combination], keys: Sequence[str]) -> list[str]:
    """The columns of the table of combinations; the first ones are the keys."""
    return [
        *keys,
        "runs",
        "held-out loss",
        AGAINST,
        *(name for _, name, _ in told(combinations)),
        "parameters",
        "time",
    ]


def cells(one: Combination, combinations: Sequence[Combination]) -> list[str]:
    """A line of that table."""
    values = [_value(value) for value in one["values"].values()]
    done = str(one["done"]) if one["done"] == len(one["runs"]) else f"{one['done']} of {len(one['runs'])}"
    more = [show(one["mean"].get(key)) for key, _, show in told(combinations)]
    return [*values, done, loss_of(one), behind(one), *more, count(one["parameters"]), duration(one["seconds"])]


def sweep_card(record: Mapping[str, Any]) -> str:
    """README.md: the table, for a repository or the summary of a CI job."""
    combinations = record["combinations"]
    titles = heads(combinations, list(combinations[0]["values"]))
    lines = [f"# {_cell(record['name'])}", "", *(f"{_cell(line)}  " for line in sentences(record)), ""]
    lines += [f"| {' | '.join(map(_cell, titles))} |", f"|{' --- |' * len(titles)}"]
    for one in combinations:
        shown = [_cell(cell) for cell in cells(one, combinations)]
        lines.append(f"| {' | '.join(f'**{cell}**' if one['best'] and cell else cell for cell in shown)} |")
    failed = [row for row in record["runs"] if row["state"] == "failed"]
    lines += ["", *(f"- {_cell(row['run'])} failed: {_cell(row['error'])}" for row in failed)]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: str) -> str:
    return text(value).replace("|", "\\|").replace("\n", " ").replace("&#x27;", "'").replace("&quot;", '"')


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know."""
    combinations, runs = record["combinations"], record["runs"]
    lines = [_how_many(runs)]
    most = max((one["done"] for one in combinations), default=0)
    if any(one["low"] is not None for one in combinations):
        lines.append("A loss is the mean over seeds, ± its 95 % interval (Student's t).")
        if any(one["behind"] for one in combinations):
            lines.append("Against the best: the mean difference over equal seeds, and its 95 % interval.")
    elif most:
        lines.append("One run of each: no interval, and small differences may be chance; add --sweep seed=0,1,2.")
    named = tuple(row["run"] for row in runs)  # a name stays as it is written
    lines += [f"{note if note.startswith(named) else note[:1].upper() + note[1:]}." for note in record["notes"]]
    if record["best"]:
        lines.append(f"The best is {OPTIMISTIC}.")
    return lines


def _how_many(runs: Sequence[Mapping[str, Any]]) -> str:
    states = [row["state"] for row in runs]
    said_of = {"failed": "failed", "interrupted": "interrupted", "running": "running", "waiting": "not run yet"}
    done = f"{states.count('done')} of {counted(len(runs), 'run')} done"
    others = [f"{states.count(state)} {words}" for state, words in said_of.items() if state in states]
    return f"{', '.join([done, *others])}."


# -- the page --------------------------------------------------------------------------------------------------------


def sweep_page(record: Mapping[str, Any]) -> str:
    """The whole page: one file, nothing from outside, links to the runs' own reports."""
    style = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in ("report.css", "sweep.css"))
    parts = (_header, size_chart, _table, _runs)
    return (
        '<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(record['name'])} · dynlora</title><style>\n{style}</style></head>\n<body>\n"
        f"{chr(10).join(filter(None, (part(record) for part in parts)))}\n</body>\n</html>\n"
    )


def _header(record: Mapping[str, Any]) -> str:
    swept = " × ".join(f"{key} {', '.join(map(_value, values))}" for key, values in record["keys"].items())
    best = next((one for one in record["combinations"] if one["best"]), None)
    tiles = [("runs", _how_many(record["runs"]).partition(" done")[0], "done")]
    if best:
        spread = "no interval" if best["low"] is None else f"{number(best['low'])} to {number(best['high'])}"
        tiles += [("lowest held-out loss", number(best["mean"]["loss"]), spread)]
        tiles += [("of", said(best["values"]), counted(best["done"], "run"))]
        tiles += [("its parameters", short(best["parameters"]), duration(best["seconds"]))]
    shown = "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in tiles)
    head = f'<h1>{text(record["name"])}</h1><p class="lead">{text(swept)}</p>'
    return f'<header>{head}<dl class="tiles">{shown}</dl></header>'


def size_chart(record: Mapping[str, Any]) -> str:
    """Loss against size with intervals, a line for what differs beside the budget; empty where all are equal."""
    measured = [one for one in record["combinations"] if "loss" in one["mean"]]
    if len({one["parameters"] for one in measured}) < 2:
        return ""
    series: dict[str, list[Combination]] = {}
    for one in measured:
        rest = {key: value for key, value in one["values"].items() if not key.startswith("rank.")}
        series.setdefault(said(rest) if rest else "", []).append(one)
    if len(series) > MOST_SERIES:
        series = {"": measured}
    pictures = _size_picture(series, True) + _size_picture(series, False)
    legend = [(f"s{number}", name) for number, name in enumerate(series) if name]
    figure = svg.figure("Held-out loss against size", pictures, legend, wide=True)
    return f'<h2>Loss against size</h2><div class="charts">{figure}</div>'


def _size_picture(series: Mapping[str, Sequence[Combination]], broad: bool) -> str:
    every = [one for several in series.values() for one in several]
    sizes = [one["parameters"] for one in every]
    heights = [value for one in every for value in (one["mean"]["loss"], one["low"], one["high"]) if value is not None]
    side, air = 0.04 * (max(sizes) - min(sizes)), 0.06 * (max(heights) - min(heights)) or 0.1
    across, up = (min(sizes) - side, max(sizes) + side), (min(heights) - air, max(heights) + air)
    frame = Frame(1040 if broad else 508, 320 if broad else 250, across, up, x_unit="parameters")
    body = svg.axes(frame, "nats per target", svg.axis_number)
    for place, several in enumerate(series.values()):
        body += f'<g class="s{place}">{_line(frame, several) if len(series) > 1 or _budgets(several) else ""}'
        body += "".join(_point(frame, one) for one in several) + "</g>"
    lowest = min(every, key=lambda one: one["mean"]["loss"])
    spoken = f"Held-out loss against size: {len(every)} combinations, "
    spoken += f"the lowest {loss_of(lowest)} with {said(lowest['values'])}"
    return svg.drawn(frame, spoken, body, "broad" if broad else "small")


def _budgets(several: Sequence[Combination]) -> bool:
    """Whether these differ by their size alone, so that a line from one to the next means something."""
    return all(key.startswith("rank.") for one in several for key in one["values"])


def _line(frame: Frame, several: Sequence[Combination]) -> str:
    points = sorted((one["parameters"], one["mean"]["loss"]) for one in several)
    return f'<path class="joined" d="M{"L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)}"/>'


def _point(frame: Frame, one: Combination) -> str:
    x, y = frame.x(one["parameters"]), frame.y(one["mean"]["loss"])
    spread = ""
    if one["low"] is not None:
        low, high = frame.y(one["low"]), frame.y(one["high"])
        ends = "".join(f"M{x - 5:.1f} {end:.1f}h10" for end in (low, high))
        spread = f'<path class="range" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>'
    title = f"{said(one['values'])}: {loss_of(one)}, {count(one['parameters'])} parameters"
    kind = "best mean" if one["best"] else "mean"
    return f'<g><title>{text(title)}</title>{spread}<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'


def _table(record: Mapping[str, Any]) -> str:
    """The combinations, each with its loss as a mark on one scale for all."""
    combinations = record["combinations"]
    keys = list(combinations[0]["values"])
    seen = [v for one in combinations for v in (one["mean"].get("loss"), one["low"], one["high"]) if v is not None]
    titles = heads(combinations, keys)
    at = titles.index("held-out loss") + 1
    head = [f'<th scope="col"{"" if n < len(keys) else " class=n"}>{text(name)}</th>' for n, name in enumerate(titles)]
    head.insert(at, '<th scope="col"></th>')
    rows = ""
    for one in combinations:
        shown = [
            f"<td{'' if place < len(keys) else ' class=n'}>{text(cell)}</td>"
            for place, cell in enumerate(cells(one, combinations))
        ]
        shown.insert(at, f"<td>{_spread(one, min(seen), max(seen)) if seen else ''}</td>")
        rows += f"<tr{' class=chosen' if one['best'] else ''}>{''.join(shown)}</tr>"
    lead = "".join(f"{text(line)} " for line in sentences(record))
    table = f'<table class="list"><thead><tr>{"".join(head)}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<h2>Combinations</h2><p class="muted">{lead}</p><div class="tablewrap">{table}</div>'


def _spread(one: Combination, low: float, high: float) -> str:
    """A loss and its interval on the scale from the lowest to the highest of all."""
    loss = one["mean"].get("loss")
    if loss is None:
        return ""

    def x(value: float) -> float:
        return 8 + 174 * (value - low) / ((high - low) or 1.0)

    line = "" if one["low"] is None else f'<path class="range" d="M{x(one["low"]):.1f} 7H{x(one["high"]):.1f}"/>'
    dot = f'<circle class="mean" cx="{x(loss):.1f}" cy="7" r="4"/>'
    return f'<svg class="spread s0" viewBox="0 0 190 14" role="img" aria-label="{text(loss_of(one))}">{line}{dot}</svg>'


def _runs(record: Mapping[str, Any]) -> str:
    rows = ""
    for row in record["runs"]:
        name = text(row["run"])
        link = f'<a href="{name}/report.html">{name}</a>' if row["state"] == "done" else name
        loss = number(row.get("measured", {}).get("loss"))
        numbers = (loss, count(row.get("parameters")), count(row.get("steps")), duration(row.get("seconds")))
        state = f"{row['state']}: {row['error']}" if "error" in row else row["state"]
        shown = "".join(f'<td class="n">{cell}</td>' for cell in numbers)
        kind = "" if row["state"] == "done" else " class=failed"
        rows += f'<tr{kind}><td>{link}</td>{shown}<td class="wrap">{text(state)}</td></tr>'
    titles = "".join(
        f'<th scope="col" class="n">{head}</th>' for head in ("held-out loss", "parameters", "steps", "time")
    )
    head = f'<thead><tr><th scope="col">run</th>{titles}<th scope="col">state</th></tr></thead>'
    return f'<h2>Runs</h2><div class="tablewrap"><table class="list">{head}<tbody>{rows}</tbody></table></div>'


def write_pages(folder: Path, record: Mapping[str, Any]) -> None:
    """Write both into the sweep's folder."""
    write_text(folder / PAGE, sweep_page(record))
    write_text(folder / CARD, sweep_card(record))
