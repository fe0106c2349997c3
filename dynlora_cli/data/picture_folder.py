"""Rows of a folder of pictures: NAME.png, and NAME.txt beside it, which holds the caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynlora_cli.errors import DataError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LONGEST_CAPTION = 1 << 16  # bytes; text encoders read a hundred words


def captioned(files: Sequence[Path]) -> list[Path]:
    """The pictures among files, where these are pictures with captions, or pictures alone; else none.

    Texts of which none is the caption of a picture are texts, whatever pictures lie among them.
    """
    pictures = [file for file in files if file.suffix.lower() in ENDINGS]
    texts = {file.with_suffix("") for file in files if file.suffix.lower() == ".txt"}
    return pictures if not texts or any(file.with_suffix("") in texts for file in pictures) else []


def without_picture(files: Sequence[Path], pictures: Sequence[Path]) -> list[Path]:
    """Texts among files that are captions of none of the pictures: theirs is missing, or of a kind that is not read."""
    known = {file.with_suffix("") for file in pictures}
    return [file for file in files if file.suffix.lower() == ".txt" and file.with_suffix("") not in known]


def picture_rows(folder: Path, pictures: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row for each picture, with its path as the place; without `text` where there is no caption.

    Raises:
        DataError: a caption cannot be read, or is a link out of the folder.
    """
    for picture in pictures:
        row = {"image": str(picture.relative_to(folder))}
        file = picture.with_suffix(".txt")
        if file.is_file():
            if folder.resolve() not in file.resolve().parents:
                raise DataError(
                    f"{file} is a link out of {folder}; it was not opened", "put the caption itself there as a file"
                )
            try:
                if file.stat().st_size > LONGEST_CAPTION:
                    raise DataError(f"{file} holds more than {LONGEST_CAPTION >> 10} KiB, which is no caption")
                row["text"] = " ".join(file.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError:
                raise DataError(f"{file} is not UTF-8 text", "save the file as UTF-8") from None
            except OSError as error:
                raise DataError(f"{file} cannot be read: {error.strerror}") from None
        yield str(picture), row
