"""The run folder: who may write to it, how files get there whole, and which checkpoint is the newest valid one.

    out/name/
      adapter_config.json  adapter_model.safetensors     a plain PEFT LoRA
      dynlora.json  metrics.jsonl  rank_events.jsonl     state of record
      report.html  README.md  tokenizer files            for people and for serving
      checkpoints/step-N/  last  best                    last and best are one-line files that name a step folder

Everything is written beside its final name and renamed into place, so a run that is killed leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynlora_cli.errors import UsageError
from dynlora_cli.foreign import RecordForm, fits, read_object
from dynlora_cli.report_log import METRICS, RANK_EVENTS

RECORD = "dynlora.json"
CHECKPOINTS = "checkpoints"
MERGE_RECORD = "merge.json"
EXPORT_RECORD = "export.json"
OURS = (RECORD, MERGE_RECORD, EXPORT_RECORD)  # one of these lies in every folder that dynlora makes
TOKENIZER_FILES = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
)  # fmt: skip


def refuse_occupied(folder: Path, *, overwrite: bool, option: str = "--output-dir") -> None:
    """Check that something new may be written to `folder`; changes nothing.

    Args:
        folder: absent, empty, or with `overwrite` one that dynlora made. No other folder is ever emptied.
        overwrite: what dynlora made may be replaced.
        option: that names the folder.

    Raises:
        UsageError: something is there that may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{option} {folder} is a file", f"choose another folder with {option}")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{option} {folder}: {parent} may not be written to", f"choose another {option}")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            resume = "--resume to go on with the run in it, " if option == "--output-dir" else ""
            raise UsageError(
                f"{option} {folder} is not empty",
                f"add {resume}--overwrite to replace it, or choose another {option}",
            )
        if not any((folder / name).is_file() for name in OURS):
            raise UsageError(
                f"--overwrite replaces only what dynlora made, and {folder} holds no {RECORD}",
                f"choose another {option}, or empty that folder yourself",
            )


def refuse_inputs(out: Path, inputs: Iterable[Path]) -> None:
    """Check that nothing that is read lies in the folder that is to be replaced.

    Raises:
        UsageError: one of them is that folder, or below it.
    """
    target = out.resolve()
    for source in inputs:
        if target in (source.resolve(), *source.resolve().parents):
            raise UsageError(
                f"--out {out} would replace {source}, which is read and never changed",
                "choose another folder with --out",
            )


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer and its chat template, if `source` has one; whether it has."""
    if not (source / "tokenizer_config.json").is_file():
        return False
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    return True


def claim(folder: Path, *, overwrite: bool) -> None:
    """Make `folder` an empty one for a new run; with `overwrite` an earlier run in it is removed.

    Raises:
        UsageError: something is there that may not be replaced.
    """
    refuse_occupied(folder, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)  # an old one stays: it may be a link, or a volume of a container
    _empty(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file whole: beside its name, then renamed into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write data as indented JSON, whole."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place if the block succeeds, and vanishes if it does not.

    Where that place cannot be taken (a volume of a container, the current folder, a parent that is another's), it lies
    inside, and what it holds moves up.
    """
    path = path.resolve()
    fixed = path.is_dir() and (path.is_mount() or path == Path.cwd() or not os.access(path.parent, os.W_OK))
    temporary = (path if fixed else path.parent) / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except FileNotFoundError:
        raise UsageError(f"{path} cannot be made: {path.parent} takes no folders", "choose another place") from None
    try:
        yield temporary
        if fixed:
            _empty(path, but=temporary)
            for made in temporary.iterdir():
                made.rename(path / made.name)
            temporary.rmdir()
        else:
            if path.exists():
                shutil.rmtree(path)
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _empty(folder: Path, but: Path | None = None) -> None:
    """Remove what a folder holds."""
    for entry in folder.iterdir():
        if entry == but:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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


def step_folders(folder: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((p for p in (folder / CHECKPOINTS).glob("step-*") if _step_of(p) >= 0), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    return checkpoint.resolve().parent.parent


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint folder has all its files in full length; state.json, written last, says which."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in state["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest valid checkpoint of a run, or None."""
    return next((path for path in reversed(step_folders(folder)) if is_whole(path)), None)


def point(folder: Path, name: str, step: int) -> None:
    """Let `checkpoints/last` or `checkpoints/best` name a step folder."""
    write_text(folder / CHECKPOINTS / name, f"step-{step}\n")


def rewind(folder: Path, checkpoint: Path, best: Path | None) -> None:
    """Make `checkpoint` the newest of a run; later ones go, since their steps are trained again.

    Args:
        folder: of the run that goes on.
        checkpoint: in it, or of another run, whose record is then copied with the checkpoint.
        best: the best one by then, beside it.
    """
    source, step = run_of(checkpoint), _step_of(checkpoint.resolve())
    if source != folder.resolve():
        for path in {checkpoint, best or checkpoint}:
            with whole_folder(folder / CHECKPOINTS / path.resolve().name) as temporary:
                shutil.copytree(path, temporary, dirs_exist_ok=True)
        for name in (METRICS, RANK_EVENTS):
            shutil.copyfile(source / name, folder / name)
    for path in step_folders(folder):
        if _step_of(path) > step:
            shutil.rmtree(path)
    point(folder, "last", step)
    if best is not None:
        point(folder, "best", _step_of(best))
    else:
        (folder / CHECKPOINTS / "best").unlink(missing_ok=True)


def pointed(folder: Path, name: str) -> Path | None:
    """The step folder that `checkpoints/<name>` names, or None."""
    pointer = folder / CHECKPOINTS / name
    if not pointer.is_file():
        return None
    named = pointer.read_bytes()[:80].decode(errors="replace").strip()
    return pointer.parent / named if re.fullmatch(r"step-\d+", named) else None
