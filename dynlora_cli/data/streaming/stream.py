"""The rows of a recipe, block by block, for data that are not read before the run begins.

A block is what a small data set would be: so many rows (`dataset.shuffle_buffer`), shuffled, sorted by length, packed
and cut into steps by data/batches.py. What is in memory does not grow with the data.

Order    The files of a source come in an order of the seed, another one in each pass. Rows of several sources are taken
         in turn: as many of each until it ends, or by their weights, where a recipe gives any; then what ends begins
         again, and there is no pass over all. With `dataset.shuffle: false` rows come as they stand, source by source.
Held out Rows whose prompt has a hash below `dataset.val_size`. Those of the first block are measured on; such rows of
         later blocks are left out.
Place    Where a block begins, as numbers: a run that goes on reads on from there. The rows of a block stand in the
         order of the recipe, so a block that holds all rows gives the batches that these have without a stream.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dynlora_cli.data.chat.template import Writing, on_date
from dynlora_cli.data.examples import Example
from dynlora_cli.data.read import Reader, fit
from dynlora_cli.data.rows.kept import Kept, KeptList, KeptRows, counts_of, listed
from dynlora_cli.data.splits import number_labels
from dynlora_cli.data.streaming.cursor import Cursor, Key, Stand
from dynlora_cli.errors import DataError
from dynlora_cli.text import counted

# As JSON: the block's number; before it, rows that were read, given to be trained on, and left out as their prompt is
# held out, whole passes, and counts; and the `Stand` of every source.
Place = dict[str, Any]


@dataclass(slots=True)
class Block:
    """Rows that are in memory together.

    Attributes:
        number: counted from 0; it goes into the seed of the order.
        start, end: places of its first row and of the next block's.
        examples: to be trained on.
        places: of the examples, for messages (`data.jsonl:3`), by `Example.row`.
        notes: what was found out while reading it.
    """

    number: int
    start: Place
    end: Place
    examples: Sequence[Example]
    places: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Over the tokens and targets of its examples."""
        digest = hashlib.sha256()
        for example in self.examples:
            for part in (example.input_ids, example.label_ids):
                digest.update(array("i", part).tobytes() + b"|")
        return digest.hexdigest()


class StoppedError(Exception):
    """Nobody wants the block any more that is being read."""


class Stream:
    """Reads blocks one after the other.

    Args:
        reader: of the run.
        share: of the prompts to hold out.

    Attributes:
        counts: of the rows that were trained on so far, each counted once; after a whole pass, of all.
        first: the first block.
        stopping: set to end a thread that reads.

    Raises:
        DataError, UsageError, MachineError: as `tables` of data/sources.py.
    """

    first: Block

    def __init__(self, reader: Reader, share: float) -> None:
        dataset = reader.dataset
        self.reader, self.share, self.size = reader, share, dataset.shuffle_buffer
        self.weights = [source.weight for source in dataset.train]
        self.weighted, self.shuffled = len(set(self.weights)) > 1, dataset.shuffle
        self.cursors = [
            Cursor(reader, number, source, shuffled=dataset.shuffle) for number, source in enumerate(dataset.train)
        ]
        self.number, self.rows, self.given, self.left_out, self.passes = 0, 0, 0, 0, 0
        self.counts = counts_of([]) | {"dropped": 0}
        self.labels: list[str] | None = None
        self.kept_back: set[bytes] = set()  # prompts of rows to choose the rank by
        self.stopping = False
        self._told: set[str] = set()

    # -- the first block, from which everything is learned that must be known before ---------------------------------

    def opening(self) -> tuple[KeptRows, int]:
        """The first rows, those to be held out among them, and how many were dropped.

        Called once, and followed by `settle`.
        """
        self._start = self.place()
        kept = self._read(whole=True)
        for cursor in self.cursors:
            if cursor.stand.rows or cursor.stand.table:
                cursor.account.settle(self.reader.notes)
        return KeptList(row for _, _, row in kept), self.reader.lost[False].total()

    def split(self, rows: KeptRows) -> tuple[KeptRows, KeptRows]:
        """Rows of the first block to train on, and those held out."""
        kept = listed(rows)
        train = [row for row in kept if not self.holds_out(row.prompt)]
        if self.share and len(train) in (0, len(rows)):
            self.share = 0
            self.reader.notes.append(
                f"no rows held out: {counted(len(rows), 'row')} of the first block have too few prompts to hold out "
                "some; name a file in dataset.val, or raise dataset.shuffle_buffer, to measure held-out loss"
            )
            return rows, KeptList()
        return KeptList(train), KeptList(row for row in kept if self.holds_out(row.prompt))

    def settle(
        self,
        examples: Sequence[Example],
        counts: dict[str, int],
        kept_back: KeptRows,
        labels: list[str] | None,
        writing: Writing,
    ) -> str:
        """Go by what the first block has shown.

        Args:
            examples: of the first block, to be trained on.
            counts: of them, which grow with what comes.
            kept_back: rows to choose the rank by: what has their prompts is left out.
            labels: names of the classes.
            writing: how rows are written; so are those that come.

        Returns:
            What a person should know of the rows that come.
        """
        self.counts, self.labels, self.reader.writing = counts, labels, writing
        self.kept_back = {row.prompt for row in listed(kept_back)}
        self._told.update(self.reader.notes)
        self.reader.notes = []
        self.number, self.given = 1, len(examples)
        self.first = Block(0, self._start, self.place(), examples)
        read = f"dataset.streaming: {counted(len(examples), 'row')} to train on are read at first"
        said = [f"{read}, and these are all" if self._is_whole() else f"{read}; how many there are is not known"]
        if self.weighted:
            said.append("rows are taken from the sources by their weights, and a source that ends begins again")
        return "; ".join(said)

    def _is_whole(self) -> bool:
        """Whether the first block holds all rows; nobody knows where it ends with the last one."""
        return all(cursor.stand.ended for cursor in self.cursors)

    @property
    def files(self) -> list[list[str]]:
        """The files of each source, which a run that goes on must find: their order is made of them."""
        return [cursor.files for cursor in self.cursors]

    def holds_out(self, prompt: bytes) -> bool:
        """Whether rows with this prompt are not trained on; the same prompts in whatever order rows come."""
        if prompt in self.kept_back:
            return True
        digest = hashlib.sha256(b"%d:" % self.reader.seed + prompt).digest()
        return int.from_bytes(digest[:8], "big") < self.share * 2**64

    # -- reading on --------------------------------------------------------------------------------------------------

    def place(self) -> Place:
        """Where the next block begins."""
        return {
            "number": self.number,
            "rows": self.rows,
            "given": self.given,
            "left_out": self.left_out,
            "passes": self.passes,
            "counts": dict(self.counts),
            "sources": [asdict(cursor.stand) for cursor in self.cursors],
        }

    def go_to(self, place: Place) -> None:
        """Read on from a place."""
        self.number, self.rows, self.given = place["number"], place["rows"], place["given"]
        self.left_out, self.passes, self.counts = place["left_out"], place["passes"], dict(place["counts"])
        for cursor, stand in zip(self.cursors, place["sources"], strict=True):
            cursor.go_to(Stand(**stand))

    def block(self) -> Block:
        """The next block.

        Raises:
            DataError: a row that cannot be trained on, or nothing is left. MachineError: the hub is out of reach.
            StoppedError: as was asked for.
        """
        start, reader = self.place(), self.reader
        kept = self._read(whole=False)
        rows = [row for _, _, row in kept]
        if not rows:
            raise DataError("dataset.train: no rows are left to train on", "bring the files back as they were")
        if self.labels is not None:
            number_labels(rows, self.labels, reader.notes)
        examples = [row.example for row in rows]
        reader.encoder.settle(examples, [row.prompt for row in rows])
        self.number, self.given = self.number + 1, self.given + len(rows)
        notes = [note for note in dict.fromkeys(reader.notes) if note not in self._told]
        self._told.update(notes)
        reader.notes = []
        places = {row.example.row: place for _, place, row in kept}
        return Block(start["number"], start, self.place(), examples, places, notes)

    def _read(self, *, whole: bool) -> list[tuple[Key, str, Kept]]:
        """Rows of a block, with `whole` those held out as well, which do not count; a pass ends a block."""
        kept: list[tuple[Key, str, Kept]] = []
        wanted, again = self.size, not whole
        with on_date(self.reader.writing.moment):
            while wanted:
                cursor = self._turn()
                if cursor is None:
                    if kept or not again:
                        break
                    again = False
                    self.passes += 1
                    for each in self.cursors:
                        each.begin_again()
                    continue
                for found in self._taken(cursor, whole=whole):
                    kept.append(found)
                    wanted -= not self.holds_out(found[2].prompt)
        if self.shuffled:
            kept.sort(key=lambda found: found[0])
        return kept

    def _turn(self) -> Cursor | None:
        """The source that gives the next row; None where all have ended."""
        if self.weighted:
            for cursor in self.cursors:
                if cursor.stand.ended:
                    self._refuse_barren(cursor)
                    cursor.begin_again(turns=cursor.stand.turns)
        going = [cursor for cursor in self.cursors if not cursor.stand.ended]
        if not self.shuffled and not self.weighted:
            return next(iter(going), None)
        return min(going, key=lambda c: ((c.stand.turns + 1) / self.weights[c.number], c.number), default=None)

    @staticmethod
    def _refuse_barren(cursor: Cursor) -> None:
        if not cursor.stand.given:
            raise DataError(
                f"{cursor.source.path}: none of its rows can be trained on, and its weight asks for some",
                "leave the source out, or look at its rows",
            )

    def _taken(self, cursor: Cursor, *, whole: bool) -> list[tuple[Key, str, Kept]]:
        """The rows of a source up to the first that is to be trained on."""
        found: list[tuple[Key, str, Kept]] = []
        while (given := cursor.next()) is not None:
            if self.stopping:
                raise StoppedError
            key, place, draft = given
            once = not cursor.stand.begun
            row = fit(self.reader, place, draft, self.rows)
            self.rows += 1
            if isinstance(row, str):
                if once:
                    self.counts["dropped"] += 1
                    self.reader.lost[False][row] += 1
                continue
            row.source = cursor.number
            if self.holds_out(row.prompt):
                self.left_out += once and not whole
                found += [(key, place, row)] if whole else []
                continue
            cursor.stand.given += 1
            cursor.stand.turns += 1
            if once:
                for name, number in counts_of([row]).items():
                    self.counts[name] += number
            return [*found, (key, place, row)]
        return found
