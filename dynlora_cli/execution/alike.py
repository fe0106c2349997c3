"""All processes of a run must hold the same: components, and what decides which of them go.

They get there by computing the same from the same sums, and nothing would say when one of them does not: gradients of
different components would be added up. So they compare now and then, by hash, which costs a fraction of a second.

    other rows, another base, another recipe     an error, which names the process and its machine
    other numbers                                an error as well
    numbers that are others in their last bits   processors of two kinds round differently: all take one process's

Dimensions: P processes, N things that are compared.
"""

from __future__ import annotations

import hashlib
import math
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, distributed

from dynlora_cli.errors import DynloraError

TOLERANCE = 1e-3  # relative; rounding is below 1e-5, a process with other gradients is above
HINT = "look at that machine: its files, packages and memory; nothing wrong is saved: go on with --resume"


def same_facts(facts: Mapping[str, str]) -> None:
    """Compare what the processes began with.

    Args:
        facts: by name, as texts.

    Raises:
        DynloraError: in some process it is something else.
    """
    everywhere: list[tuple[str, dict[str, str]]] = gather_object([(socket.gethostname(), dict(facts))])
    for name in _all_names(everywhere):
        odd, usual = _odd([theirs.get(name) for _, theirs in everywhere])
        if odd:
            hosts = {rank: everywhere[rank][0] for rank in (*odd, usual)}
            raise DynloraError(
                f"{_named(odd, hosts)}: {name} {'is' if len(odd) == 1 else 'are'} not as in process {usual} "
                f"on {hosts[usual]}",
                "every machine needs the same files and the same versions of the packages",
            )


@torch.no_grad()
def same_numbers(tensors: Mapping[str, Tensor], when: str, tolerance: float = TOLERANCE) -> str | None:
    """Compare tensors of all processes; those that differ in rounding alone become one process's, in place.

    Args:
        tensors: by name, [...]; the names are the same in all processes.
        when: for the message, such as "at step 40".
        tolerance: difference that counts as rounding, relative to the tensor's norm.

    Returns:
        A note, where numbers were taken over.

    Raises:
        DynloraError: they differ by more.
    """
    everywhere = gather_object([(socket.gethostname(), {name: _digest(tensor) for name, tensor in tensors.items()})])
    note = None
    for name in _all_names(everywhere):  # alike in all processes, since each broadcast below needs all of them
        digests_P = [theirs.get(name) for _, theirs in everywhere]
        odd, usual = _odd(digests_P)
        if not odd:
            continue
        kinds = {digest and digest[1:] for digest in digests_P}
        comparable = len(kinds) == 1 and tensors[name].is_floating_point()
        far = max(_far(tensors[name], usual)) if comparable else None
        hosts = {rank: everywhere[rank][0] for rank in (*odd, usual)}
        if far is None or not far <= tolerance:
            by = "" if far is None else f", by {far:.1g} of their size"
            raise DynloraError(
                f"{_named(odd, hosts)}: other {name} than in process {usual} on {hosts[usual]} {when}{by}", HINT
            )
        note = (
            f"{_named(odd, hosts)}: {name} differ by {far:.1g} from process {usual}'s {when}, as between processors "
            "of two kinds; all go on with the same"
        )
        distributed.broadcast(tensors[name].data, usual)
    return note


def _digest(tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    """Hash, type and shape."""
    data: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(data).hexdigest(), str(tensor.dtype), tuple(tensor.shape)


def _all_names(everywhere: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What any process has, in one order."""
    return list(dict.fromkeys(name for _, theirs in everywhere for name in theirs))


def _odd(values_P: list[Any]) -> tuple[list[int], int]:
    """The processes that are not as most, and one that is; where as many are of either kind, the first is right."""
    counts = Counter(values_P)
    usual = max(counts, key=lambda value: (counts[value], -values_P.index(value)))
    return [rank for rank, value in enumerate(values_P) if value != usual], values_P.index(usual)


def _far(tensor: Tensor, usual: int) -> list[float]:
    """How far every process's tensor is from that of one of them, of its norm. [P]"""
    theirs = tensor.clone()
    distributed.broadcast(theirs, usual)
    own = (tensor.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
    return [torch.inf if math.isnan(value) else value for value in gather_object([own.item()])]


def _named(ranks: list[int], hosts: Mapping[int, str]) -> str:
    return ", ".join(f"process {rank} on {hosts[rank]}" for rank in ranks)
