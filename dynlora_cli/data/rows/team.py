"""Other processes that parse rows, write them by their template and tokenise them, for files that are large.

Rows keep their order, and are read as if one process had read them all: a piece is read knowing what those before it
have told (which fields a template writes, the first value of a column). Where something was learned meanwhile, or a row
is at fault, this process reads the piece itself, and so says what it would have said alone.

The processes are ordinary ones that talk over pipes: they end with this one, however it ends, and need nothing of the
program that has called it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dynlora_cli.data.columns import Account
from dynlora_cli.data.encode_text import Findings, Known, TextEncoder
from dynlora_cli.data.read import Reader, Shape, Told, of_piece
from dynlora_cli.data.rows.blocks import Block
from dynlora_cli.data.rows.pieces import Piece
from dynlora_cli.errors import DynloraError, MachineError

if TYPE_CHECKING:
    from dynlora_cli.data.rows.kept import Kept

_AHEAD = 3  # pieces for each process that are read from the file before they are wanted
MOST = 16  # processes where nobody says how many: this one parts the file and writes what they make


@dataclass(frozen=True, slots=True)
class Task:
    """A piece to be read, with what is known from the rows before it; `shape` of another table than before."""

    piece: Piece
    shape: Shape
    account: dict[str, Any]
    known: Known


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rows of a piece, numbered from 0, how many there were, and what was told and learned."""

    block: Block
    rows: int
    told: Told
    account: dict[str, Any]
    columns: set[str]
    choices: int
    findings: Findings


class Worker:
    """One process.

    Args:
        reader: what it reads by, pickled.
    """

    def __init__(self, reader: bytes) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        # Its model is elsewhere: without torch it starts sooner and takes a fifth of the memory.
        alone = {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dynlora_cli.data.rows.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | alone,
        )
        self._reader: bytes | None = reader

    def ask(self, task: Task) -> Outcome | str:
        """The outcome of a task, or why there is none.

        Raises:
            MachineError: the process has ended.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            if self._reader is not None:
                self._process.stdin.write(self._reader)
                self._reader = None
            pickle.dump(task, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            outcome: Outcome | str = pickle.load(self._process.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            code = self._process.wait()
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise MachineError(
                f"a process that reads rows was {how}" if code < 0 else f"a process that reads rows {how}",
                "where memory is short, set dataset.workers: 1; what was read is not kept, so start again",
            ) from None
        return outcome

    def end(self) -> None:
        """Stop it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(OSError):  # what was still to be written
                    pipe.close()


class Team:
    """Processes that read pieces of tables."""

    def __init__(self, count: int, reader: bytes) -> None:
        self._workers = [Worker(reader) for _ in range(count)]
        self._free: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._threads = ThreadPoolExecutor(count)

    @classmethod
    @contextmanager
    def of(cls, reader: Reader) -> Iterator[Team | None]:
        """As many processes as the recipe asks for; None where this one reads alone."""
        asked = reader.dataset.workers
        count = min(MOST, _cores()) if asked == "auto" else asked
        if count < 2:
            yield None
            return
        try:
            bare = pickle.dumps(replace(reader, told=Told()), pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:  # such as a tokenizer of a program's own
            reader.notes.append(f"one process reads the rows, for what it reads by cannot be sent to others: {error}")
            yield None
            return
        team = cls(count, bare)
        try:
            yield team
        finally:
            team.end()

    def read(
        self, reader: Reader, shape: Shape, account: Account, pieces: Iterator[Piece], first: int
    ) -> Iterator[tuple[list[Kept] | Block, int]]:
        """Rows of the pieces of one table, in order, and how many each was with those that are dropped.

        Args:
            reader: told what there is to tell.
            shape: of the table.
            account: of its source.
            pieces: behind those that were read.
            first: the number of their first row.
        """
        waiting: deque[tuple[Task, Future[Outcome | str]]] = deque()
        fault: BaseException | None = None
        while True:
            while fault is None and len(waiting) < _AHEAD * len(self._workers):
                try:
                    task = Task(next(pieces), shape, dict(account.unread), _known(reader))
                except StopIteration:
                    fault = StopIteration()
                except (DynloraError, OSError) as error:  # said when all rows before it are read
                    fault = error
                else:
                    waiting.append((task, self._threads.submit(self._ask, task)))
            if not waiting:
                break
            task, asked = waiting.popleft()
            found = self._settled(reader, account, task, asked.result(), first)
            first += found[1]
            yield found
        if not isinstance(fault, StopIteration) and fault:
            raise fault

    def _ask(self, task: Task) -> Outcome | str:
        worker = self._free.get()
        try:
            return worker.ask(task)
        finally:
            self._free.put(worker)

    def _settled(
        self, reader: Reader, account: Account, task: Task, found: Outcome | str, first: int
    ) -> tuple[list[Kept] | Block, int]:
        known = (account.unread.keys(), _known(reader)) == (task.account.keys(), task.known)
        if isinstance(found, str) or not known:
            again = of_piece(reader, task.shape, account, task.piece.rows(), first)
            if isinstance(found, str):  # a row at fault would have said so by now
                raise MachineError(f"a process that reads rows failed: {found}", "set dataset.workers: 1")
            return again
        reader.told.add(found.told)
        account.unread = found.account
        account.seen |= found.columns
        account.choices += found.choices
        assert isinstance(reader.encoder, TextEncoder)
        reader.encoder.add(found.findings)
        return found.block.moved("numbers", first), found.rows

    def end(self) -> None:
        """Stop the processes."""
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(cancel_futures=True)


def _known(reader: Reader) -> Known:
    assert isinstance(reader.encoder, TextEncoder)
    written, looks = reader.encoder.unwritten.known
    return set(written), dict(looks)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
