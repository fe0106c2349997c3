"""Gauge: turn a layer's components into the SVD basis of their sum, with the optimizer's moments.

The split of a trained BA into rank-1 terms is arbitrary: (B T⁻¹)(T A) is the same update for every invertible T. In the
SVD basis the terms are the directions of the update, ordered by size, so a score has something definite to judge and
dropping the last k terms is the best approximation of lower rank (Eckart-Young).

    A' = T A = c·Vᵀ        c: the mean row norm of A before, so that A keeps its size, and the learning rate its meaning
    B' = B T⁻¹ = U Σ / c

Gradients are covectors, and Adam's first moment with them: m_A' = T⁻ᵀ m_A and m_B' = m_B Tᵀ. Its second moment goes
with the squared matrices, which is exact for independent entries and an approximation otherwise.

Dimensions: C components, I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynlora_cli.lora.moments import read_moments, write_moments
from dynlora_cli.lora.pool import Pool

# Rows of A that are nearly dependent make T ill-conditioned; such a layer keeps its basis.
MAX_CONDITION = 1e6


def to_svd_basis(pool: Pool, optimizer: torch.optim.Optimizer) -> int:
    """Turn every layer of the pool into its SVD basis, in place; the function of the model stays the same.

    A layer whose B is zero has no direction yet and is left alone, as is one whose update is no function of BA.

    Args:
        pool: its values are changed in place.
        optimizer: the one that steps `pool.values`; its moments (as of Adam) go along.

    Returns:
        The number of layers turned.
    """
    moments = read_moments(optimizer, pool.values)
    values = pool.views(pool.values.detach())
    first = pool.views(moments["exp_avg"]) if moments else []
    second = pool.views(moments["exp_avg_sq"]) if moments else []
    turned = 0
    for index, (layer, (a, b)) in enumerate(zip(pool.layers.values(), values, strict=True)):
        if not layer.turns or a.shape[0] == 0 or not b.any():
            continue
        basis = svd_basis(a, b)
        if basis is None:
            continue
        turned += 1
        T, T_inv = basis
        _transform(a, b, T, T_inv)
        if moments:
            _transform(*first[index], T_inv.T, T.T)
            _transform(*second[index], T_inv.T.square(), T.T.square())
    if turned and moments:
        write_moments(optimizer, pool.values, moments)
    return turned


def svd_basis(a_CI: Tensor, b_OC: Tensor) -> tuple[Tensor, Tensor] | None:
    """T and T⁻¹, both [C, C] in fp64, such that (T A) and (B T⁻¹) are in SVD form.

    QR of the two thin factors and the SVD of the small core; never a matrix of the layer's size. Directions with σ = 0
    keep a row of A, orthogonal to the others. None where the rows of A are (nearly) dependent.
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
    """The same update in SVD form, largest first, for factors that no optimizer holds.

    Returns:
        a_CI = c·Vᵀ and b_OC = UΣ/c, c the mean row norm of the old A; at most min(C, I, O) components.
    """
    a, b = a_CI.double(), b_OC.double()
    q_a, r_a = torch.linalg.qr(a.T)
    q_b, r_b = torch.linalg.qr(b)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    c = a.norm(dim=1).mean() or 1.0  # of factors that are all zero any size will do
    return (c * vh @ q_a.T).to(a_CI.dtype), (q_b @ u * (sigma / c)).to(b_OC.dtype)


def _transform(a_CI: Tensor, b_OC: Tensor, left: Tensor, right: Tensor) -> None:
    a_CI.copy_((left @ a_CI.double()).to(a_CI.dtype))
    b_OC.copy_((b_OC.double() @ right).to(b_OC.dtype))
