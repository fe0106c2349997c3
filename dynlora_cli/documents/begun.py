"""The folder beside an output folder in which rows are written, until a run holds them. No torch here.

out/.name.adapt/          beside out/name
  asked.json              what was asked for, so that --resume goes on with the same
  chunk-00001.json ...    requests and answers about each chunk, as they come
  rows.jsonl              the rows, when all are written; and those that are held out
  held_out.jsonl
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.files.foreign import read_object
from dynlora_cli.files.whole import remove, unfinished, write_json
from dynlora_cli.runs import folder as run_folder

ASKED, CHUNK = "asked.json", "chunk-"


@dataclass(frozen=True)
class Begun:
    """Work on an output folder that may have been begun.

    Attributes:
        out: the output folder.
    """

    out: Path

    @cached_property
    def folder(self) -> Path:
        """Where its rows are.

        Raises:
            UsageError: nothing can lie beside the output folder.
        """
        out = self.out.absolute()
        if not out.name:
            raise UsageError(f"--out {self.out} is no folder that can be made", "choose another folder with --out")
        return out.with_name(f".{out.name}.adapt")

    @property
    def is_there(self) -> bool:
        """Whether work was begun; not where a full disk or a kill left an empty folder.

        Raises:
            UsageError: the folder is somebody else's.
        """
        inside = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        if inside - {unfinished(self.folder / ASKED).name} and ASKED not in inside:
            raise UsageError(f"{self.folder} is in the way, and holds no {ASKED} of dynlora", "move it elsewhere")
        return ASKED in inside

    def refuse(self, *, overwrite: bool, resume: bool) -> None:
        """What the disk alone can say against the output folder.

        Raises:
            UsageError: it is not free, or rows for it are half written, or there is nothing to go on with.
        """
        if resume:
            if not self.is_there and not (self.out / run_folder.RECORD).is_file():
                raise UsageError(f"--resume: nothing was begun in {self.out}", "leave --resume out")
            if not self.is_there and "adapted" not in run_folder.read_record(self.out):
                raise UsageError(
                    f"--resume: the run in {self.out} was made from no document", "go on with it by `dynlora train`"
                )
            return
        if self.is_there and not overwrite:
            raise UsageError(
                f"--out {self.out}: rows for it were begun, in {self.folder}",
                "add --resume to go on with them, or --overwrite to begin anew",
            )
        if not overwrite and self._can_go_on():
            raise UsageError(
                f"--out {self.out} holds a run that was stopped",
                "add --resume to go on with it, or --overwrite to begin anew, with its rows as well",
            )
        run_folder.refuse_occupied(self.out, overwrite=overwrite, option="--out")
        beside = next(place for place in self.folder.parents if place.exists())
        if not os.access(beside, os.W_OK):
            raise UsageError(
                f"--out {self.out}: rows are first written beside it, and {beside} may not be written to",
                f"name a folder inside of it: --out {self.out / 'adapter'}",
            )

    def begin(self, sha256: str, *, overwrite: bool, resume: bool) -> str:
        """Make the folder, or go on with it.

        Args:
            sha256: over all that decides which rows are written.
            overwrite: the run may replace another.
            resume: what is there is gone on with.

        Returns:
            The identity of the work.

        Raises:
            UsageError: other rows were begun, or another run is in the output folder by now.
        """
        if resume:
            asked = self._asked()
            if asked.get("sha256") != sha256:
                raise UsageError(
                    f"--resume: the rows in {self.folder} were begun with other documents or options",
                    "repeat that command with --resume, or begin anew with --overwrite",
                )
            overwrite = asked.get("overwrite") is True or self._is_of_this_work()
            run_folder.refuse_occupied(self.out, overwrite=overwrite, option="--out")
            return str(asked["id"])
        remove(self.folder)
        self.folder.mkdir(parents=True)
        id_ = uuid.uuid4().hex
        write_json(self.folder / ASKED, {"sha256": sha256, "id": id_, "overwrite": overwrite})
        return id_

    @contextmanager
    def empty_where_it_fails(self) -> Iterator[None]:
        """What fails in this block before any row was written leaves nothing behind."""
        try:
            yield
        except BaseException:
            if not any(self.folder.glob(f"{CHUNK}*")):
                self.end()
            raise

    def has_become_a_run(self) -> bool:
        """Whether the output folder holds the run on these rows, and has something to go on from."""
        if not self.is_there:
            return True
        if not self._is_of_this_work():
            return False
        record = run_folder.read_record(self.out)
        steps = run_folder.step_folders(self.out)
        return "summary" in record or any(run_folder.fault_of(step, record) is None for step in steps)

    def end(self) -> None:
        """The rows are in the run's folder: those here are needed no more."""
        remove(self.folder)

    def _can_go_on(self) -> bool:
        """Whether the output folder holds a run on a document's rows that has not come to its end."""
        record = run_folder.read_record(self.out) if (self.out / run_folder.RECORD).is_file() else {}
        return "adapted" in record and "summary" not in record

    def _asked(self) -> dict[str, Any]:
        file = self.folder / ASKED
        return read_object(file) if file.is_file() else {}

    def _is_of_this_work(self) -> bool:
        if not (self.out / run_folder.RECORD).is_file():
            return False
        adapted = run_folder.read_record(self.out).get("adapted") or {}
        return "id" in adapted and adapted["id"] == self._asked().get("id")
