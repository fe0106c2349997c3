"""Rows of an update that its training never saw: what calibration learns from. They lie in the library as tokens.

So a library can be calibrated again, by anybody, when the files that the rows came from have long gone; and removing
an update removes them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dynlora_cli.data.examples import Classified, Example, OneText, TwoTexts
from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import COPY_AGAIN, fits
from dynlora_cli.files.strict_json import BadJsonError, loads
from dynlora_cli.library.forms import Part
from dynlora_cli.library.keys import finished
from dynlora_cli.library.library import Entry

MOST_ROWS = 512
LONGEST_LINE = 1 << 24  # characters
FIELDS = ("row", "input_ids", "labels", "label", "token_types")
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (OneText, TwoTexts, Classified)}

Token = Annotated[int, Field(ge=0, lt=2**31)]


class RowForm(BaseModel):
    """A line of the file: the fields of its class in data/examples.py, and the request in it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    request: str
    kind: Literal["OneText", "TwoTexts", "Classified"]
    row: Annotated[int, Field(ge=0)]
    input_ids: Annotated[list[Token], Field(min_length=1)]
    labels: list[Annotated[int, Field(ge=-100, lt=2**31)]] | None = None
    label: Annotated[int, Field(ge=0)] | None = None
    token_types: list[Token] | None = None


@dataclass(frozen=True)
class HeldOut:
    """A row with its request.

    Attributes:
        text: of the request.
        example: the whole row, as the model sees it.
    """

    text: str
    example: Example


def choose_held_out(rows: Sequence[HeldOut], keys: Sequence[str], most: int = MOST_ROWS) -> list[HeldOut]:
    """At most so many rows, by the hash of their request; none whose request is a key, which would find itself."""
    known = set(keys)
    new = [row for row in rows if row.text and row.text not in known and _kind(row.example)]
    order = sorted(range(len(new)), key=lambda index: (_hash(new[index].text), index))
    return [new[index] for index in sorted(order[:most])]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def write_held_out(path: Path, rows: Sequence[HeldOut]) -> Part:
    """Write held_out/NAME.jsonl."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(_line(row))}\n" for row in rows), encoding="utf-8")
    return finished(path, len(rows))


def _line(row: HeldOut) -> dict[str, Any]:
    """What a loss needs of an example."""
    fields = {key: getattr(row.example, key, None) for key in FIELDS}
    kept = {key: value if isinstance(value, int) else list(value) for key, value in fields.items() if value is not None}
    return {"request": row.text, "kind": _kind(row.example), **kept}


def _kind(example: Example) -> str | None:
    """The class by which a row is read again; None: there is none for it."""
    return next((name for name, kind in KINDS.items() if isinstance(example, kind)), None)


def read_held_out(entry: Entry) -> list[HeldOut]:
    """The rows of an update, in the order of their file.

    Raises:
        UsageError: the file is missing, or not what library.json says.
    """
    path, rows = entry.paths.held_out, []
    try:
        with path.open(encoding="utf-8") as file:
            for line in islice(iter(lambda: file.readline(LONGEST_LINE), ""), entry.held_out + 1):
                rows.append(_row(loads(line), path))
    except (OSError, UnicodeError, BadJsonError) as error:
        raise UsageError(f"{path} cannot be read: {error}", COPY_AGAIN) from None
    if len(rows) != entry.held_out:
        raise UsageError(f"{path} is damaged: it has not the {entry.held_out} rows of {entry.name}", COPY_AGAIN)
    return rows


def unreadable(row: HeldOut, known: int, context: int | None) -> str | None:
    """Why a model cannot be measured on a row; None where it can.

    Args:
        row: of a library, which anybody may have written.
        known: tokens that the model knows.
        context: tokens that it reads; None: nobody says.
    """
    example = row.example
    if max(map(max, filter(None, example.texts)), default=0) >= known:
        return f"a row has a token that the base does not know, of which it has {known:,}"
    if context is not None and example.longest > context:
        return f"a row has {example.longest:,} tokens, and the base reads {context:,}"
    if not example.supervised():
        return "a row has no target"
    return None


def _row(data: Any, path: Path) -> HeldOut:
    if not isinstance(data, dict):
        raise BadJsonError("a line that is no object")
    form = fits(RowForm, data, path)
    ids = array("i", form.input_ids)
    if form.kind == "Classified":
        types = None if form.token_types is None else array("i", form.token_types)
        return HeldOut(form.request, Classified(ids, form.label or 0, form.row, types))
    labels = array("i", form.labels or ())
    if form.kind == "OneText" and len(labels) != len(ids):
        raise BadJsonError("a row with more or fewer labels than tokens")
    return HeldOut(form.request, KINDS[form.kind](ids, labels, form.row))
