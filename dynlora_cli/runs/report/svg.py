"""Charts and rank maps as plain text of SVG and HTML: no plotting package, no script needed to read them.

Everything that comes from outside is escaped here. Colours are the CSS variables of `report_html`, so that one picture
serves the light and the dark page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

from dynlora_cli.errors import without_secrets
from dynlora_cli.runs.layer_grid import layer_grid, shade
from dynlora_cli.text import short

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One set of marks in a chart.

    Args:
        label: what the marks are, for the legend; an empty label keeps the series out of it.
        points: (x, y); points with a missing or infinite y leave a gap.
        style: line | faint (thin line behind) | dots (held-out points, joined) | dash (a limit).
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    style: Literal["line", "faint", "dots", "dash"] = "line"

    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


def text(value: Any) -> str:
    """Any value as HTML text, escaped, and without tokens in addresses."""
    return escape(without_secrets(str(value)), quote=True)


def nice_ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 x 10^n apart) between `low` and `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def smooth(points: Sequence[tuple[float, float | None]], keep: float = 0.6) -> list[Point]:
    """Exponential moving average over the points, bias-corrected, so that it starts at the first value."""
    mean, weight, out = 0.0, 0.0, []
    for x, y in points:
        if y is not None and math.isfinite(y):
            mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
            out.append((x, mean / weight))
    return out


@dataclass(frozen=True)
class Frame:
    """The plot area of a chart, in SVG units, and the data range that it shows."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: float = 58
    right: float = 16
    top: float = 26
    bottom: float = 34
    x_unit: str = "optimizer steps"

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    y_text: Callable[[float], str],
    marks: Iterable[float] = (),
    last_step: float,
    wide: bool = False,
    from_zero: bool = False,
    x_unit: str = "optimizer steps",
) -> str:
    """A figure of `series` over optimizer steps 0 to `last_step`, or over another `x_unit`.

    `unit` names the vertical axis, `marks` are the steps of prune events.

    Returns an empty string where no series has a point.
    """
    shown = [one for one in series if one.finite()]
    if not shown:
        return ""
    marks = list(marks)

    def picture(broad: bool, style: str = "") -> str:
        frame = replace(_fit(shown, (0, last_step or 1), broad, from_zero), x_unit=x_unit)
        body = axes(frame, unit, y_text) + _marks(frame, marks) + "".join(_draw(frame, one, y_text) for one in shown)
        return drawn(frame, _spoken(title, shown, unit, y_text, x_unit), body, style)

    legend = [(one.style, one.label) for one in shown if one.label] + ([("mark", "prune event")] if marks else [])
    # A wide chart is drawn for a narrow screen, too, where it would be too small to read or would not be whole.
    pictures = picture(True, "broad") + picture(False, "small") if wide else picture(False)
    return figure(title, pictures, legend, wide)


def dumbbell_chart(title: str, pairs: Sequence[tuple[float, float, float]], *, unit: str) -> str:
    """A figure of (step, predicted, measured) per event: hollow and full dot, joined, around the zero line."""
    if not pairs:
        return ""
    shown = [Series("predicted", [(x, y) for x, y, _ in pairs]), Series("measured", [(x, y) for x, _, y in pairs])]
    side = 0.04 * (pairs[-1][0] - pairs[0][0]) or 1.0
    frame = _fit([*shown, Series("zero", [(pairs[0][0], 0.0)])], (pairs[0][0] - side, pairs[-1][0] + side))
    zero = frame.y(0)
    body = axes(frame, unit, _signed)
    body += f'<path class="zero" d="M{frame.left} {zero:.1f}H{frame.width - frame.right}"/>'
    for step, predicted, measured in pairs:
        x, y_predicted, y_measured = frame.x(step), frame.y(predicted), frame.y(measured)
        body += (
            f"<g><title>step {step:g}: predicted {predicted:+.4g}, measured {measured:+.4g}</title>"
            f'<path class="bar" d="M{x:.1f} {y_predicted:.1f}V{y_measured:.1f}"/>'
            f'<circle class="hollow" cx="{x:.1f}" cy="{y_predicted:.1f}" r="4"/>'
            f'<circle class="full" cx="{x:.1f}" cy="{y_measured:.1f}" r="4"/></g>'
        )
    spoken = _spoken(title, shown, unit, _signed)
    return figure(title, drawn(frame, spoken, body), [("hollow", "predicted"), ("full", "measured")])


def rank_map(layers: Sequence[str], ranks: dict[str, int], start: dict[str, int]) -> str:
    """Tables of blocks x module types, a cell per layer coloured by the share of components kept; long ones in columns.

    Cells and totals carry the indices of their layers in `data-of`: a few lines of script can show another step.
    """
    blocks, modules, cells = layer_grid(layers)
    index = {name: i for i, name in enumerate(layers)}
    bands = min(4, max(1, math.ceil(len(blocks) / 16)))
    height = math.ceil(len(blocks) / bands)
    heads = "".join(f'<th scope="col">{text(module.removesuffix("_proj"))}</th>' for module in modules)
    out = []
    for first in range(0, len(blocks), height):
        rows, shown = "", blocks[first : first + height]
        for block in shown:
            names = [cells.get((block, module)) for module in modules]
            row = "".join(_cell(name, index, ranks, start) for name in names)
            present = [name for name in names if name]
            rows += f'<tr><th scope="row">{text(block)}</th>{row}{_total(present, index, ranks)}</tr>'
        columns = [[cells[block, module] for block in shown if (block, module) in cells] for module in modules]
        totals = "".join(_total(names, index, ranks) for names in columns)
        everything = _total([name for names in columns for name in names], index, ranks)
        out.append(
            f'<table class="map"><thead><tr><th scope="col">block</th>{heads}<th scope="col">sum</th></tr></thead>'
            f'<tbody>{rows}</tbody><tfoot><tr><th scope="row">sum</th>{totals}{everything}</tr></tfoot></table>'
        )
    return f'<div class="maps{" one" if bands == 1 else ""}">{"".join(out)}</div>'


def map_legend() -> str:
    """What the colours of a rank map mean: cells of some shares, coloured as the map's are."""
    shares = (1, 5, 25, 50, 75, 100)
    cells = "".join(f'<i class="cell" style="--v:{shade(share, 100):.3f}"></i>{share} %' for share in shares)
    return (
        f'<div class="scale"><i class="zero cell"></i>none<span></span>{cells}<span></span>'
        "of the components that the layer started with</div>"
    )


def figure(title: str, body: str, legend: Sequence[tuple[str, str]] = (), wide: bool = False) -> str:
    """A figure with its title and legend above the picture."""
    keys = "".join(f'<span class="key"><i class="swatch {style}"></i>{text(label)}</span>' for style, label in legend)
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind}><figcaption><b>{text(title)}</b><span class="legend">{keys}</span></figcaption>{body}</figure>'
    )


def bar(value: float, most: float) -> str:
    """A small horizontal bar, `value` of `most`, for a table cell."""
    width = 100 * value / most if most > 0 else 0
    return f'<span class="meter"><i style="width:{width:.1f}%"></i></span>'


def _cell(name: str | None, index: dict[str, int], ranks: dict[str, int], start: dict[str, int]) -> str:
    if name is None:
        return '<td class="none"></td>'
    rank, colour = ranks.get(name, 0), shade(ranks.get(name, 0), start.get(name, 0))
    kind = "cell zero" if rank == 0 else "cell high" if colour > 0.6 else "cell"
    label = f"{name}: {rank} of {start.get(name, 0)}"
    return (
        f'<td class="{kind}" style="--v:{colour:.3f}" data-of="{index[name]}" data-name="{text(name)}"'
        f' title="{text(label)}">{rank or ""}</td>'
    )


def _total(names: Sequence[str], index: dict[str, int], ranks: dict[str, int]) -> str:
    of = ",".join(str(index[name]) for name in names)
    return f'<td class="total" data-of="{of}">{sum(ranks.get(name, 0) for name in names)}</td>'


def _fit(series: Sequence[Series], x_range: Point, wide: bool = False, from_zero: bool = False) -> Frame:
    """A frame in which all points find room, with a little air above and below."""
    ys = [y for one in series for _, y in one.finite()]
    low, high = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    y_range = (low if from_zero and low == 0 else low - air, high + air)
    return Frame(1040 if wide else 508, 300 if wide else 232, x_range, y_range)


def axes(frame: Frame, unit: str, y_text: Callable[[float], str]) -> str:
    """The grid, the numbers on both axes and their units."""
    right, floor = frame.width - frame.right, frame.height - frame.bottom
    out = ""
    for value in nice_ticks(*frame.y_range):
        y = frame.y(value)
        out += f'<path class="grid" d="M{frame.left} {y:.1f}H{right}"/>'
        out += f'<text class="end" x="{frame.left - 8}" y="{y + 4:.1f}">{text(y_text(value))}</text>'
    for value in nice_ticks(*frame.x_range, at_most=8 if frame.width > 600 else 5):
        if value == int(value):
            out += f'<text class="middle" x="{frame.x(value):.1f}" y="{floor + 17}">{value:,.0f}</text>'
    out += f'<path class="axis" d="M{frame.left} {floor}H{right}"/>'
    out += f'<text class="unit" x="4" y="13">{text(unit)}</text>'
    return out + f'<text class="unit end" x="{right}" y="{frame.height - 3}">{text(frame.x_unit)}</text>'


def _marks(frame: Frame, steps: Sequence[float]) -> str:
    floor = frame.height - frame.bottom
    return "".join(
        f'<path class="mark" d="M{frame.x(step):.1f} {floor}v-9"><title>prune event at step {step:g}</title></path>'
        for step in steps
    )


def _draw(frame: Frame, series: Series, y_text: Callable[[float], str]) -> str:
    points = series.finite()
    path = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)
    out = f'<path class="{series.style}" d="{path}"/>' if len(points) > 1 else ""
    if series.style == "dots" or len(points) == 1:
        out += "".join(
            f'<circle class="dot" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.6">'
            f"<title>{_one(frame.x_unit)} {x:,g}: {text(series.label)} {text(y_text(y))}</title></circle>"
            for x, y in points
        )
    return out


def drawn(frame: Frame, spoken: str, body: str, style: str = "") -> str:
    """The picture itself, with the sentence that says what is in it."""
    kind = f' class="{style}"' if style else ""
    return (
        f'<svg{kind} viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{text(spoken)}">'
        f"<title>{text(spoken)}</title>{body}</svg>"
    )


def _spoken(
    title: str,
    series: Sequence[Series],
    unit: str,
    y_text: Callable[[float], str],
    x_unit: str = "optimizer steps",
) -> str:
    """The chart in one sentence, for those who do not see it."""
    parts, word = [], _one(x_unit)
    for one in series:
        points = one.finite()
        if one.label:
            parts.append(
                f"{one.label} {y_text(points[0][1])} at {word} {points[0][0]:g}, {y_text(points[-1][1])} at the end"
            )
    return f"{title} ({unit}) over {x_unit}: {'; '.join(parts)}"


def _one(unit: str) -> str:
    """`step` of `optimizer steps`."""
    return unit.split()[-1].removesuffix("s")


def _signed(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:+.3g}"


def axis_number(value: float) -> str:
    """An axis label that neither lies nor fills the margin: `0.0002`, `2.5`, `12.3 k`."""
    if abs(value) >= 1000:
        return short(value).replace(".0 ", " ")
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.6g}"
