"""Ranks as a map of blocks x module types."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rich.color import Color
from rich.style import Style
from rich.text import Text

from dynlora_cli.runs.layer_grid import layer_grid, shade

Ranks = Mapping[str, float]  # components per layer


DARK, BRIGHT = (30, 46, 52), (72, 214, 198)  # the colour scale of the rank map


INK_DARK, INK_LIGHT = Color.parse("#06211f"), Color.parse("#f2f7f6")


def rank_map(ranks: Ranks, start: Ranks, width: int, height: int) -> Text:
    """Blocks x module types, each cell the components alive in one layer, coloured by the share of the start.

    Where there are more blocks than lines (`height`, headings included), neighbours share a line that shows their mean;
    module types that do not fit into `width` are counted in the last heading.
    """
    blocks, modules, cells = layer_grid(start or ranks)
    per_line = -(-len(blocks) // max(1, height - 1))
    bands = [blocks[first : first + per_line] for first in range(0, len(blocks), per_line)]
    labels = [band[0] if len(band) == 1 else f"{band[0]}-{band[-1]}" for band in bands]
    margin = max(map(len, labels), default=0)
    digits = max((len(str(rank)) for rank in ranks.values()), default=1)
    heads = [module.removesuffix("_proj").center(max(4, digits + 2)) for module in modules]
    ends = list(itertools.accumulate(len(head) + 1 for head in heads))
    shown = sum(1 for end in ends if end <= width - margin - 4) if ends[-1] > width - margin else len(heads)

    text = Text(" " * margin, style="label", no_wrap=True)
    text.append("".join(f" {head}" for head in heads[:shown]))
    text.append(f" +{len(heads) - shown}" if shown < len(heads) else "")
    for label, band in zip(labels, bands, strict=True):
        text.append(f"\n{label:>{margin}}")
        for module, head in zip(modules[:shown], heads, strict=False):
            names = [cells[block, module] for block in band if (block, module) in cells]
            text.append(" ").append(*_cell(names, ranks, start, len(head)))
    return text


def _cell(names: Sequence[str], ranks: Ranks, start: Ranks, width: int) -> tuple[str, str | Style]:
    """The mean rank of some layers and its colour; a dot where nothing is left, a blank where there is no layer."""
    alive = sum(ranks.get(name, 0) for name in names)
    if alive == 0:
        return (" ·" if names else "").center(width), "dim"
    strength = shade(alive, sum(start.get(name, 0) for name in names))
    background = Color.from_rgb(*(low + (high - low) * strength for low, high in zip(DARK, BRIGHT, strict=True)))
    mean = alive / len(names)
    shown = f"{mean:.0f}" if mean >= 0.95 else f"{mean:.1f}"
    return f"{shown:>2}".center(width), Style(
        color=INK_DARK if strength > 0.6 else INK_LIGHT, bgcolor=background, dim=False
    )
