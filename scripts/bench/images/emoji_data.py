"""Captioned emoji for images.py: pictures of 16 x 16, a split, and contexts that a caption names and a pixel can check.

The pictures are those of npm's `emoji-datasource-google` (Noto Emoji, Apache 2.0), fetched by `npm pack`. A context is a
colour of the background and a place of the emoji (small, in a corner). One-shot training shows a concept in one context;
whether prompts with another context are still followed is what overfitting costs first.
"""

from __future__ import annotations

import json
import random
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
SIDE = 16  # pixels
COLOURS = {
    "white": (255, 255, 255),
    "red": (220, 40, 40),
    "yellow": (250, 220, 60),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "purple": (150, 60, 190),
    "black": (0, 0, 0),
}
PLACES = {"": None, "top left": (0, 0), "top right": (24, 0), "bottom left": (0, 24), "bottom right": (24, 24)}
SMALL = 40  # pixels of 64 that an emoji in a corner takes
FLAGS = 60  # country flags that are kept, of 259
HELD_OUT, CONCEPTS, TUNING = 128, 20, 4
CONCEPT_CLASSES = (
    "animal",
    "food",
    "transport",
    "plant",
    "musical",
    "clothing",
    "place building",
    "drink",
    "household",
)


@dataclass(frozen=True)
class Emoji:
    """One picture with its words.

    Attributes:
        file: its PNG of 64 x 64.
        name: as Unicode names it, in lower case.
        kind: its subcategory in words, such as `animal mammal`.
    """

    file: Path
    name: str
    kind: str

    def caption(self, colour: str = "white", place: str = "", *, form: str = "both") -> str:
        """`NAME`, `KIND` or `KIND, NAME`, and the context where it is not the plain one."""
        words = {"name": self.name, "kind": self.kind, "both": f"{self.kind}, {self.name}"}[form]
        return words + context(colour, place)

    def picture(self, colour: str = "white", place: str = "") -> np.ndarray:
        """RGB (SIDE, SIDE, 3), bytes, on a background of that colour."""
        canvas = Image.new("RGBA", (64, 64), (*COLOURS[colour], 255))
        own = Image.open(self.file).convert("RGBA").resize((64, 64))
        corner = PLACES[place]
        if corner is not None:
            own = own.resize((SMALL, SMALL), Image.Resampling.BOX)
        canvas.alpha_composite(own, corner or (0, 0))
        return np.asarray(canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))


@dataclass(frozen=True)
class Split:
    """Emoji that the base sees, some that it never sees (drift), concepts, and concepts that settings are chosen on."""

    train: tuple[Emoji, ...]
    held_out: tuple[Emoji, ...]
    concepts: tuple[Emoji, ...]
    tuning: tuple[Emoji, ...]


def context(colour: str = "white", place: str = "") -> str:
    """The words for a context; nothing for a large emoji on white."""
    return (f", small {place}" if place else "") + (f", {colour} background" if colour != "white" else "")


def fetch(work: Path) -> Path:
    """The unpacked package, downloaded where it is not there yet."""
    folder = work / "package"
    if not (folder / "emoji.json").exists():
        work.mkdir(parents=True, exist_ok=True)
        found = sorted(work.glob("emoji-datasource-google-*.tgz"))
        if not found:
            subprocess.run(["npm", "pack", PACKAGE], cwd=work, check=True)
            found = sorted(work.glob("emoji-datasource-google-*.tgz"))
        with tarfile.open(found[-1]) as archive:
            wanted = [m for m in archive.getmembers() if m.name == "package/emoji.json" or "/google/64/" in m.name]
            archive.extractall(work, wanted, filter="data")
    return folder


def read(folder: Path) -> list[Emoji]:
    """All emoji of the package in a fixed order, without skin tones and most country flags."""
    found, flags = [], 0
    for entry in sorted(json.loads((folder / "emoji.json").read_text("utf-8")), key=lambda e: e["unified"]):
        file = folder / "img" / "google" / "64" / entry["image"]
        kind = entry["subcategory"].replace("&", "and").replace("-", " ")
        flags += kind == "country flag"
        if entry["category"] == "Component" or not file.exists() or (kind == "country flag" and flags > FLAGS):
            continue
        name = (entry["name"] or entry["short_name"].replace("_", " ")).lower()
        found.append(Emoji(file, name, kind))
    return found


def split(emoji: list[Emoji]) -> Split:
    """The same for everybody: drawn with a fixed seed; concepts are things, none of them a near copy of another emoji."""
    drawn = list(emoji)
    random.Random(29).shuffle(drawn)
    small = np.stack([e.picture() for e in drawn]).reshape(len(drawn), -1).astype(np.float32) / 127.5 - 1
    squares = (small**2).sum(1)
    distances = (squares[:, None] + squares - 2 * small @ small.T) / small.shape[1]
    np.fill_diagonal(distances, np.inf)
    nearest = distances.min(1)
    things = [e.kind.startswith(CONCEPT_CLASSES) and e.kind != "transport sign" for e in drawn]
    own = [e for e, d, thing in zip(drawn, nearest, things, strict=True) if thing and d > np.median(nearest)]
    concepts = own[: CONCEPTS + TUNING]
    rest = [e for e in drawn if e not in concepts]
    return Split(tuple(rest[HELD_OUT:]), tuple(rest[:HELD_OUT]), tuple(concepts[:CONCEPTS]), tuple(concepts[CONCEPTS:]))


def rows(emoji: tuple[Emoji, ...], count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`count` pictures (count, SIDE, SIDE, 3) and captions: half plain, the others with a colour, a place or both."""
    rng = random.Random(seed)
    pictures, captions = [], []
    for number in range(count):
        one = emoji[number % len(emoji)]
        colour = rng.choice(list(COLOURS)) if rng.random() < 0.45 else "white"
        place = rng.choice(list(PLACES)) if rng.random() < 0.25 else ""
        pictures.append(one.picture(colour, place))
        captions.append(one.caption(colour, place, form=rng.choice(("both", "both", "name", "kind"))))
    return np.stack(pictures), captions


def grid(pictures: np.ndarray, columns: int, *, zoom: int = 3, gap: int = 1) -> Image.Image:
    """Pictures (N, side, side, 3) of bytes, side by side."""
    side = pictures.shape[1] + gap
    lines = -(-len(pictures) // columns)
    sheet = np.full((lines * side + gap, columns * side + gap, 3), 128, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * side + gap, number % columns * side + gap
        sheet[top : top + side - gap, left : left + side - gap] = picture
    return Image.fromarray(sheet).resize((sheet.shape[1] * zoom, sheet.shape[0] * zoom), Image.Resampling.NEAREST)
