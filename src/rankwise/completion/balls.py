"""Balls of the Schatten norms that have a name: projections onto them, and the norms dual to theirs.

A unitarily invariant norm's ball is projected onto by projecting the singular values, whatever the singular vectors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.linalg.norms import EXPONENTS, schatten


def onto_ball(X: Tensor, bound: float, norm: str, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest matrix of ‖·‖ ≤ δ to X, of at most `rank` ranks, as its decomposition U, σ, Vᵀ.

    With fewer ranks than X has it is the nearest of those (the set is not convex), since all three projections keep the
    order of singular values.
    """
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = values_onto_ball(S[:rank], bound, norm)
    return U[:, :rank], S, Vh[:rank]


def values_onto_ball(S: Tensor, bound: float, norm: str) -> Tensor:
    """The nearest σ ≥ 0 to falling S ≥ 0 with ‖σ‖_p ≤ δ, p = ∞, 2 or 1 for the spectral, Frobenius or nuclear norm."""
    if norm == "spectral":
        return S.clamp_max(bound)
    if norm == "frobenius":
        return S * min(1.0, bound / max(float(torch.linalg.vector_norm(S)), 1e-300))
    if float(S.sum()) <= bound:
        return S
    # Onto the simplex: subtract the θ at which what stays above 0 sums to δ.
    over = (S.cumsum(0) - bound) / torch.arange(1, len(S) + 1, dtype=S.dtype, device=S.device)
    last = max(0, int((over < S).sum()) - 1)
    return (S - over[last]).clamp_min(0)


def dual_norm(G: Tensor, norm: str) -> float:
    """max ⟨G, X⟩ over ‖X‖ ≤ 1: the Schatten norm of the conjugate exponent."""
    p = EXPONENTS[norm]
    return float(schatten(G, {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[p]))
