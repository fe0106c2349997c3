"""Two pictures of images.jsonl for the documentation.

    python scripts/bench/images/image_pictures.py --work FOLDER [--concepts NAME ...] [--step 120]

docs/pictures/t-lora.png   what the base and the arms draw, from the samples that images.py left in FOLDER
docs/pictures/t-lora.svg   fidelity and what it costs: a line for each arm, from the base to its last checkpoint
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from emoji_data import SIDE, Emoji, fetch, read, split
from image_tables import COSTS, complete, curves
from images import ARMS, HERE
from measures import CONTEXTS, KIND, PLAIN
from PIL import Image, ImageDraw

DOCS = HERE.parents[2] / "docs" / "pictures"
ZOOM, GAP, LEFT, TOP = 3, 3, 138, 30
BLUE, CORNER = CONTEXTS.index(("blue", "")), CONTEXTS.index(("white", "top left"))
OTHER = PLAIN + len(CONTEXTS) + KIND
# Head and places in a strip of samples.
COLUMNS = {
    "as taught": range(3),
    "on blue": range(PLAIN + BLUE, PLAIN + BLUE + 1),
    "small": range(PLAIN + CORNER, PLAIN + CORNER + 1),
    "its kind": range(PLAIN + len(CONTEXTS), PLAIN + len(CONTEXTS) + 2),
    "others": range(OTHER, OTHER + 3),
}
SHOWN = ("contexts not followed", "leaked", "drift, %")
STYLE = """<style>
text{fill:#1f2328;font:13px system-ui,sans-serif}.small{font-size:11.5px;fill:#59636e}.title{font-weight:600}
.axis{stroke:#d1d9e0}
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}.axis{stroke:#3d444d}}
</style>"""
COLOURS = {
    "lora": "#59636e",
    "lora, half the rank": "#a3abb5",
    "t-lora": "#1b6ef3",
    "t-lora, orthogonal": "#12a5b8",
    "random ranks": "#d9822b",
    "random ranks, then all": "#e8b77d",
    "reversed ranks": "#c93c37",
    "lora, prior kept": "#2f9e44",
}


def tile(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(picture).resize((SIDE * ZOOM,) * 2, Image.Resampling.NEAREST)


def strip(file: Path) -> list[np.ndarray]:
    """The samples of a picture that images.py wrote with `grid`: a line, three times as large, a pixel between them."""
    pixels = np.asarray(Image.open(file).convert("RGB"))[::3, ::3]
    return [pixels[1 : 1 + SIDE, 1 + at : 1 + at + SIDE] for at in range(0, pixels.shape[1] - SIDE, SIDE + 1)]


def sheet(work: Path, concept: Emoji, step: int) -> Image.Image:
    """A line for the base and each arm."""
    found = {"before": f"{concept.name}-base.png"} | {arm.name: f"{concept.name}-{arm.name}-{step}.png" for arm in ARMS}
    side = SIDE * ZOOM + GAP
    width = LEFT + side * sum(map(len, COLUMNS.values())) + 4 * GAP * len(COLUMNS)
    page = Image.new("RGB", (width, TOP + side * len(found)), "white")
    pen = ImageDraw.Draw(page)
    page.paste(tile(concept.picture()).resize((24, 24)), (4, 2))
    pen.text((34, 8), concept.name[:18], fill="black")
    for line, (name, file) in enumerate(found.items()):
        samples = strip(next(work.glob(f"part-*/samples/{file}")))
        y, x = TOP + side * line, LEFT
        pen.text((4, y + side // 2 - 8), name, fill="black")
        for head, places in COLUMNS.items():
            if line == 0:
                pen.text((x, 8), head, fill="black")
            for place in places:
                page.paste(tile(samples[place]), (x, y))
                x += side
            x += 4 * GAP
    return page


def beside(pages: list[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (max(p.width for p in pages), sum(p.height + 12 for p in pages)), "white")
    y = 0
    for page in pages:
        whole.paste(page, (0, y))
        y += page.height + 12
    return whole


def lines_svg(path: Path) -> str:
    """One panel for each of SHOWN: fidelity to the right, cost upwards, so right and low is better."""
    by_arm, keys, bases = complete([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    gain = {arm: x.mean(0) for arm, x in curves(by_arm, keys, bases, lambda line, _: line["fidelity"]).items()}
    width, height, left, top = 236, 230, 44, 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * (width + 20)} {height + top + 66}" role="img">',
        STYLE,
    ]
    low, high = min(x.min() for x in gain.values()), max(x.max() for x in gain.values())
    for panel, name in enumerate(SHOWN):
        cost = {arm: x.mean(0) for arm, x in curves(by_arm, keys, bases, COSTS[name]).items()}
        least, most = min(x.min() for x in cost.values()), max(x.max() for x in cost.values())
        origin = panel * (width + 20)

        def at(fidelity: float, value: float, origin: int = origin, least: float = least, most: float = most) -> str:
            x = origin + left + (fidelity - low) / (high - low) * (width - left - 8)
            return f"{x:.1f},{top + height - (value - least) / (most - least) * (height - 8):.1f}"

        parts.append(f'<text class="title" x="{origin + left}" y="{top - 22}">{name}</text>')
        corner = f"M{origin + left} {top}V{top + height}H{origin + width}"
        parts.append(f'<path class="axis" d="{corner}" fill="none"/>')
        for value, y in ((least, top + height), (most, top + 12)):
            parts.append(f'<text class="small" x="{origin + left - 6}" y="{y}" text-anchor="end">{value:.2g}</text>')
        for value, x, anchor in ((low, origin + left, "start"), (high, origin + width - 8, "end")):
            parts.append(
                f'<text class="small" x="{x}" y="{top + height + 16}" text-anchor="{anchor}">{value:.2f}</text>'
            )
        parts.append(f'<text class="small" x="{origin + left + 70}" y="{top + height + 16}">fidelity</text>')
        for arm, colour in COLOURS.items():
            places = [at(f, c) for f, c in zip(gain[arm], cost[arm], strict=True)]
            parts.append(f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [
                f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>' for p in places[1:]
            ]
    for number, (arm, colour) in enumerate(COLOURS.items()):
        x, y = 44 + number % 4 * 180, top + height + 38 + number // 4 * 18
        parts.append(
            f'<rect x="{x}" y="{y - 9}" width="12" height="9" fill="{colour}"/><text x="{x + 18}" y="{y}">{arm}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lines", type=Path, default=HERE / "images.jsonl")
    parser.add_argument("--concepts", nargs="*", help="names of emoji; the first two where left out")
    parser.add_argument("--step", type=int, default=120)
    parser.add_argument("--out", type=Path, default=DOCS)
    asked = parser.parse_args()
    concepts = split(read(fetch(asked.work))).concepts
    shown = [c for c in concepts if c.name in asked.concepts] if asked.concepts else concepts[:2]
    beside([sheet(asked.work, c, asked.step) for c in shown]).save(asked.out / "t-lora.png", optimize=True)
    (asked.out / "t-lora.svg").write_text(lines_svg(asked.lines), "utf-8")


if __name__ == "__main__":
    main()
