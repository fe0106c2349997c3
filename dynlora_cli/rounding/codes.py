"""Vectors in 1 to 8 bits a number, in groups that share a step.

    x ≈ (q + ½ - 2ᵏ⁻¹) · step          q from 0 to 2ᵏ - 1, of k bits

The step of a group is 2^((c - 192) / 8) with c one byte, from 2⁻²⁴ to 2⁸, and 0 for c = 0: every byte is a step, so
that no file can hold one that is none. It is the one of some below that of the group's largest number that gives the
smallest squared error: cutting a few large numbers off is worth finer steps for all others.

Dimensions: V vectors, N numbers of a vector, G groups of a vector, S numbers of a group, J steps that are tried.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GROUP = 64
MOST_BITS = 8
_ZERO, _PER_OCTAVE = 192, 8
_TRIED = 26  # steps, down to a ninth of the largest: with one bit all numbers of a group have one size
_AT_ONCE = 1 << 22  # numbers that are tried together


def groups_of(numbers: int) -> int:
    """Groups of a vector."""
    return -(-numbers // GROUP)


def bytes_of(numbers: int, bits: int) -> int:
    """Bytes of one vector: codes, filled up to a byte, and a step for each group."""
    return -(-numbers * bits // 8) + groups_of(numbers) if bits else 0


def quantized(x_VN: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes [V, N] and the steps' bytes [V, G] of vectors, both uint8."""
    parts = max(1, x_VN.numel() * _TRIED // _AT_ONCE)
    done = [_quantized(part, bits) for part in x_VN.chunk(min(parts, len(x_VN)))]
    return torch.cat([q for q, _ in done]), torch.cat([c for _, c in done])


def restored(q_VN: Tensor, c_VG: Tensor, bits: int) -> Tensor:
    """The vectors, in fp32, from codes and steps."""
    step_VN = _steps(c_VG).repeat_interleave(GROUP, 1)[:, : q_VN.shape[1]]
    return (q_VN.float() + (0.5 - 2 ** (bits - 1))) * step_VN


def packed(q_VN: Tensor, bits: int) -> bytes:
    """Codes as bytes, vector by vector, each filled up to a byte; the lowest bit first."""
    bits_VNk = (q_VN.numpy()[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(bits_VNk.reshape(len(q_VN), -1), axis=1, bitorder="little").tobytes()


def unpacked(data: Tensor, numbers: int, bits: int) -> Tensor:
    """Codes [V, N] of bytes [V, ...]."""
    bits_VM = np.unpackbits(data.numpy(), axis=1, bitorder="little")[:, : numbers * bits]
    weights = np.left_shift(1, np.arange(bits)).astype(np.uint8)
    return torch.from_numpy((bits_VM.reshape(len(data), numbers, bits) * weights).sum(2, dtype=np.uint8))


def _steps(c: Tensor) -> Tensor:
    return torch.where(c == 0, 0.0, ((c.float() - _ZERO) / _PER_OCTAVE).exp2())


def _quantized(x_VN: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    vectors, numbers = x_VN.shape
    groups, half = groups_of(numbers), 2 ** (bits - 1)
    x_VGS = torch.nn.functional.pad(x_VN.float(), (0, groups * GROUP - numbers)).view(vectors, groups, GROUP)
    real_GS = (torch.arange(groups * GROUP) < numbers).view(groups, GROUP)
    top_VG = x_VGS.abs().amax(2)
    widest_VG = (_PER_OCTAVE * (top_VG / (half - 0.5)).clamp(min=1e-30).log2()).ceil() + _ZERO
    c_JVG = (widest_VG - torch.arange(_TRIED).view(-1, 1, 1)).clamp(1, 255)
    step = _steps(c_JVG)[..., None]
    q = (x_VGS / step + (half - 0.5)).round().clamp(0, 2 * half - 1)
    error_JVG = (((q + (0.5 - half)) * step - x_VGS).square() * real_GS).sum(3)
    best_1VG = error_JVG.argmin(0, keepdim=True)
    c_VG = c_JVG.gather(0, best_1VG)[0]
    # Where 0 is nearer than the smallest step, as where all numbers are 0.
    c_VG = torch.where(error_JVG.gather(0, best_1VG)[0] >= x_VGS.square().sum(2), torch.zeros_like(c_VG), c_VG)
    q_VGS = q.gather(0, best_1VG[..., None].expand(-1, -1, -1, GROUP))[0]
    return q_VGS.reshape(vectors, -1)[:, :numbers].to(torch.uint8), c_VG.to(torch.uint8)
