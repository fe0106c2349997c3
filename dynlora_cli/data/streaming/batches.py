"""The batches of a stream: those of its first block, then those of the next, and so on.

While steps of one block are run, a thread reads the next one. Which rows a step has depends on its number alone, as in
data/batches.py; steps are walked in order, and back to the beginning, as trials of the learning rate do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.streaming.stream import StoppedError
from dynlora_cli.errors import DynloraError, UsageError

if TYPE_CHECKING:
    from dynlora_cli.data.batches import Batch, Batches
    from dynlora_cli.data.examples import Example
    from dynlora_cli.data.load import Data
    from dynlora_cli.data.streaming.stream import Block, Place, Stream


class StreamBatches:
    """The micro-batches of every step of a run; to the loop it is one epoch of `steps` steps.

    Args:
        data: of the run; its counts grow with what is read.
        stream: of the data.
        make: batches of the examples of a block.
        steps: of the whole run.

    Attributes:
        fault: why the rows of a step could not be read.
    """

    def __init__(self, data: Data, stream: Stream, make: Callable[[Sequence[Example]], Batches], steps: int) -> None:
        self.data, self.stream, self.steps_per_epoch = data, stream, steps
        self._make = make
        self.fault: DynloraError | None = None
        self._ahead: Ahead | None = None
        self._notes: list[str] = []
        self._stand_at(0, stream.first)

    @property
    def examples(self) -> Sequence[Example]:
        """Those of the first block."""
        return self.stream.first.examples

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the present block: how many there are in all, nobody knows."""
        return len(self._block.examples)

    def step(self, epoch: int, index: int) -> list[Batch]:  # noqa: ARG002
        """The micro-batches of one optimizer step on this rank; reads on where they are of the next block.

        Raises:
            DataError, UsageError, MachineError: the rows cannot be read.
        """
        self._fetch(index)
        return self._batches.step(self._block.number, index - self._first)

    def prepare(self, epoch: int, index: int) -> None:  # noqa: ARG002
        """Make the step that will be asked for next, where its rows are there."""
        if self._first <= index < self._end:
            self._batches.prepare(self._block.number, index - self._first)

    def shown(self, steps: int) -> Sequence[Example]:
        """The examples of the first so many steps; of those after the first block, nobody knows before."""
        return self._make(self.examples).shown(min(steps, self.steps_per_epoch))

    def _fetch(self, index: int) -> None:
        """Have the rows of a step; it is one of the present block, the first of the next, or an early one.

        Raises:
            DataError, UsageError, MachineError: they cannot be read. What was there before still is.
        """
        if index < self._first:
            self._stop_reading()
            self._stand_at(0, self.stream.first)
            self.stream.go_to(self._block.end)
        while index >= self._end:
            ahead, self._ahead = self._ahead or Ahead(self.stream), None
            try:
                block = ahead.block()
            except DynloraError as error:
                self.fault = error
                raise
            self._stand_at(self._end, block)
        if self._ahead is None and self._end < self.steps_per_epoch:
            self._ahead = Ahead(self.stream)

    def place(self, index: int) -> dict[str, Any]:
        """Where the block of a step begins, one of the present block or the first of the next: for a checkpoint."""
        if index < self._end:
            return {"step": self._first, "sha256": self._block.sha256, **self._block.start}
        return {"step": self._end, **self._block.end}

    def go_to(self, place: dict[str, Any]) -> None:
        """Go on from a place that a checkpoint has.

        Raises:
            DataError, UsageError, MachineError: the rows cannot be read, or are others than they were.
        """
        start: Place = dict(place)
        step, then = start.pop("step"), start.pop("sha256", None)
        if not start["number"]:
            return
        self._stop_reading()
        self.stream.go_to(start)
        block = self.stream.block()
        if then not in (None, block.sha256):
            first = block.places[block.examples[0].row]
            raise UsageError(
                f"the rows that the run was at ({first} and those with it) are not what they were",
                "bring the files back as they were, or start a new run with another --output-dir",
            )
        self._stand_at(step, block)

    def notes(self) -> list[str]:
        """What was found out about rows since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """End reading ahead."""
        self._stop_reading()

    def epochs_after(self, step: int) -> float | None:
        """Passes over all rows after a step of the present block; None in the first, whose end nobody knows."""
        start, end = self._block.start, self._block.end
        if not end["passes"]:
            return None
        share = (step - self._first) / (self._end - self._first)
        seen = start["given"] + share * (end["given"] - start["given"])
        return float(seen / end["counts"]["rows"])

    def on_record(self) -> dict[str, Any]:
        """What was read so far, for the record of the run."""
        end = self._block.end
        return {
            "shuffle_buffer": self.stream.size,
            "blocks": end["number"],
            "passes": end["passes"],
            "rows": end["given"],
            "left_out": end["left_out"],
        }

    def name(self, row: int) -> int | str:
        """The place of a row of the present block, where it is known."""
        return self._block.places.get(row, row)

    def _stand_at(self, step: int, block: Block) -> None:
        """Begin a block with this step."""
        self._block, self._batches, self._first = block, self._make(block.examples), step
        self._end = step + self._batches.steps_per_epoch
        self.data.counts["train"].update(block.end["counts"])
        self._notes += block.notes

    def _stop_reading(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None


class Ahead:
    """The next block of a stream, read in a thread.

    Args:
        stream: that nobody else reads until the block is there.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream, self._found = stream, list[Any]()
        self._thread = Thread(target=self._read, name="rows of the next block", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._found.append(self._stream.block())
        except BaseException as error:  # raised again where the block is asked for
            self._found.append(error)

    def block(self) -> Block:
        """The block, once it is there."""
        self._thread.join()
        (found,) = self._found
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """End reading, and wait until it has; what is wrong with rows that nobody asked for is nobody's fault."""
        self._stream.stopping = True
        self._thread.join()
        self._stream.stopping = False
        (found,) = self._found
        if isinstance(found, BaseException) and not isinstance(found, (StoppedError, DynloraError)):
            raise found
