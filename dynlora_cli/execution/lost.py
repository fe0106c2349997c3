"""In a run of several processes: what to say when another process has ended, or does not answer.

A process that waits longer than `train.ddp_timeout` gets an error from torch.distributed, which knows that somebody did
not come, not who. So each process that meets such an error leaves a mark at the meeting point (the store by which the
processes found each other), waits a moment, and looks whose mark is missing: that one hangs.

NCCL ends a process that has waited too long by itself, in C++; its own message is then all there is.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from datetime import timedelta

from dynlora_cli.errors import DynloraError
from dynlora_cli.execution.elastic import RESTARTS, UNSHARED

MOMENT_SECONDS = 3.0  # for the others to leave their marks
GO_ON = "see what it said; go on with --resume"


def several() -> bool:
    """Whether this process is one of several of a run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def lost_others(error: BaseException) -> bool:
    """Whether this is what torch.distributed says when another process of the run has ended, or does not answer."""
    if not several():
        return False
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error))


def waited_too_long(error: BaseException) -> bool:
    """Whether one that is `lost_others` says that the time was over, not that a connection broke."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


def leave_mark() -> None:
    """Tell the others that this process still runs: it only lost them."""
    _marked(wait=False)


def explained(error: BaseException) -> DynloraError:
    """What `lost_others` means, in words; processes that hang are named."""
    if not waited_too_long(error):
        leave_mark()
        return DynloraError("another process of this run has ended", GO_ON)
    came = re.search(r"(\d+)/(\d+) clients joined", str(error))
    silent = None if came else _marked(wait=True)
    if came:
        who = f"{came[1]} of {came[2]} processes came"
    elif silent is None:
        who = "where they meet (process 0, or torchrun on the first machine) nobody answers"
    elif silent:
        who = f"process{'es' if len(silent) > 1 else ''} {', '.join(map(str, silent))} did not answer in time"
    else:
        who = "all processes run, and none hears the others in time: look at the network between them"
    return DynloraError(
        f"process {os.environ.get('RANK', '0')} waited for the others for longer than train.ddp_timeout: {who}",
        "look what holds that up, or give it longer (--set train.ddp_timeout=SECONDS); go on with --resume",
    )


def _marked(*, wait: bool) -> list[int] | None:
    """Leave this process's mark, and say whose are missing; None: the place where they meet does not answer."""
    found: list[list[int]] = []
    # In a thread, for a store whose process was stopped takes a connection and then says nothing, for ever.
    asking = threading.Thread(target=_ask, args=(found, wait), daemon=True)
    asking.start()
    asking.join(3 * MOMENT_SECONDS)
    return found[0] if found else None


def _ask(found: list[list[int]], wait: bool) -> None:
    from torch.distributed import TCPStore

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A store that outlives the processes holds marks of earlier ones. One that does not needs no number, and torchrun
    # counts its restarts on each machine apart.
    key = f"dynlora/runs/{'0' if os.environ.get(UNSHARED) == '1' else os.environ.get(RESTARTS, '0')}/{{}}"
    host, port, patience = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=MOMENT_SECONDS)
    with suppress(RuntimeError, OSError):  # nobody listens any more; torch.distributed's errors are RuntimeErrors
        store = TCPStore(host, port, is_master=False, timeout=patience, wait_for_workers=False)
        store.set(key.format(rank), "yes")
        if wait:
            time.sleep(MOMENT_SECONDS)
        found.append([other for other in range(size) if not store.check([key.format(other)])])
