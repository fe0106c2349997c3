"""`builtin:shapes`: small drawings with captions, made here, to try `model.task: text-to-image` without a download.

The built-in pipeline `builtin:tiny-image` has seen squares, discs and crosses in six colours; the rows are triangles,
which it has not. Every fourth drawing is held out.

Dimensions: H lines, W pixels of each.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 16
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (230, 200, 40),
    "violet": (150, 60, 200),
    "black": (30, 30, 30),
}
NEW = "triangle"
SHAPES = ("square", "disc", "cross")
PLACES = [(x, y, size) for x in (6, 7, 8, 9) for y in (6, 7, 8, 9) for size in (4, 5)]
HELD_OUT = 4  # one drawing in so many


def drawings(which: str) -> Iterator[tuple[NDArray[np.uint8], str]]:
    """Drawings [H, W, 3] and their captions.

    Args:
        which: base, what the built-in pipeline has learned; train or val, what is new to it.
    """
    shapes = SHAPES if which == "base" else (NEW,)
    every = [(shape, colour, place) for shape in shapes for colour in COLOURS for place in PLACES]
    for number, (shape, colour, place) in enumerate(every):
        if which == "base" or (number % HELD_OUT == 0) == (which == "val"):
            yield _drawn(shape, COLOURS[colour], *place), f"a {colour} {shape}"


def rows(which: str) -> Iterator[dict[str, object]]:
    """The same as rows, the drawings as content of PNG files."""
    return ({"image": _png(pixels), "text": caption} for pixels, caption in drawings(which))


def _drawn(shape: str, colour: tuple[int, int, int], x: int, y: int, size: int) -> NDArray[np.uint8]:
    down, across = np.mgrid[0:SIDE, 0:SIDE]
    dx, dy = np.abs(across - x), np.abs(down - y)
    inside = {
        "square": np.maximum(dx, dy) <= size - 1,
        "disc": dx**2 + dy**2 <= size**2,
        "cross": (np.minimum(dx, dy) <= 1) & (np.maximum(dx, dy) <= size),
        NEW: (dx <= (down - y + size) / 2) & (dy <= size),
    }[shape]
    pixels = np.full((SIDE, SIDE, 3), 245, dtype=np.uint8)
    pixels[inside] = colour
    return pixels


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """The content of a PNG file, without pillow: lines of RGB, none of them filtered."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
