"""Which runs an adapter's components began in: as dynlora.json says, or else as the files let one conclude."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora_cli.files.foreign import StateForm, fits, read_object
from dynlora_cli.files.whole import sha256_of
from dynlora_cli.runs.folder import RECORD, STATE
from dynlora_cli.runs.record import Birth

DIGITS = 12  # of a hash, in the name of an adapter that no run names


def births_of(folder: Path, record: Mapping[str, Any], name: str) -> tuple[Birth, ...]:
    """The runs that an adapter's components began in, oldest first; the last one is where it was read.

    An adapter of another tool, or of a dynlora that kept no lineage, has one birth: its own.

    Args:
        folder: of the adapter: a run's, or a checkpoint's in it; of an image adapter the file.
        record: dynlora.json; {} where there is none.
        name: of the adapter.
    """
    if folder.is_file():  # of an image adapter
        run = folder.parent if record else folder
    else:
        run = folder if (folder / RECORD).is_file() or not record else folder.parent.parent
    *earlier, last = record.get("births") or [_only(folder, record, name)]
    return (*earlier, {**last, "folder": str(run.resolve())})


def _only(folder: Path, record: Mapping[str, Any], name: str) -> Birth:
    return Birth(
        run=record.get("run_id") or f"sha256:{_hash(folder)[:DIGITS]}",
        name=name,
        date=record.get("started"),
        data_sha256=(record.get("data") or {}).get("sha256"),
        folder=str(folder),
        old=None,
    )


def _hash(folder: Path) -> str:
    if folder.is_file():
        return sha256_of(folder)
    return sha256_of(min(folder.glob("adapter*.safetensors")))  # PEFT's, or mlx-lm's adapters.safetensors


def born_of(
    ranks: Mapping[str, int], folder: Path, record: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """Components of every layer by birth; and a note where the files hold others than the record says.

    Args:
        ranks: of the layers in the files.
        folder: of the files.
        record: dynlora.json; {} where there is none.

    Returns:
        () for every layer where all its components are of the last birth, or nobody knows.
    """
    births = record.get("births") or []
    unknown: dict[str, tuple[int, ...]] = dict.fromkeys(ranks, ())
    said = _said(folder, record)
    if len(births) < 2:
        return unknown, None
    if not said:
        return unknown, f"{folder}: which component is of which run is not on record, and all count as the last run's"
    found = {name: tuple(said.get(name) or ()) for name in ranks}
    for name, born in found.items():
        if len(born) != len(births) or sum(born) != ranks[name]:
            return unknown, (
                f"{folder}: {name} has {ranks[name]} components, and by the record {list(born)} of the runs in its "
                "lineage; which component is whose is not known, and all count as the last run's"
            )
    return found, None


def _said(folder: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Components by birth, by the checkpoint or by the record."""
    if (folder / STATE).is_file():
        return fits(StateForm, read_object(folder / STATE), folder / STATE).born or {}
    return {name: layer.get("born") for name, layer in (record.get("layers") or {}).items()}
