"""A picture and its caption.

What it does
    The picture is cut to a square in its middle, and made as large as the base draws. The caption is what it is to be
    asked for by.

When to use it
    For `model.task: text-to-image`. A folder of pictures is such rows as well: beside NAME.png, NAME.txt is its
    caption.

Columns
    `image` (or `file_name`): the path of a PNG, JPEG, WebP or BMP, from the folder of the file of rows; in Parquet also
    the file's content, as `datasets` stores it. `text` (or `caption`, or `prompt`): the caption; it may be missing
    where `model.caption` says it for all.

Reference
    ImageFolder of Hugging Face's datasets, and the data of diffusers' train_text_to_image_lora.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from dynlora_cli.data.forms import BadRowError, Captioned, text_of

COLUMNS = "image, text"
ALSO = ("file_name", "caption", "prompt")
FORMS = ("Captioned",)
PRECEDENCE = 1


def matches(columns: Set[str]) -> bool:
    """Whether rows with these columns can be read as pictures with captions."""
    return bool({"image", "file_name"} & columns)


def to_example(row: Mapping[str, Any], *, has_template: bool) -> Captioned:  # noqa: ARG001
    """The picture and the caption of a row.

    Args:
        row: the row, columns already renamed.
        has_template: of no meaning here.

    Raises:
        BadRowError: there is no picture, the caption is no text, or there are several of one of them.
    """
    at = _one_of(row, ("image", "file_name"), "picture")
    image = row[at] if at else None
    if isinstance(image, Mapping):  # as `datasets` stores one
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if not isinstance(image, (str, bytes)) or not image:
        raise BadRowError("column 'image' names no picture")
    named = _one_of(row, ("text", "caption", "prompt"), "caption")
    caption = text_of(row, named) if named else None
    return Captioned(image, caption if caption and caption.strip() else None)


def _one_of(row: Mapping[str, Any], names: tuple[str, ...], what: str) -> str | None:
    """The one of these columns in which something stands.

    Raises:
        BadRowError: there are several, and they differ.
    """
    found = [name for name in names if row.get(name) not in (None, "")]
    if any(row[name] != row[found[0]] for name in found[1:]):
        raise BadRowError(
            f"the columns {', '.join(map(repr, found))} could each be its {what}; keep one, and set the others aside: "
            f"`ignore: [{', '.join(found[1:])}]` beside the path"
        )
    return found[0] if found else None
