"""A picture of a row: where it is, whether it can be read, and what a model is shown of it.

Dimensions: H rows of pixels, W pixels of each.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Resampling

from dynlora_cli.errors import DataError
from dynlora_cli.files.whole import unfinished

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_PIXELS = 1 << 27  # of one picture: 134 million, 400 MB as RGB
MOST_BYTES = 1 << 28
LONGEST_NAME = 1000  # characters of a picture's path
SMALLER = "make it smaller, or leave the row out"
SAVE_AGAIN = "save it again as PNG or JPEG, or leave the row out"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was looked at once, and is opened again when it is needed.

    Args:
        content: its file, or what stands in such a file.
        place: of its row, in words.
        digest: of the file.
        size: pixels of a line, and lines.
    """

    content: Path | bytes
    place: str
    digest: bytes
    size: tuple[int, int]

    @classmethod
    def find(cls, image: str | bytes, home: Path | None, place: str) -> Picture:
        """The picture that a row names.

        Args:
            image: path of its file, or the file's content.
            home: the folder from which the path counts.
            place: of the row.

        Raises:
            DataError: it is not there, lies outside that folder, is too large, or is no picture that can be read.
        """
        content = _inside(image, home, place) if isinstance(image, str) else image
        stored = content.stat().st_size if isinstance(content, Path) else len(content)
        if stored > MOST_BYTES:
            raise DataError(f"{place}: the picture is a file of {stored >> 20} MiB, more than {MOST_BYTES >> 20}")
        try:
            raw = content.read_bytes() if isinstance(content, Path) else content
        except OSError as error:
            raise DataError(f"{place}: {content!s} cannot be read: {error.strerror}") from None
        opened = _opened(raw, _called(content, place), place)
        return cls(content, place, hashlib.sha256(raw).digest(), opened.size)

    def square(self, side: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Its middle as so many lines of as many pixels, [H, W, 3]; and the line and pixel that it begins with.

        Raises:
            DataError: its file is no longer there, or no picture any more.
        """
        try:
            raw = self.content.read_bytes() if isinstance(self.content, Path) else self.content
        except OSError as error:
            raise DataError(f"{self.place}: {self.content!s} cannot be read: {error.strerror}") from None
        image = _opened(raw, _called(self.content, self.place), self.place)
        share = side / min(image.size)
        width, height = (max(side, round(share * length)) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), Resampling.LANCZOS)
        top, left = (height - side) // 2, (width - side) // 2
        return np.asarray(image.crop((left, top, left + side, top + side))), (top, left)


def write_picture(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write pixels [H, W, 3] as a PNG, whole or not at all."""
    temporary = unfinished(path)
    Image.fromarray(pixels).save(temporary, format="PNG")
    os.replace(temporary, path)


def _called(content: Path | bytes, place: str) -> str:
    """What a message calls it that begins with the row's place, which of a folder of pictures is the picture's."""
    return str(content) if isinstance(content, Path) and str(content) != place else "the picture"


def _inside(name: str, home: Path | None, place: str) -> Path:
    """The file of a name, which lies in the folder of the rows.

    Raises:
        DataError: it lies elsewhere, or is no file.
    """
    if home is None:
        raise DataError(f"{place}: names the picture {name!r}, and its rows are in no folder", "store its content")
    if "\0" in name or len(name) > LONGEST_NAME:
        raise DataError(f"{place}: {name[:40]!r}... is no name of a picture", "write the path of its file")
    path, root = home / name, home.resolve()
    target = path.resolve()
    if Path(name).is_absolute() or root not in target.parents:
        raise DataError(
            f"{place}: the picture {name!r} lies outside {home}, the folder of the rows; it was not opened",
            "put the pictures into that folder or one below it, and write paths that begin there",
        )
    try:
        is_file = path.is_file()
    except OSError as error:
        raise DataError(f"{place}: the picture {name[:40]!r}... cannot be opened: {error.strerror}") from None
    if not is_file:
        what = "is no file" if path.exists() else "is not there"
        raise DataError(f"{place}: the picture {path} {what}", "paths begin at the folder of the file of rows")
    return path


def _opened(raw: bytes, called: str, place: str) -> Image.Image:
    """A picture in RGB, upright, on white where it is transparent.

    Raises:
        DataError: it is too large, damaged, or none.
    """
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            upright = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError:
        raise DataError(f"{place}: {called} has more than {MOST_PIXELS // 10**6} million pixels", SMALLER) from None
    except (OSError, ValueError, SyntaxError, ArithmeticError, IndexError) as error:
        if isinstance(error, Image.UnidentifiedImageError):
            raise DataError(f"{place}: {called} is no picture in {', '.join(FORMATS)}", SAVE_AGAIN) from None
        raise DataError(f"{place}: {called} is damaged: {error}", SAVE_AGAIN) from None
    if upright.mode.startswith("I"):  # grey in 16 bits: Pillow would make all from 255 on white
        upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        ground = Image.new("RGBA", upright.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(ground, upright)
    return upright.convert("RGB")
