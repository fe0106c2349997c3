"""A process that reads pieces of tables for another one (rows/team.py): tasks in, outcomes out."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO

from dynlora_cli.data.chat.template import on_date
from dynlora_cli.data.chat.ways import Ways
from dynlora_cli.data.columns import Account
from dynlora_cli.data.encode_text import TextEncoder
from dynlora_cli.data.read import Reader, Told, of_piece
from dynlora_cli.data.rows.blocks import Block
from dynlora_cli.data.rows.team import Outcome, Task


def serve(asks: BinaryIO, answers: BinaryIO) -> None:
    """Answer tasks until there are no more, or nobody reads the answers."""
    reader: Reader = pickle.load(asks)
    with on_date(reader.writing.moment):
        while True:
            try:
                task: Task = pickle.load(asks)
            except EOFError:
                return
            pickle.dump(_answer(reader, task), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _answer(reader: Reader, task: Task) -> Outcome | str:
    """What a piece comes to; a text where it comes to nothing: the other process reads it then, and says why."""
    account = Account(task.shape.source, ways=Ways.of(reader.dataset, task.shape.source))
    account.unread = task.account
    reader.told = Told()
    assert isinstance(reader.encoder, TextEncoder)
    reader.encoder.forget(task.known)
    try:
        kept, rows = of_piece(reader, task.shape, account, task.piece.rows())
        block = Block.of(kept)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    told = reader.told
    told.notes = list(dict.fromkeys(told.notes))
    return Outcome(block, rows, told, account.unread, account.seen, account.choices, reader.encoder.findings)


def main() -> None:
    """Take over standard input and output, so that nothing else is ever written there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process hears it, and ends this one
    answers: Any = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(BrokenPipeError):
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
