"""accelerate's Accelerator, with a state of its own for each run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs


class RunAccelerator(Accelerator):
    """An Accelerator that others in the process do not change, and that does not change others.

    accelerate keeps the precision in a state that all Accelerators of a process share: it refuses a second one of
    another precision, and `autocast` reads the precision of whichever came last. Here the shared state is set aside
    while this one is made, and what it has become is kept as this one's own.
    """

    def __init__(self, *, kwargs_handlers: list[Any], **options: Any) -> None:
        shared = AcceleratorState._shared_state
        before = dict(shared)
        shared.clear()
        try:
            super().__init__(kwargs_handlers=kwargs_handlers, **options)
            own = object.__new__(AcceleratorState)
            own.__dict__ = dict(shared)
            self.state = own
        finally:
            shared.clear()
            shared.update(before)

    @contextmanager
    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Iterator[None]:
        """Mixed precision inside the block, where this Accelerator has any."""
        handler = autocast_handler or self.autocast_handler
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.mixed_precision)
        if dtype is None:
            yield
            return
        with torch.autocast(self.device.type, dtype, **(handler.to_kwargs() if handler else {})):
            yield
