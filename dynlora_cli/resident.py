"""What a run holds in memory now, tensor by tensor: the base, what trains, and the optimizer's moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from dynlora_cli.state import Run


def resident_bytes(run: Run) -> dict[str, int]:
    """Bytes of tensors, each storage once.

    Returns:
        base_bytes: frozen weights and buffers, with the scales of a quantized base.
        trained_bytes: what trains, with its gradient.
        optimizer_bytes: its moments, paged ones wherever they are.
    """
    seen: set[int] = set()
    trained = (tensor for parameter in run.parameters for tensor in (parameter, parameter.grad))
    moments = (value for state in run.optimizer.state.values() for value in state.values())
    states = (getattr(module, "state", None) for module in run.model.modules())  # of 8-bit layers, after a first pass
    model = chain(run.model.parameters(), run.model.buffers(), (state for state in states if hasattr(state, "SCB")))
    # Components are views of what trains, which is counted before the model.
    return {
        "trained_bytes": _count(trained, seen),
        "optimizer_bytes": _count(moments, seen),
        "base_bytes": _count((held for holder in model for held in _with_scales(holder)), seen),
    }


def _with_scales(holder: Any) -> Iterator[Any]:
    """What bitsandbytes keeps at a quantized weight or layer, with the scales of scales; of others the tensor alone."""
    yield holder
    for value in vars(holder).values():
        if hasattr(value, "absmax"):
            yield from _with_scales(value)
        else:
            yield value


def _count(values: Iterable[Any], seen: set[int]) -> int:
    total = 0
    for value in values:
        value = value.to_local() if hasattr(value, "to_local") else value
        if isinstance(value, Tensor) and (storage := value.untyped_storage()).data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
