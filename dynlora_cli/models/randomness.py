"""Random numbers that belong to one run, whatever else the process draws.

torch has one generator per device for the whole process, and dropout draws from it without being asked. So its state is
swapped: a run's own state is put in while the run computes, and what was there before comes back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside the block torch draws from this seed, on the CPU and on `device`; afterwards it goes on as before."""
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Randomness:
    """The random state of one run: inside `with`, torch draws the run's numbers, going on where they stopped last time.

    May be entered again inside itself, which changes nothing.

    Args:
        seed: where the run's numbers begin.
        device: that it computes on, beside the CPU.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._depth = 0
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin again with another seed."""
        with seeded(seed, self._device):
            self._state = self._read()

    def __enter__(self) -> None:
        if not self._depth:
            self._swap()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._swap()

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside the block the two states have changed places: what is inside draws as what is outside would.

        A run that waits for others steps out of its own numbers so; whoever computes for it steps into them.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _read(self) -> list[Tensor]:
        on_device = [torch.cuda.get_rng_state(self._device)] if self._device else []
        return [torch.get_rng_state(), *on_device]

    def _swap(self) -> None:
        here, self._state = self._state, self._read()
        torch.set_rng_state(here[0])
        if self._device:
            torch.cuda.set_rng_state(here[1], self._device)
