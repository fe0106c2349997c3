"""Under torchrun: processes that are started again go on with the run that their job began.

torchrun starts every process again, with the same command line, when one has failed (`--max-restarts`) and when
machines come or go (`--nnodes 1:4`). So the command line cannot say whether to begin or to go on; the record of the run
can: it holds the job that began it. `accelerate launch` starts its processes through torchrun.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dynlora_cli.execution.launch import RUN_ID, is_main_process

RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # environment variable: how often torchrun has started this job again
UNSHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
UNNAMED = "none"  # torchrun's id for every job that it was given none for


class Ways(NamedTuple):
    """How a run deals with what is in its folder, as `commands.train.run` takes it."""

    overwrite: bool
    resume: bool
    resume_from: Path | None


def job() -> str | None:
    """What tells this job from all others; None where torchrun did not start this process.

    It is torchrun's id (`--rdzv-id`, or the one that `--standalone` makes). Without one it is the torchrun that started
    this process, by its number and the second of its start.
    """
    named = os.environ.get(RUN_ID)
    if named != UNNAMED:
        return named
    import psutil

    parent = psutil.Process(os.getppid())
    return f"torchrun {parent.pid}, started {parent.create_time():.0f}"


def ways(folder: Path, asked: Ways) -> tuple[Ways, str | None]:
    """What is to be done with the run in a folder: what was asked for, or to go on with what this job began there.

    Returns:
        The ways, and a note for the person who runs it where they are other ones than asked for.
    """
    from dynlora_cli.runs import folder as run_folder

    here = job()
    if here is None or not (folder / run_folder.RECORD).is_file():
        return asked, None
    record = run_folder.read_record(folder)
    if not _began(record, here):
        return asked, None
    saved = "summary" in record or any(
        run_folder.fault_of(step, record) is None for step in run_folder.step_folders(folder)
    )
    if saved:
        return Ways(False, True, None), f"this job ({here}) began the run in {folder}: it goes on"
    return asked._replace(overwrite=True, resume=False), (
        f"this job ({here}) began the run in {folder} and had saved nothing of it: it begins again"
    )


def note() -> str | None:
    """What to know about this job before anything fails; None where there is nothing.

    Of several machines torchrun keeps one store for all starts, in which processes that are started again find the
    addresses of those that have ended (pytorch/pytorch, issue 135712).
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get(UNSHARED) != "1"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if not (shared and restarts and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1):
        return None
    return (
        "on several machines torchrun's restarts fail with the store that it shares between them; "
        f"run `export {UNSHARED}=1` before torchrun, on every machine"
    )


def _began(record: Mapping[str, Any], here: str) -> bool:
    """Whether this job began a run. The first process knows; the others believe torchrun, which may be another one."""
    began = record.get("elastic_job")
    if began is None or began == here:
        return began is not None
    return not is_main_process() and os.environ.get(RESTARTS, "0") != "0"
