"""Faults of the machine, which libraries raise as errors of many types, as errors of ours."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from dynlora_cli.errors import DynloraError, MachineError, UsageError
from dynlora_cli.execution.lost import explained, lost_others
from dynlora_cli.extras import broken

LESS_MEMORY = (
    "in training: lower train.micro_batch_size, dataset.max_length, or set train.gradient_checkpointing: true, "
    "or offload; elsewhere: look at fewer rows (--max-samples), or close other programs"
)
# What torch, C++ and the system say, in errors of many types, when memory on the CPU is used up.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "std::bad_alloc", "failed to map segment",
    "CUDA out of memory",
)  # fmt: skip
UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextmanager
def translated() -> Iterator[None]:
    """Errors of this block are ours, where it is known what they mean."""
    try:
        yield
    except DynloraError:
        raise
    except Exception as error:
        known = as_ours(error)
        if known is None:
            raise
        raise known from error


def as_ours(error: BaseException) -> DynloraError | None:
    """Turn faults of the machine, which libraries wrap in many types of errors, into ours."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        known = _known(cause)
        if known and (cause is error or isinstance(known, MachineError)):
            return known
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _known(error: BaseException) -> DynloraError | None:
    text = str(error)
    if lost_others(error):
        return explained(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in text or re.fullmatch(r"\d+ requested and \d+ written", text):
        place = getattr(error, "filename", None) or "output folder"
        return MachineError(
            f"no space left on the device ({place})", "free some and try again; a training run goes on with --resume"
        )
    if isinstance(error, OSError) and error.errno in UNUSABLE_PATH:
        return UsageError(
            f"{error.filename}: {error.strerror}", "check that path, or choose another place for the output"
        )
    if isinstance(error, RuntimeError) and "determine home directory" in text:
        return UsageError("a path begins with ~ and the name of a user whom this machine does not know", "write it out")
    if type(error).__name__ == "OutOfMemoryError":
        return MachineError("the GPU has not enough memory", LESS_MEMORY)
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return MachineError("the machine has not enough memory", LESS_MEMORY)
    return broken(error)
