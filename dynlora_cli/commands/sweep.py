"""`dynlora train --sweep`: the runs of a grid one after the other, each an ordinary run in a folder of its own.

    out/name/
      budget-2_seed-0/  budget-2_seed-1/ ...     whole run folders
      sweep.json  sweep.csv                      what became of them, written anew whenever one begins or ends
      sweep.html  README.md                      picture and tables for people

A run that fails is noted and the rest goes on. Nothing here needs torch before the first run does.
"""

from __future__ import annotations

import gc
import json
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dynlora_cli import __version__
from dynlora_cli.config.plug_in_keys import owners
from dynlora_cli.config.resume import Standing, standing_of
from dynlora_cli.config.sweep import SEED, Grid, Member
from dynlora_cli.errors import DynloraError, Interrupted, UsageError
from dynlora_cli.runs import folder as run_folder
from dynlora_cli.runs import sweep as sweeps
from dynlora_cli.runs.events import Emit, note, send
from dynlora_cli.runs.report.sweep import write_pages
from dynlora_cli.runs.sweep import Row
from dynlora_cli.text import counted

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe
    from dynlora_cli.data.load import Data
    from dynlora_cli.training.lanes.turns import Lane

GO_ON = "the same command with --resume goes on"
# Keys of `train` that change nothing about the rows, so that runs which differ by them share what was read.
NOT_OF_ROWS = {
    "epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler",
    "warmup_ratio", "warmup_steps", "lora_plus_ratio", "weight_decay", "max_grad_norm", "gradient_checkpointing",
    "fused", "compile", "cuda_graphs", "shard_base", "optimizer", "log_steps", "save_steps", "report_to", "ddp_timeout",
}  # fmt: skip
MOST_KEPT = 8  # sets of rows in memory: one for each seed, as a rule


class Preflight(Protocol):
    """Checks what the disk alone can answer, as `preflight.training` does."""

    def __call__(self, recipe: Recipe, *, writes: bool) -> None:
        """`writes`: not a dry run."""


class Train(Protocol):
    """Trains one run and returns its summary, as `dynlora train` does."""

    def __call__(self, member: Member, *, overwrite: bool, resume: bool, load: Callable[..., Data]) -> dict[str, Any]:
        """`load` reads the rows, see `SharedRows`."""


# -- before anything runs --------------------------------------------------------------------------------------------


def check(
    grid: Grid, preflight: Preflight, *, writes: bool, overwrite: bool = False, resume: bool = False
) -> dict[str, Standing]:
    """Check what the runs need of the disk, and find out how each of them stands.

    Args:
        grid: of the sweep.
        preflight: checks the paths of one recipe, as for a run of its own.
        writes, overwrite, resume: as of a run.

    Returns:
        By name of the run: "new"; "go on" from its checkpoint; "finished"; "anew", since what is there is to be
        replaced, or was killed before it had saved anything.

    Raises:
        UsageError, MachineError, DataError: every problem of any run, once.
    """
    if writes:
        _refuse_folder(grid.folder, overwrite=overwrite, resume=resume)
    standing: dict[str, Standing] = {}
    faults: dict[str, DynloraError] = {}
    for member in grid.members:
        try:
            standing[member.name] = (
                standing_of(member.folder, member.recipe, overwrite=overwrite, resume=resume) if writes else "new"
            )
            preflight(member.recipe, writes=False)
        except DynloraError as error:
            faults.setdefault(error.message, error)
    if faults:
        first, *others = faults.values()
        raise type(first)("\n".join(faults), first.hint) if others else first
    return standing


def _refuse_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Check that the sweep's own folder is free, or holds a sweep that is to be replaced or gone on with."""
    option = f"--output-dir {folder}"
    if (folder / run_folder.RECORD).exists():
        raise UsageError(
            f"{option} holds a single run, and a sweep needs a folder of its own", f"--output-dir {folder}-sweep, say"
        )
    if resume and not sweeps.is_ours(folder):
        raise UsageError(f"{option} holds no sweep to go on with ({sweeps.RECORD} is missing)", "leave --resume out")
    if overwrite and folder.is_dir() and any(folder.iterdir()) and not sweeps.is_ours(folder):
        raise UsageError(
            f"--overwrite replaces only what dynlora made, and {folder} holds no {sweeps.RECORD} of it",
            "choose another --output-dir, or empty that folder yourself",
        )
    if not (resume or overwrite):
        run_folder.refuse_occupied(folder, overwrite=False)


# -- the runs --------------------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """The runs of a grid, and what has become of them.

    Attributes:
        grid: of the sweep.
        standing: how each run stands, as `check` found it.
        listener: takes the events of all runs, and two more: `sweep-run` when one begins, `sweep-row` when it ends.
    """

    grid: Grid
    standing: Mapping[str, Standing]
    listener: Emit | None = None
    rows: list[Row] = field(default_factory=list)
    _judges: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = [
            Row(run=one.name, folder=str(one.folder), values=dict(one.values), state="waiting")
            for one in self.grid.members
        ]

    def run(self, train: Train) -> dict[str, Any]:
        """Train what is to be trained.

        Returns:
            What sweep.json holds, and `ok`; where runs have failed also `exit_code` and `error`.

        Raises:
            Interrupted: Ctrl-C; the state is on the disk.
        """
        self.grid.folder.mkdir(parents=True, exist_ok=True)
        self._tell_of_others()
        shared = SharedRows()
        for index, member in enumerate(self.grid.members):
            self.rows[index]["state"] = "running"
            trains = self.standing[member.name] != "finished"
            if trains or not index:
                self._write(for_people=not index)
            self._send("sweep-run", index)
            try:
                self.rows[index] = self._one(member, self.rows[index], train, shared)
            except (Interrupted, KeyboardInterrupt) as error:
                self.rows[index]["state"] = "interrupted"
                self._write()
                raise Interrupted(self._where(index, error), GO_ON) from None
            if trains or index == len(self.rows) - 1:
                self._write()
            self._send("sweep-row", index)
            _free_memory()
        return self._result()

    def run_together(self, train: Callable[[Lane], Train], told: Callable[[str, Row], None]) -> dict[str, Any]:
        """Train what is to be trained side by side on one base; as `run` otherwise.

        Args:
            train: trains one run in its place among the others.
            told: is given the name of each run as it ends, and its row.
        """
        from dynlora_cli.training.lanes.base import SharedBase
        from dynlora_cli.training.lanes.turns import Lane, walk_together

        self.grid.folder.mkdir(parents=True, exist_ok=True)
        self._tell_of_others()
        base, shared = SharedBase(), SharedRows()

        def walk(index: int, lane: Lane) -> None:
            member = self.grid.members[index]
            self.rows[index]["state"] = "running"
            try:
                self.rows[index] = self._one(member, self.rows[index], train(lane), shared)
            except (Interrupted, KeyboardInterrupt):
                self.rows[index]["state"] = "interrupted"
            self._write()
            told(member.name, self.rows[index])

        self._write()
        lanes = [Lane(index, base, partial(walk, index)) for index in range(len(self.rows))]
        walk_together(lanes, base)
        states = [row["state"] for row in self.rows]
        if left := len(states) - states.count("done") - states.count("failed"):
            raise Interrupted(f"interrupted: {left} of {len(states)} runs are not done; what they had is saved", GO_ON)
        return self._result()

    def _one(self, member: Member, row: Row, train: Train, shared: SharedRows) -> Row:
        """One run; its row, also where it fails."""
        standing = self.standing[member.name]
        try:
            summary = train(
                member,
                overwrite=standing == "anew",
                resume=standing in ("go on", "finished"),
                load=shared.of(member.recipe),
            )
            return sweeps.of_summary(row, summary)
        except Interrupted:
            raise
        except DynloraError as error:
            return Row(**row) | Row(state="failed", error=error.message, exit_code=error.exit_code)
        except Exception as error:  # a fault of ours or of a library: it is shown whole, and costs this run alone
            traceback.print_exc(file=sys.stderr)
            return Row(**row) | Row(state="failed", error=f"{type(error).__name__}: {error}", exit_code=1)

    def _where(self, index: int, error: BaseException) -> str:
        states = [row["state"] for row in self.rows]
        said_so = f": {error.message}" if isinstance(error, Interrupted) else ""
        return (
            f"interrupted in run {index + 1} of {len(states)}, {self.rows[index]['run']}{said_so}\n"
            f"{counted(states.count('done'), 'run')} done, {states.count('waiting')} not begun"
        )

    def _send(self, kind: str, index: int) -> None:
        row = self.rows[index]
        event = {"event": kind, "number": index + 1, "of": len(self.rows), "row": dict(row)}
        send(self.listener, event | {"standing": self.standing[row["run"]]})

    def _tell_of_others(self) -> None:
        """Name runs in the folder that are none of this sweep's."""
        names = {member.name for member in self.grid.members}
        others = sorted(path.parent.name for path in self.grid.folder.glob(f"*/{run_folder.RECORD}"))
        if others := [name for name in others if name not in names and not name.startswith(".")]:
            send(self.listener, note(f"{self.grid.folder} also holds runs of another sweep: {', '.join(others)}"))

    # -- what is on record ----------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What sweep.json holds."""
        done = [(row, self._judged(row)) for row in self.rows if row["state"] == "done"]
        notes = sweeps.why_not_compared(done, SEED)
        if notes:
            notes = [f"{text}: their losses do not compare, so none is called the best" for text in notes]
        elif done and not any("loss" in row["measured"] for row, _ in done):
            notes.append("no rows are held out (dataset.val_size, dataset.val), so there is nothing to choose by")
        elif len({judge["held-out rows"] for _, judge in done}) > 1:
            notes.append("each seed holds out other rows, so the intervals cover that as well")
        combinations = sweeps.summarize(self.rows, SEED, compared=not sweeps.why_not_compared(done, SEED))
        best = sweeps.best_run(self.rows, combinations)
        return {
            "schema_version": sweeps.SCHEMA_VERSION,
            "dynlora_version": __version__,
            "name": self.grid.folder.resolve().name,
            "output_dir": str(self.grid.folder),
            "keys": {axis.key: list(axis.values) for axis in self.grid.axes},
            "best": best["run"] if best else None,
            "combinations": combinations,
            "runs": self.rows,
            "notes": notes,
        }

    def _judged(self, row: Row) -> dict[str, str]:
        """What a run's held-out loss depends on, beside how good it is."""
        if row["run"] not in self._judges:
            self._judges[row["run"]] = _judge_of(Path(row["folder"]))
        return self._judges[row["run"]]

    def _write(self, *, for_people: bool = True) -> None:
        record = self.record()
        sweeps.write(self.grid.folder, record)
        if for_people:
            sweeps.write_table(self.grid.folder, record)
            write_pages(self.grid.folder, record)

    def _result(self) -> dict[str, Any]:
        failed = [row for row in self.rows if row["state"] == "failed"]
        result = {"ok": not failed, **self.record()}
        if failed:
            codes = {row["exit_code"] for row in failed}
            result["exit_code"] = codes.pop() if len(codes) == 1 else DynloraError.exit_code
            names = ", ".join(row["run"] for row in failed)
            result["error"] = f"{len(failed)} of {counted(len(self.rows), 'run')} failed: {names}"
        return result


def _judge_of(folder: Path) -> dict[str, str]:
    record = run_folder.read_record(folder)
    recipe, data = record.get("recipe") or {}, record.get("data") or {}
    train = recipe.get("train") or {}
    own = {key: train[key] for key in train if any(kind == "objectives" for kind, _ in owners(("train", key)))}
    rows = [(data.get("counts") or {}).get("val"), data.get("labels"), (recipe.get("eval") or {}).get("max_samples")]
    return {
        "held-out rows": json.dumps([*rows, _held_out_sources(recipe)]),
        "tokens": str(record.get("tokenizer_sha256")),
        "chat templates": str(record.get("chat_template_sha256")),
        "objectives": json.dumps([recipe.get("model", {}).get("task"), train.get("objective"), own], default=str),
    }


def _held_out_sources(recipe: Mapping[str, Any]) -> Any:
    """Where held-out rows come from: files of their own, or a share of those to train on, which then matter too."""
    dataset = recipe.get("dataset") or {}
    if dataset.get("val"):
        return dataset["val"]
    return [[source.get("path") for source in dataset.get("train") or ()], dataset.get("val_size")]


def _free_memory() -> None:
    """Let go of a run's model before the next one loads, and count the GPU's peak anew."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class SharedRows:
    """Rows that one run has read, for the next ones that would read the very same.

    Each run gets a copy, as new as if it were read from the files, for a run may change its own.
    """

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.read, self.reused = 0, 0

    def of(self, recipe: Recipe) -> Callable[..., Data]:
        """What reads the rows of this recipe."""

        def load(
            dataset: Any, tokenizer: Any, *, writing: Any = None, task: Any, tell: Any = _silent, **how: Any
        ) -> Data:
            begins = writing is None or not (writing.turned or writing.labels)  # then only its clock tells it apart
            train = recipe.train.model_dump(mode="json")
            of_rows = {key: value for key, value in train.items() if key not in NOT_OF_ROWS}
            sections = [recipe.model.model_dump(mode="json"), dataset.model_dump(mode="json"), of_rows]
            tokens = [repr(recipe.adapter.new_tokens), _state_of(tokenizer), None if begins else str(writing)]
            key = json.dumps([*sections, recipe.seed, how, *tokens], default=str)
            if key in self.kept:
                self.reused += 1
                data, after = pickle.loads(self.kept[key])
                _put_state(tokenizer, after)
                return data
            from dynlora_cli.data.load import load_data
            from dynlora_cli.data.rows.stored import Stored

            data = load_data(dataset, tokenizer, writing=writing, task=task, tell=tell, **how)
            self.read += 1
            if data.stream or isinstance(data.train, Stored):  # each run reads on by itself, or opens what is kept
                return data
            while len(self.kept) >= MOST_KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = pickle.dumps((data, _state_of(tokenizer)), pickle.HIGHEST_PROTOCOL)
            return data

        return load


def _silent(text: str) -> None:
    """Say nothing."""


def _state_of(tokenizer: Any) -> tuple[str | None, Any, Any, int]:
    """What reading rows may change about a tokenizer: its template, and how it cuts and pads; and its size."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = (backend.truncation, backend.padding) if backend is not None else (None, None)
    return tokenizer.chat_template, *cuts, len(tokenizer)


def _put_state(tokenizer: Any, state: tuple[str | None, Any, Any, int]) -> None:
    """Leave a tokenizer as reading the rows would have."""
    tokenizer.chat_template, truncation, padding, _ = state
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.enable_truncation(**truncation) if truncation else backend.no_truncation()
        backend.enable_padding(**padding) if padding else backend.no_padding()
