"""A bar chart as SVG, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

WIDTH, LEFT, RIGHT, TOP, LINE = 760, 225, 118, 58, 30
STYLE = """<style>
text{fill:#1f2328;font:13px system-ui,sans-serif}.small{font-size:11.5px;fill:#59636e}.title{font-weight:600}
.axis{stroke:#d1d9e0}.bar{fill:#b6bec8}.ours{fill:#1b6ef3}.dot{fill:#59636e}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}.axis{stroke:#3d444d}.bar{fill:#545d68}
.ours{fill:#4c8dff}.dot{fill:#c5ced8}}
</style>"""


@dataclass(frozen=True)
class Bar:
    """One line of the chart: the bar is the mean of the points, `remark` stands at its right."""

    name: str
    points: Sequence[float]
    remark: str
    strong: bool = False


def bars(lines: Sequence[Bar], title: str, below: str) -> str:
    """The chart; 0 is a line of its own, and bars go from it."""
    values = [value for line in lines for value in line.points]
    low, high = min(0.0, *values), max(1.0, *values)
    unit = (WIDTH - LEFT - RIGHT) / (high - low)

    def x(value: float) -> float:
        return LEFT + (value - low) * unit

    height = TOP + LINE * len(lines) + 44
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">', STYLE]
    parts.append(f'<text class="title" x="0" y="18">{title}</text>')
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if (high - low) / step <= 8)
    for tick in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        end = TOP + LINE * len(lines)
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {TOP - 8}V{end}" stroke-width="{2 if tick == 0 else 1}"/>')
        parts.append(
            f'<text class="small" x="{x(tick):.1f}" y="{TOP - 14}" text-anchor="middle">{f"{tick:+d} %" if tick else 0}</text>'
        )
    for number, line in enumerate(lines):
        middle, top = mean(line.points), TOP + LINE * number + 5
        kind, start = ("ours" if line.strong else "bar"), min(x(0), x(middle))
        width = max(2.0, abs(x(middle) - x(0)))
        weight = ' class="title"' if line.strong else ""
        parts.append(
            f'<rect class="{kind}" x="{start:.1f}" y="{top}" width="{width:.1f}" height="{LINE - 12}" rx="2"/>'
        )
        parts += [f'<circle class="dot" cx="{x(v):.1f}" cy="{top + 9}" r="2.5"/>' for v in line.points]
        parts.append(f'<text{weight} x="{LEFT - 10}" y="{top + 14}" text-anchor="end">{line.name}</text>')
        parts.append(f'<text x="{WIDTH}" y="{top + 14}" text-anchor="end">{middle:+.1f} %, {line.remark}</text>')
    parts.append(f'<text class="small" x="0" y="{height - 12}">{below}</text></svg>')
    return "\n".join(parts) + "\n"
