"""How many bits each component gets, by its energy.

Reverse water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3): for the least squared error at a given
rate, all components are left with the same error a bit more would save, so that bits rise with log2 σ, and what lies
below the water is dropped. Here the errors are not those of a formula but measured, at every number of bits.

But the squared error of ΔW is not the loss: large updates bear as large an error, relative to them, as small ones do.
So the error of a component counts by σ^-WORTH; 0 would be water-filling as in the book, 2 the relative error alone.
What is measured best is near the latter (scripts/bench/NOTES.md): a bit more where σ is 16 times as large.

Dimensions: C components of a layer, K of all layers, B numbers of bits from 0, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dynlora_cli.errors import UsageError
from dynlora_cli.rounding.codes import MOST_BITS, bytes_of, quantized, restored

WORTH = 1.5
Pair = tuple[Tensor, Tensor]  # a_CI and b_OC


class Costs(NamedTuple):
    """What each component of a layer is at every number of bits.

    Attributes:
        errors_CB: ‖b'a'ᵀ - b aᵀ‖², by what it is worth.
        bytes_B: bytes that it takes.
    """

    errors_CB: Tensor
    bytes_B: Tensor


def equal_lengths(a_CI: Tensor, b_OC: Tensor) -> Pair:
    """The same components with both vectors of a length."""
    ratio_C = (b_OC.norm(dim=0) / a_CI.norm(dim=1).clamp(min=1e-30)).clamp(min=1e-30).sqrt()
    return a_CI * ratio_C[:, None], b_OC / ratio_C


def costs(a_CI: Tensor, b_OC: Tensor, worth: float = WORTH) -> Costs:
    """Errors and sizes of a layer's components, whose vectors are balanced."""
    whole_C = a_CI.square().sum(1) * b_OC.square().sum(0)
    errors = [whole_C]
    for bits in range(1, MOST_BITS + 1):
        a, b = through(a_CI, bits), through(b_OC.T, bits)
        both_C = (a * a_CI).sum(1) * (b * b_OC.T).sum(1)
        errors.append((a.square().sum(1) * b.square().sum(1) - 2 * both_C + whole_C).clamp(min=0))
    sizes = [bytes_of(a_CI.shape[1], bits) + bytes_of(b_OC.shape[0], bits) for bits in range(MOST_BITS + 1)]
    by_C = whole_C.double().clamp(min=1e-60) ** (-worth / 2)
    return Costs(torch.stack(errors, 1).double() * by_C[:, None], torch.tensor(sizes, dtype=torch.float64))


def within(cost: Costs, bits: float) -> float:
    """Bytes that a layer's components take where all have so many bits, which may lie between two whole numbers."""
    low = min(int(bits), MOST_BITS - 1)
    one = cost.bytes_B[low] + (bits - low) * (cost.bytes_B[low + 1] - cost.bytes_B[low])
    return len(cost.errors_CB) * one.item()


def through(x_VN: Tensor, bits: int) -> Tensor:
    """Vectors as they come back from so many bits; zeros from none."""
    return restored(*quantized(x_VN, bits), bits) if bits else torch.zeros_like(x_VN)


def share_out(layers: Mapping[str, Costs], limit: int) -> dict[str, list[int]]:
    """Bits of every component, with the smallest sum of `errors_CB` that a number of bytes allows.

    Args:
        layers: costs by layer.
        limit: bytes of all components.

    Raises:
        UsageError: not even one component at one bit is within it.
    """

    def at(price: float) -> dict[str, Tensor]:
        return {name: (cost.errors_CB + price * cost.bytes_B).argmin(1) for name, cost in layers.items()}

    def size(bits: Mapping[str, Tensor]) -> float:
        return sum(layers[name].bytes_B[bits_C].sum().item() for name, bits_C in bits.items())

    most = max(cost.errors_CB.max().item() for cost in layers.values())
    low, high = 0.0, max(most, 1e-300)  # at the highest price nothing is worth a byte
    if not any(bits_C.any() for bits_C in at(low).values()):
        raise UsageError("every component is zero, or too small for any number of bits", "use --to peft")
    if size(at(low)) <= limit:
        return {name: bits_C.tolist() for name, bits_C in at(low).items()}
    for _ in range(200):
        middle = math.sqrt(max(low, high * 1e-40) * high)
        low, high = (low, middle) if size(at(middle)) <= limit else (middle, high)
    found = at(high)
    if not any(bits_C.any() for bits_C in found.values()):
        raise UsageError("so few bits leave nothing of the adapter", "allow more, such as 2")
    return {name: bits_C.tolist() for name, bits_C in found.items()}
