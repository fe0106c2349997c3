"""Descriptions of tasks: texts that a source of rows comes with, of which each row gets one.

Which one is drawn by the run's seed and the number of the row, so that it stays the same over epochs and on resuming.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.data.examples import OneText
from dynlora_cli.errors import DataError, UsageError
from dynlora_cli.text import show

if TYPE_CHECKING:
    from dynlora_cli.config.sections import Source
    from dynlora_cli.data.splits import Kept


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


def describe(rows: Sequence[Kept], sources: Sequence[Source], seed: int) -> None:
    """Give each row one of the descriptions of its source.

    Args:
        rows: of these sources.
        sources: as in the recipe.
        seed: of the draw.

    Raises:
        UsageError, DataError: as of `read_descriptions`.
    """
    texts = [read_descriptions(source) for source in sources]
    for row in rows:
        if texts[row.source] and isinstance(row.example, OneText):
            chance = random.Random(f"{seed} description of {row.example.row}")  # hashed alike on every machine
            row.example.description = chance.choice(texts[row.source])
