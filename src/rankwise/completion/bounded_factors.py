"""NB-LoRA's parameters of all matrices within a Schatten ball: from them to factors, and back.

Source: "Norm-Bounded Low-Rank Adaptation", arXiv 2501.19050: X = 2·Bᵀ·diag(s)·A with AAᵀ + BBᵀ = I from the Cayley
transform of free (Ã, B̃), and ‖s‖_p ≤ δ. Here s = δ·z²/‖z²‖_p: by |z|/‖z‖_p a split sticks where an entry is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.linalg.cayley import cayley_of_blocks, inverse_cayley, invertible_signs
from rankwise.linalg.norms import EXPONENTS, on_unit_sphere, squared_norm_bound
from rankwise.update import Factors


class Free(NamedTuple):
    """Ã (r, n), B̃ (r, m) and z (r,): any numbers tell a matrix within the ball."""

    A: Tensor
    B: Tensor
    z: Tensor


def bounds(z: Tensor, bound: float, norm: str) -> Tensor:
    """s (r,): what each singular value is at most, ‖s‖_p = δ; δ for each with the spectral norm."""
    if norm == "spectral":
        return torch.full_like(z, bound)
    return bound * on_unit_sphere(z.square(), EXPONENTS[norm]).to(z.dtype)


def factors(free: Free, bound: float, norm: str) -> Factors:
    """X = 2·Bᵀ·diag(s)·A, with s divided by what rounding may have added to A and B."""
    A, B = cayley_of_blocks(free.A, free.B)
    stretch = squared_norm_bound(A.mT, B.mT).to(free.z.dtype)
    return Factors(B.mT, 2 * bounds(free.z, bound, norm) / stretch, A)


def free_of(U: Tensor, S: Tensor, Vh: Tensor, bound: float, norm: str) -> Free:
    """Ã, B̃ and z of X = U·diag(σ)·Vᵀ with ‖σ‖_p ≤ δ.

    s_j ≥ σ_j with ‖s‖_p = δ, then A = cos φ_j·v_jᵀ and B = sin φ_j·u_jᵀ with s_j·sin 2φ_j = σ_j, and the inverse
    Cayley transform of [A; B]; a pair (u_j, v_j) changes its sign where that transform needs it.
    """
    p = EXPONENTS[norm]
    if norm == "spectral":
        z = torch.ones_like(S)
    else:  # what is left of the bound is shared evenly in p-th powers
        spare = (1 - ((S / bound) ** p).sum()).clamp_min(0) / len(S)
        z = ((S / bound) ** p + spare) ** (0.5 / p)
    s = bounds(z, bound, norm)
    phi = 0.5 * torch.asin((S / s.clamp_min(1e-300)).clamp(max=1))
    Q = torch.cat([phi.cos() * Vh.mT, phi.sin() * U])
    A, B = inverse_cayley(Q * invertible_signs(Q[: len(S)])).split([Vh.shape[1], U.shape[0]])
    return Free(A.mT, B.mT, z)
