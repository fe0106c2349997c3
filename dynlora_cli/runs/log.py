"""A run as data: the events of the training loop in two JSON-lines files, from which everything shown is made.

    RunLog         listener of the loop: events to metrics.jsonl and rank_events.jsonl
    read_run       the files of a run folder to a RunRecord
    layer_grid     layer names to a grid of blocks x module types, the shape of every rank map

`dynlora.json` (runs/record.py) is only read here, and every key of it may be absent.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from dynlora_cli import plugins
from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.foreign import LineForm, RecordForm, first_fault, fits, read_object
from dynlora_cli.files.strict_json import BadJsonError, loads
from dynlora_cli.files.whole import write_text
from dynlora_cli.runs.events import Event
from dynlora_cli.runs.record import RECORD

METRICS = "metrics.jsonl"
RANK_EVENTS = "rank_events.jsonl"
FILE_OF_EVENT = dict.fromkeys(("train", "eval", "also", "samples"), METRICS)
FILE_OF_EVENT |= dict.fromkeys(("gauge", "prune", "refused"), RANK_EVENTS)


class RunLog:
    """Append the events of a run to `metrics.jsonl` and `rank_events.jsonl`; a context manager and a listener.

    Args:
        folder: the run folder; made if absent.
        keep_until_step: on resume, lines of later steps are dropped, since these steps are trained again.
    """

    def __init__(self, folder: str | Path, keep_until_step: int | None = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, IO[str]] = {}
        for name in (METRICS, RANK_EVENTS):
            _trim(self.folder / name, keep_until_step)

    def __enter__(self) -> RunLog:
        self._files = {name: (self.folder / name).open("a", encoding="utf-8") for name in (METRICS, RANK_EVENTS)}
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def __call__(self, event: Event) -> None:
        """Write the event as a line of its file, if it has one; NaN and infinity become null.

        With a checkpoint the lines before it are on the disk.

        Raises:
            DynloraError: the files have gone.
        """
        name = FILE_OF_EVENT.get(event["event"])
        if event["event"] == "checkpoint":
            for file in self._files.values():
                os.fsync(file.fileno())
        if name:
            self._refuse_gone(name)
            self._files[name].write(json.dumps(_strict(event), ensure_ascii=False, allow_nan=False) + "\n")
            self._files[name].flush()

    def _refuse_gone(self, name: str) -> None:
        """Lines that nobody will find must not be written: the file, or its folder, was removed or moved."""
        path = self.folder / name
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(self._files[name].fileno())):
            raise DynloraError(
                f"{path} was removed or moved while the run went on", "bring it back and go on with --resume"
            )


@dataclass
class RunRecord:
    """What a run folder says. Lists are in the order in which they were written."""

    folder: Path
    metrics: list[Event] = field(default_factory=list)  # event "train"
    evals: list[Event] = field(default_factory=list)  # event "eval"
    samples: list[Event] = field(default_factory=list)  # event "samples"
    rank_events: list[Event] = field(default_factory=list)  # events "gauge" and "prune"
    info: dict[str, Any] = field(default_factory=dict)  # dynlora.json

    @property
    def summary(self) -> dict[str, Any]:
        """The end summary; empty while the run goes on."""
        return self.info.get("summary") or {}

    @property
    def loss_in(self) -> str:
        """What its held-out losses are in, such as nats per token."""
        return plugins.loss_in(self.info.get("task") or "causal-lm", self.objective)

    @property
    def objective(self) -> str | None:
        """What training lowered, where that is on record."""
        recipe = self.info.get("recipe") or {}
        train = recipe.get("train") if isinstance(recipe, dict) else None
        return train.get("objective") if isinstance(train, dict) else None

    @property
    def prunes(self) -> list[Event]:
        """The events that removed components."""
        return [event for event in self.rank_events if event["event"] == "prune"]

    @property
    def layers(self) -> list[str]:
        """Every layer that ever had a component."""
        seen = dict.fromkeys(self.info.get("layers") or {})
        for event in self.rank_events:
            seen.update(dict.fromkeys(event.get("ranks") or {}))
        seen.update(dict.fromkeys(self.summary.get("ranks") or {}))
        return list(seen)

    def rank_history(self) -> list[tuple[int, dict[str, int]]]:
        """Ranks of all layers as (step, {layer: rank}): at the start, after each prune event, and at the end."""
        layers, frames = self.layers, []
        events = [event for event in self.prunes if event.get("ranks")]
        if events:
            first = events[0]
            removed = first.get("removed") or {}
            frames.append((0, {name: first["ranks"].get(name, 0) + removed.get(name, 0) for name in layers}))
            frames += [(event["step"], {name: event["ranks"].get(name, 0) for name in layers}) for event in events]
        recorded = {name: layer.get("rank", 0) for name, layer in (self.info.get("layers") or {}).items()}
        final = self.summary.get("ranks") or recorded
        if final and (not frames or any(final.get(name, 0) != frames[-1][1][name] for name in layers)):
            frames.append((self.last_step, {name: final.get(name, 0) for name in layers}))
        return frames

    @property
    def last_step(self) -> int:
        """The last step that any file tells of."""
        steps = [event["step"] for event in (*self.metrics, *self.evals, *self.rank_events)]
        return max([*steps, self.summary.get("steps") or 0])


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder; a last line that a crash has torn is left out.

    Raises:
        UsageError: there is no such folder, it holds no record of a run, or a file of the record is damaged.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (METRICS, RANK_EVENTS, RECORD)):
        raise UsageError(f"{folder} holds no record of a run", f"name a folder with {METRICS} or {RECORD} in it")
    metrics = _read_lines(folder / METRICS)
    return RunRecord(
        folder=folder,
        metrics=[event for event in metrics if event.get("event") == "train"],
        evals=[event for event in metrics if event.get("event") == "eval"],
        samples=[event for event in metrics if event.get("event") == "samples"],
        rank_events=_read_lines(folder / RANK_EVENTS),
        info=_read_info(folder / RECORD),
    )


def _strict(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None, which strict JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_lines(path: Path) -> list[Event]:
    """The objects of a JSON-lines file, [] where there is none; a torn last line is left out, any other is an error.

    Raises:
        UsageError: a line is damaged, or the file cannot be read.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UsageError(f"{path} is no file", "move it elsewhere, or restore the file")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.removesuffix("\n").split("\n") if text else []
    events = []
    for index, line in enumerate(lines, start=1):
        try:
            event = loads(line)
            fault = f"it holds {type(event).__name__}, not an object with keys" if not isinstance(event, dict) else None
            LineForm.model_validate(event)
        except BadJsonError as error:
            if index == len(lines) and not text.endswith("\n") and (index > 1 or line.startswith("{")):
                continue
            fault = error.reason
        except ValidationError as error:
            fault = fault or first_fault(error)
        if fault:
            raise UsageError(f"{path}:{index} is damaged: {fault}", "restore the file or delete this line")
        events.append(event)
    return events


def _read_info(path: Path) -> dict[str, Any]:
    info = read_object(path) if path.exists() else {}
    fits(RecordForm, info, path)
    return info


def _trim(path: Path, last_step: int | None) -> None:
    """Drop a torn last line, and the lines after `last_step`."""
    if path.is_file():
        events = _read_lines(path)
        kept = [event for event in events if last_step is None or event["step"] <= last_step]
        write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
