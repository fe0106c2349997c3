"""Gauge: rewrite a layer's components in the SVD basis of their sum, together with the optimizer's moments.

A trained BA can be split into rank-1 terms in many ways: (B T⁻¹)(T A) is the same update for every invertible T. Which
of them training ends in is arbitrary, so a score of its components would be arbitrary, too. In the SVD basis the
components are the directions of the update, ordered by size, and dropping the last k of them is the best approximation
of lower rank (Eckart-Young).

    A' = T A = c·Vᵀ        with c the mean row norm of the old A: A keeps its size, and so the learning rate its meaning
    B' = B T⁻¹ = U Σ / c

The components of each birth are turned by themselves, so that each stays one run's; held ones are not turned.

Adam's moments have to follow. A gradient transforms with the inverse transpose, and so does the first moment, its
running mean: m_A' = T⁻ᵀ m_A and m_B' = m_B Tᵀ. The second moment is transformed with the squared entries of the same
matrices, which is exact if the entries of the gradient are independent and an approximation otherwise.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dynlora_cli.lora.layer import ComponentLinear
from dynlora_cli.lora.moments import MOMENTS, read_moments, write_moments
from dynlora_cli.lora.pool import Pool

# If rows of A are nearly linearly dependent, T is ill-conditioned, and the layer keeps its basis.
MAX_CONDITION = 1e6
Factors = tuple[Tensor, Tensor]  # a_CI and b_OC


def to_svd_basis(pool: Pool, optimizer: torch.optim.Optimizer) -> int:
    """Rewrite every layer of the pool in its SVD basis, in place; the model computes the same as before.

    Left alone are layers whose B is still zero, since they have no direction yet, and those whose update depends on
    more than BA.

    Args:
        pool: its values are changed in place.
        optimizer: the one that steps `pool.values`; if it has Adam's moments, they are transformed as well.

    Returns:
        The number of layers turned.
    """
    moments = read_moments(optimizer, pool.values)
    flat = [pool.values.detach(), *(moments[key] for key in MOMENTS if moments)]
    turned = 0
    for layer, *parts in zip(pool.layers.values(), *map(pool.views, flat), strict=True):
        if layer.turns:
            births = list(zip(*(_by_birth(layer, a, b) for a, b in parts), strict=True))
            done = [_turn(*birth) for birth in (births[-1:] if pool.holds_old else births)]
            turned += any(done)
    if turned and moments:
        write_moments(optimizer, pool.values, moments)
    return turned


def _by_birth(layer: ComponentLinear, a_CI: Tensor, b_OC: Tensor) -> list[Factors]:
    """Views of the components of each birth; of a's, only what the inputs are multiplied with."""
    counts = list(layer.born)
    return list(zip(a_CI[:, : layer.in_features].split(counts), b_OC.split(counts, 1), strict=True))


def _turn(factors: Factors, first: Factors | None = None, second: Factors | None = None) -> bool:
    """Rewrite components in their SVD basis, in place, with their moments; whether that could be done."""
    basis = svd_basis(*factors) if len(factors[0]) and factors[1].any() else None
    if basis is None:
        return False
    T, T_inv = basis
    _transform(*factors, T, T_inv)
    if first is not None and second is not None:
        _transform(*first, T_inv.T, T.T)
        _transform(*second, T_inv.T.square(), T.T.square())
    return True


def svd_basis(a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor] | None:
    """T and T⁻¹, both [C, C] in fp64, such that (T A) and (B T⁻¹) are in SVD form.

    Takes a QR of each thin factor and an SVD of the small [C, C] core, never of a matrix of the layer's size. A
    direction with σ = 0 still gets a row of A, orthogonal to the others.

    Returns None if the rows of A are (nearly) linearly dependent, or if there are more components than inputs or
    outputs.
    """
    if a_CI.shape[0] > min(a_CI.shape[1], b_OC.shape[0]):
        return None
    a, b = a_CI.double(), b_OC.double()
    _, r_a = torch.linalg.qr(a.T)  # Aᵀ = q_a r_a
    diagonal = r_a.diagonal().abs()
    if diagonal.min() * MAX_CONDITION < diagonal.max():
        return None
    _, r_b = torch.linalg.qr(b)  # B = q_b r_b, so BA = q_b (r_b r_aᵀ) q_aᵀ
    _, _, vh = torch.linalg.svd(r_b @ r_a.T)
    c = a.norm(dim=1).mean()
    # A' = c·vh·q_aᵀ = c·vh·r_a⁻ᵀ·A, and T⁻¹ = r_aᵀ·vhᵀ / c because vh is orthogonal.
    T = torch.linalg.solve_triangular(r_a, c * vh.T, upper=True).T
    T_inv = r_a.T @ vh.T / c
    return T, T_inv


def svd_factors(a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor]:
    """The same update in SVD form, largest direction first, for factors that are not being trained.

    Returns:
        a_CI = c·Vᵀ and b_OC = UΣ/c, c the mean row norm of the old A; at most min(C, I, O) components.
    """
    u_OC, sigma_C, v_CI = _thin_svd(a_CI, b_OC)
    c = a_CI.double().norm(dim=1).mean() or 1.0  # if A is all zeros, any c will do
    return (c * v_CI).to(a_CI.dtype), (u_OC * (sigma_C / c)).to(b_OC.dtype)


def one_gauge(a_CI: Tensor, b_OC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Factors that depend on the update BA alone, so that those of several adapters can be compared number by number.

    a_CI = √Σ Vᵀ and b_OC = U √Σ, largest direction first, the largest number of each row of A positive. They are unique
    where no two singular values, and no two largest numbers of a row, are equal.

    Args:
        a_CI, b_OC: any factors of the update.
        count: components to return: zeros behind the update's own, or the best approximation by so many.
    """
    u_OC, sigma_C, v_CI = _thin_svd(a_CI, b_OC)
    u_OC, sigma_C, v_CI = u_OC[:, :count], sigma_C[:count], v_CI[:count]
    largest_C = v_CI.gather(1, v_CI.abs().argmax(1, keepdim=True))[:, 0]
    root_C = sigma_C.sqrt()
    a, b = (root_C * largest_C.sign())[:, None] * v_CI, u_OC * (root_C * largest_C.sign())
    more = count - len(root_C)
    return F.pad(a, (0, 0, 0, more)).to(a_CI.dtype), F.pad(b, (0, more)).to(b_OC.dtype)


def _thin_svd(a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, C], Σ [C] and Vᵀ [C, I] of BA in fp64; min(C, I, O) components."""
    q_a, r_a = torch.linalg.qr(a_CI.double().T)
    q_b, r_b = torch.linalg.qr(b_OC.double())
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, sigma, vh @ q_a.T


def _transform(a_CI: Tensor, b_OC: Tensor, left: Tensor, right: Tensor) -> None:
    a_CI.copy_((left @ a_CI.double()).to(a_CI.dtype))
    b_OC.copy_((b_OC.double() @ right).to(b_OC.dtype))
