"""Descriptions of tasks: texts that a source of rows comes with, of which each row gets one.

Which one is drawn by the run's seed, the number of the row and that of the pass over the rows: a run that goes on draws
the same. Rows that are measured keep the one of the first pass.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.text import show

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Source
    from dynlora_cli.data.examples import Example
    from dynlora_cli.data.rows.kept import Kept


def read_descriptions(source: Source) -> list[str]:
    """The descriptions of a source, a file's without white space around them; none where it has none.

    Raises:
        UsageError: there is no such file, or it cannot be read.
        DataError: it holds none, or one of them twice.
    """
    if not isinstance(source.descriptions, str):
        return list(source.descriptions or ())
    path = Path(source.descriptions).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        text = f"descriptions of {source.path}: there is no file {source.descriptions}"
        raise UsageError(text, f"a text stands in a list: descriptions: [{show(source.descriptions)}]") from None
    except OSError as error:
        raise UsageError(f"descriptions of {source.path}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text", "save it as UTF-8, one description on a line") from None
    places: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if text := line.strip():
            if text in places:
                raise DataError(f"{path}:{number}: {show(text)} stands on line {places[text]} already", "leave one out")
            places[text] = number
    if not places:
        raise DataError(f"{path} holds no description", "write one on each line")
    return list(places)


def describe(rows: Sequence[Kept], sources: Sequence[Source], seed: int, *, trained: bool) -> None:
    """Give each row one of the descriptions of its source.

    Args:
        rows: of these sources.
        sources: as in the recipe.
        seed: of the draw.
        trained: they are trained on, and draw again in each pass.

    Raises:
        UsageError, DataError: as of `read_descriptions`.
    """
    texts = [read_descriptions(source) for source in sources]
    for row in rows:
        if texts[row.source] and isinstance(row.example, OneText):
            row.example.description = _draw(texts[row.source], seed, row.example.row)
            row.example.wordings = texts[row.source] if trained else ()


def described(example: Example, seed: int, epoch: int) -> Example:
    """A row as it is in a pass: the same but for its description.

    Args:
        example: the row.
        seed: of the draw, as of `describe`.
        epoch: of the pass, from 0.
    """
    if epoch == 0 or not isinstance(example, OneText) or len(example.wordings) < 2:
        return example
    other = copy.copy(example)
    other.description = _draw(example.wordings, seed, example.row, epoch)
    return other


def _draw(texts: Sequence[str], seed: int, row: int, epoch: int = 0) -> str:
    again = f" in pass {epoch}" if epoch else ""
    return random.Random(f"{seed} description of {row}{again}").choice(texts)  # hashed alike on every machine
