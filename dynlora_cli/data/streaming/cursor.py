"""Where one source of a stream stands, and its next row."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.data.chat.ways import Ways
from dynlora_cli.data.columns import Account
from dynlora_cli.data.examples import Draft
from dynlora_cli.data.read import Reader, drafts
from dynlora_cli.data.sources import tables

if TYPE_CHECKING:
    from dynlora_cli.config.sections import TrainSource

Key = tuple[int, int, int]  # of a row: its source, its file and itself, by their order in the recipe


@dataclass(slots=True)
class Stand:
    """Where a source stands; kept in checkpoints.

    Attributes:
        begun: how often it was begun before.
        table: the file, by its place in the order of this pass.
        rows: rows of that file that were read.
        given: rows that it gave to be trained on, in this pass.
        turns: the same, over all passes that its turns are counted for.
        ended: it has no more to give in this pass.
    """

    begun: int = 0
    table: int = 0
    rows: int = 0
    given: int = 0
    turns: int = 0
    ended: bool = False


class Cursor:
    """Walks over the rows of one source.

    Args:
        reader: of the run.
        number: of the source in the recipe.
        source: a file, a folder of many, or a hub data set.
        shuffled: its files come in another order in every pass, by the reader's seed.

    Raises:
        DataError, UsageError, MachineError: as `tables` of data/sources.py.
    """

    def __init__(self, reader: Reader, number: int, source: TrainSource, *, shuffled: bool) -> None:
        self.reader, self.number, self.source, self.shuffled = reader, number, source, shuffled
        self.tables = tables(source, reader.notes, held_out=False, streamed=True)
        self.account = Account(source, ways=Ways.of(reader.dataset, source))
        self.go_to(Stand())

    @property
    def files(self) -> list[str]:
        """Names of its files; of a hub data set that of the set."""
        return [Path(table.name).name if table.home else table.name for table in self.tables]

    def go_to(self, stand: Stand) -> None:
        """Stand somewhere else; the rows before are read again as far as the file asks for it, and not tokenised."""
        self.stand, self._order = replace(stand), self._ordered(stand.begun)
        self._rows: Iterator[tuple[str, Draft]] | None = None

    def begin_again(self, *, turns: int = 0) -> None:
        """Begin the next pass."""
        self.go_to(Stand(begun=self.stand.begun + 1, turns=turns))

    def next(self) -> tuple[Key, str, Draft] | None:
        """The next row with its place; None at the end of the pass."""
        stand = self.stand
        while not self._is_over():
            file = self._order[stand.table]
            if self._rows is None:
                # Called by its source, so that a note on each of a thousand files is one note.
                table = replace(self.tables[file], name=self.source.path)
                self._rows = drafts(self.reader, self.source, table, self.account, skip=stand.rows)
            found = next(self._rows, None)
            if found is not None:
                stand.rows += 1
                return (self.number, file, stand.rows), *found
            self._rows, stand.table, stand.rows = None, stand.table + 1, 0
        stand.ended, self._rows = True, None
        return None

    def _is_over(self) -> bool:
        most = self.source.rows
        return self.stand.table >= len(self.tables) or (most is not None and self.stand.given >= most)

    def _ordered(self, begun: int) -> list[int]:
        """The files in the order of a pass."""
        order = list(range(len(self.tables)))
        if self.shuffled:
            # With `rows` every pass takes the same ones, so the order is that of the first pass.
            number = 0 if self.source.rows is not None else begun
            random.Random(f"{self.reader.seed} files {self.number} {number}").shuffle(order)
        return order
