"""Which runs `dataset.replay` means; found without torch, so that a wrong path is answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dynlora_cli.adapters.find import find_adapter
from dynlora_cli.data.earlier import lineage, run_folder
from dynlora_cli.errors import UsageError
from dynlora_cli.runs.folder import RECORD

if TYPE_CHECKING:
    from dynlora_cli.config.recipe import Recipe

FROM = "dataset.replay.from"


def runs_to_replay(recipe: Recipe) -> list[Path]:
    """Folders of the run that a recipe replays and of those that it came from, oldest first.

    Raises:
        UsageError: one of them is not there, the new run would replace it, or nobody knows its rows.
    """
    replay = recipe.dataset.replay
    named = replay and (replay.origin or recipe.adapter.origin)
    if not named:
        return []
    folder, out = Path(named).expanduser(), Path(recipe.output_dir).resolve()
    if not (folder / RECORD).is_file():
        folder = run_folder(find_adapter(folder, FROM)[0])
    runs = lineage(folder)
    for run in runs:
        if out in (run.resolve(), *run.resolve().parents):
            raise UsageError(
                f"{FROM}: {run} lies in the output folder {recipe.output_dir}, which the new run would replace",
                "name another folder in output_dir",
            )
    return runs
