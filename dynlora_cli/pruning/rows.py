"""The rows that a cut is chosen by, and those that it is measured on."""

from __future__ import annotations

from dataclasses import replace

from dynlora_cli.evaluation.rows import Rows
from dynlora_cli.runs.events import Emit, note
from dynlora_cli.text import counted

FILE_ROWS = 128  # of a file, where nobody says how many: a thousand choose hardly better, and take 8 times as long


def some_of(rows: Rows, emit: Emit) -> Rows:
    """So many of the rows as tell enough, evenly spread, since files are often sorted."""
    there = len(rows.examples)
    if there <= FILE_ROWS:
        return rows
    emit(note(f"looks at {FILE_ROWS} of {counted(there, 'row')}, evenly spread; --max-samples says how many"))
    return replace(rows, examples=[rows.examples[i * there // FILE_ROWS] for i in range(FILE_ROWS)])


def halves(rows: Rows, emit: Emit) -> tuple[Rows, Rows]:
    """Every other row to choose by, and the others to measure on: on its own rows a choice looks better than it is."""
    if len(rows.examples) < 2:
        return rows, rows
    choosing, measured = (replace(rows, examples=rows.examples[first::2]) for first in (0, 1))
    emit(note(f"{counted(len(choosing.examples), 'row')}, every other one, choose what stays"))
    return choosing, measured
