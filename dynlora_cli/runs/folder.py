"""The run folder: who may write to it, what proves that it is ours, and which checkpoint is the newest valid one.

    out/name/
      adapter_config.json  adapter_model.safetensors     a plain PEFT LoRA
      dynlora.json  metrics.jsonl  rank_events.jsonl     state of record
      report.html  README.md  tokenizer files            for people and for serving
      recipe.yaml                                        of a run that was given no recipe file
      samples/  prior/                                   PNGs: drawn while training, and before it to be learned
      checkpoints/step-N/  last  best                    last and best are one-line files that name a step folder

How files get there whole is in files/whole.py; how a folder is replaced, by one writer only, in files/place.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from dynlora_cli.errors import DynloraError, UsageError
from dynlora_cli.files.foreign import RecordForm, fits, read_object
from dynlora_cli.files.place import OutputPlace, claimed, is_workplace, resolved
from dynlora_cli.files.whole import remove, sha256_of, sync_all, unfinished, whole_folder, write_json, write_text
from dynlora_cli.runs.log import METRICS, RANK_EVENTS
from dynlora_cli.runs.record import RECORD

CHECKPOINTS = "checkpoints"
RECIPE = "recipe.yaml"
PRIOR = "prior"
STATE = "state.json"
MERGE_RECORD = "merge.json"
EXPORT_RECORD = "export.json"
# What stands beside a record that dynlora wrote: a lone copy of one proves nothing.
OF_A_RUN = (METRICS, RANK_EVENTS, CHECKPOINTS, "adapter_model.safetensors", "config.json")
OF_A_MODEL = ("config.json", "model_index.json")  # of a merged one; the other is a pipeline's
OF_0_1 = {"progress", "counts", "parameters", "scaler", "sizes"}  # keys of its checkpoints, which had no hashes
TOKENIZER_FILES = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
)  # fmt: skip


def place_of(folder: Path, option: str = "--output-dir") -> AbstractContextManager[OutputPlace]:
    """Hold the place of an output folder as its only writer, see `place.claimed`."""
    return claimed(folder, option, _is_lost)


def refuse_occupied(folder: Path, *, overwrite: bool, option: str = "--output-dir") -> None:
    """Check that something new may be written to `folder`; puts in order what a killed process has left of it.

    Args:
        folder: absent, empty, or with `overwrite` one that dynlora made. No other folder is ever emptied.
        overwrite: what dynlora made may be replaced.
        option: that names the folder.

    Raises:
        UsageError: something is there that may not be replaced, another process writes there, or nobody can.
        MachineError: the disk is full.
    """
    path = resolved(folder, option)
    try:
        if path.exists() and not path.is_dir():
            raise UsageError(f"{option} {folder} is a file", f"choose another folder with {option}")
        parent = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise UsageError(f"{option} {folder}: {error.strerror}", f"choose another {option}") from None
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{option} {folder}: {parent} may not be written to", f"choose another {option}")
    with place_of(folder, option) as place:
        nobodys = (place.work, unfinished(path / RECORD))
        occupied = path.is_dir() and any(entry not in nobodys for entry in path.iterdir())
    if occupied and not overwrite:
        resume = "--resume to go on with the run in it, " if option == "--output-dir" else ""
        raise UsageError(
            f"{option} {folder} is not empty", f"add {resume}--overwrite to replace it, or choose another {option}"
        )
    if occupied and not is_ours(path):
        raise UsageError(
            f"--overwrite replaces only what dynlora made, and {folder} holds no {RECORD} of it",
            f"choose another {option}, or empty that folder yourself",
        )


def is_ours(folder: Path) -> bool:
    """Whether dynlora made what is in a folder: there must be a record of ours, and what that is the record of."""
    run, merge, export = (_object(folder / name) for name in (RECORD, MERGE_RECORD, EXPORT_RECORD))
    if {"schema_version", "dynlora_version"} <= run.keys() and any((folder / name).exists() for name in OF_A_RUN):
        return True
    of_a_model = any((folder / name).is_file() for name in OF_A_MODEL)
    if "dynlora_version" in merge and merge.get("command") == "merge" and of_a_model:
        return True
    files = export.get("files")
    if "dynlora_version" not in export or export.get("command") != "export" or not isinstance(files, dict):
        return False
    return any((folder / str(name)).is_file() for name in files)


def _is_lost(folder: Path) -> bool:
    """Whether a folder is empty, or holds a run that ended before it had saved anything."""
    begun = unfinished(folder / RECORD)  # killed while writing the very first file
    entries = {entry.name for entry in folder.iterdir() if not is_workplace(entry) and entry != begun}
    if not entries & {RECORD, METRICS}:
        return not entries
    ended = "summary" in _object(folder / RECORD)
    return not ended and all(fault_of(path) for path in step_folders(folder))


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where it is none, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def replaced(folder: Path, *, overwrite: bool, option: str = "--out") -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` if the block succeeds, and vanishes if it does not.

    Killed at any moment, either the old or the new is whole.

    Raises:
        UsageError, MachineError: as `refuse_occupied`.
    """
    with place_of(folder, option) as place:
        refuse_occupied(folder, overwrite=overwrite, option=option)
        new = place.make_new()
        yield new
        sync_all(new)
        place.keep_old()
        place.put_new()


def refuse_inputs(out: Path, inputs: Iterable[Path], option: str = "--out") -> None:
    """Check that nothing that is read lies in the folder that is to be replaced.

    Args:
        out: the folder.
        inputs: files and folders that are read.
        option: that names the folder.

    Raises:
        UsageError: one of them is that folder, or below it.
    """
    target = out.resolve()
    for source in inputs:
        if target in (source.resolve(), *source.resolve().parents):
            raise UsageError(
                f"{option} {out} would replace {source}, which is read and never changed",
                f"choose another folder with {option}",
            )


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer and its chat template, if `source` has them; say whether it has."""
    if not (source / "tokenizer_config.json").is_file():
        return False
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    return True


def read_record(folder: Path) -> dict[str, Any]:
    """The content of dynlora.json.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        raise UsageError(f"{folder} holds no run ({RECORD} is missing)")
    record = read_object(path)
    fits(RecordForm, record, path)
    return record


def refuse_gone(folder: Path) -> None:
    """Check that the folder of a run that goes on is still there.

    Raises:
        DynloraError: it is not.
    """
    if not (folder / RECORD).is_file():
        raise DynloraError(
            f"{folder} was removed or moved while the run went on, and its checkpoints with it",
            "bring it back and go on with --resume, or start anew",
        )


# -- checkpoints -----------------------------------------------------------------------------------------------------


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((p for p in (folder / CHECKPOINTS).glob("step-*") if _step_of(p) >= 0), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    number = re.fullmatch("step-([0-9]{1,18})", checkpoint.name)
    return int(number[1]) if number else -1


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.resolve().parent.parent


def seal(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Write state.json, the last file of a checkpoint, with the sizes and hashes of all others, and of its own text."""
    files = sorted(checkpoint.iterdir())
    sealed = {
        **state,
        "sizes": {path.name: path.stat().st_size for path in files},
        "sha256": {path.name: sha256_of(path) for path in files},
    }
    write_json(checkpoint / STATE, {**sealed, "seal": _seal_of(sealed)})


def _seal_of(state: Mapping[str, Any]) -> str:
    text = json.dumps({key: value for key, value in state.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fault_of(checkpoint: Path, record: Mapping[str, Any] | None = None) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is as it was written.

    Args:
        checkpoint: its folder. One of version 0.1 has no hashes: of it only the lengths of the files are known.
        record: of the run that it must be of; None: of any.
    """
    if not checkpoint.is_dir() or checkpoint.is_symlink():
        return "is no folder" if checkpoint.exists() else "does not exist"
    if not (checkpoint / STATE).is_file():
        return f"is not complete: {STATE} is missing"
    state = _object(checkpoint / STATE)
    sizes, hashes, progress = state.get("sizes"), state.get("sha256"), state.get("progress")
    sealed = isinstance(hashes, dict) and state.get("seal") == _seal_of(state)
    if not (isinstance(sizes, dict) and sizes and isinstance(progress, dict) and (sealed or state.keys() == OF_0_1)):
        return f"is damaged: {STATE} is not as it was written"
    hashes = hashes or {}
    for name, size in sizes.items():
        path = checkpoint / name
        if Path(name).name != name or path.is_symlink() or not path.is_file() or path.stat().st_size != size:
            return f"is damaged: {name} is missing or has another length"
        if sealed and sha256_of(path) != hashes.get(name):
            return f"is damaged: {name} is not as it was written"
    if record is not None and state.get("run") != record.get("run_id"):
        return "is of another run"
    if _step_of(checkpoint) not in (-1, progress.get("step")):
        return f"is damaged: it is of step {progress.get('step')}"
    return None


def point(folder: Path, name: str, step: int) -> None:
    """Let `checkpoints/last` or `checkpoints/best` name a step folder."""
    write_text(folder / CHECKPOINTS / name, f"step-{step}\n")


def rewind(folder: Path, checkpoint: Path, best: Path | None, record: Mapping[str, Any]) -> None:
    """Make `checkpoint` the newest of a run; later ones go, since their steps are trained again.

    Args:
        folder: of the run that goes on.
        checkpoint: in it, or of another run, whose record is then copied with the checkpoint.
        best: the best one by then, beside it.
        record: of the run; later checkpoints of another one are renamed, not removed.
    """
    source, step = run_of(checkpoint), _step_of(checkpoint.resolve())
    if source != folder.resolve():
        for path in {checkpoint, best or checkpoint}:
            with whole_folder(folder / CHECKPOINTS / path.resolve().name) as temporary:
                shutil.copytree(path, temporary, dirs_exist_ok=True)
        for name in (METRICS, RANK_EVENTS):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / PRIOR).is_dir():
            with whole_folder(folder / PRIOR) as temporary:
                shutil.copytree(source / PRIOR, temporary, dirs_exist_ok=True)
    for path in step_folders(folder):
        if _step_of(path) > step:
            if fault_of(path) is None and fault_of(path, record) is not None:
                aside = path.with_name(f"of-another-run-{path.name}")
                remove(aside)
                path.rename(aside)
            else:
                remove(path)
    point(folder, "last", step)
    if best is not None:
        point(folder, "best", _step_of(best))
    else:
        (folder / CHECKPOINTS / "best").unlink(missing_ok=True)


def pointed(folder: Path, name: str) -> Path | None:
    """The step folder that `checkpoints/<name>` names, or None where it names none that is there."""
    pointer = folder / CHECKPOINTS / name
    if not pointer.is_file():
        return None
    step = pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    return step if step.parent == pointer.parent and _step_of(step) >= 0 and step.is_dir() else None
