"""Vectors in 1 to 8 bits a number, in groups that share a step.

    x ≈ level_k(q) · step          level_k(q) = Φ⁻¹((q + ½) / 2ᵏ), rounded to 1/1024; q from 0 to 2ᵏ - 1

The levels are denser in the middle, where numbers of a normal distribution are (Φ is its distribution function).

The step of a group is 2^((c - 192) / 8) with c one byte, from 2⁻²⁴ to 2⁸, and 0 for c = 0: every byte is a step, so
that no file can hold one that is none. It is the one of some below that of the group's largest number that gives the
smallest squared error: cutting a few large numbers off is worth finer steps for all others.

Dimensions: V vectors, N numbers of a vector, G groups of a vector, S numbers of a group, Q levels.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 64
MOST_BITS = 8
_ZERO, _PER_OCTAVE = 192, 8
_TRIED = 26  # steps, down to a ninth of the largest: with one bit all numbers of a group have one size
_AT_ONCE = 1 << 22  # numbers that are tried together


@cache
def levels(bits: int) -> Tensor:
    """The values that a number of so many bits can have at a step of 1, rising. [2ᵏ]"""
    share_Q = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    return ((1024 * torch.special.ndtri(share_Q)).round() / 1024).float()


def groups_of(numbers: int) -> int:
    """Groups of a vector."""
    return -(-numbers // GROUP)


def bytes_of(numbers: int, bits: int) -> int:
    """Bytes of one vector: codes, filled up to a byte, and a step for each group."""
    return -(-numbers * bits // 8) + groups_of(numbers) if bits else 0


def quantized(x_VN: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes [V, N] and the steps' bytes [V, G] of vectors, both uint8."""
    parts = max(1, x_VN.numel() // _AT_ONCE)
    done = [_quantized(part, bits) for part in x_VN.chunk(min(parts, len(x_VN)))]
    return torch.cat([q for q, _ in done]), torch.cat([c for _, c in done])


def restored(q_VN: Tensor, c_VG: Tensor, bits: int) -> Tensor:
    """The vectors, in fp32, from codes and steps."""
    step_VN = _steps(c_VG).repeat_interleave(GROUP, 1)[:, : q_VN.shape[1]]
    return levels(bits)[q_VN.long()] * step_VN


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
    groups, level_Q = groups_of(numbers), levels(bits)
    between_Q = (level_Q[1:] + level_Q[:-1]) / 2
    x_VGS = F.pad(x_VN.float(), (0, groups * GROUP - numbers)).view(vectors, groups, GROUP)
    real_GS = (torch.arange(groups * GROUP) < numbers).view(groups, GROUP)
    widest_VG = (_PER_OCTAVE * (x_VGS.abs().amax(2) / level_Q[-1]).clamp(min=1e-30).log2()).ceil() + _ZERO
    # Step 0 comes first: all numbers of the group are 0 then.
    q_VGS, c_VG, error_VG = torch.zeros_like(x_VGS), torch.zeros_like(widest_VG), x_VGS.square().sum(2)
    for tried in range(_TRIED):
        tried_VG = (widest_VG - tried).clamp(1, 255)
        step_VG1 = _steps(tried_VG)[..., None]
        found_VGS = torch.bucketize((x_VGS / step_VG1).contiguous(), between_Q)
        lost_VG = ((level_Q[found_VGS] * step_VG1 - x_VGS).square() * real_GS).sum(2)
        better_VG = lost_VG < error_VG
        error_VG = torch.where(better_VG, lost_VG, error_VG)
        c_VG = torch.where(better_VG, tried_VG, c_VG)
        q_VGS = torch.where(better_VG[..., None], found_VGS.float(), q_VGS)
    return q_VGS.reshape(vectors, -1)[:, :numbers].to(torch.uint8), c_VG.to(torch.uint8)
