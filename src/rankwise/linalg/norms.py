"""Schatten norms, and bounds on them."""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor

from rankwise.precision import exact

EXPONENTS = {"spectral": math.inf, "frobenius": 2.0, "nuclear": 1.0}
"""The exponent p of the Schatten norms that have a name."""


def schatten(W: Tensor, p: float) -> Tensor:
    """(Σ σ_j^p)^(1/p) of each W, the largest singular value for p = ∞.

    For p ≥ 2 from the eigenvalues of the smaller Gram matrix, the Frobenius norm without any; below 2, where the square
    root of a zero eigenvalue's rounding would count, from singular values.

    Args:
        W: (…, m, n).
        p: ≥ 1 or infinite.

    Returns:
        The norms (…), in float64 where the device has it.

    >>> [float(schatten(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), p)) for p in (1, 2, math.inf)]
    [7.0, 5.0, 4.0]
    """
    W = exact(W)
    if p == 2:
        return torch.linalg.matrix_norm(W)
    if p < 2:
        sigma = torch.linalg.svdvals(W)
    else:
        gram = W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W
        sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    ratios, largest = _by_the_largest(sigma)
    return largest.squeeze(-1) * torch.linalg.vector_norm(ratios, p, dim=-1)


def on_unit_sphere(z: Tensor, p: float) -> Tensor:
    """|z| / ‖z‖_p of each z (…, r), in float64 where the device has it; 0 where z is 0."""
    ratios, _ = _by_the_largest(exact(z).abs())
    return ratios / torch.linalg.vector_norm(ratios, p, dim=-1, keepdim=True).clamp_min(1)


def squared_norm_bound(*blocks: Tensor) -> Tensor:
    """An upper bound of ‖Q‖₂² that is 1 for orthonormal columns: 1 + ‖QᵀQ − I‖_F ≥ λ_max(QᵀQ).

    Args:
        blocks: Q, or blocks of its rows, (…, m, r).

    Returns:
        The bounds (…), in float64 where the device has it, constant in differentiation.
    """
    with torch.no_grad():
        gram = reduce(torch.add, (block.mT @ block for block in map(exact, blocks)))
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        return 1 + torch.linalg.matrix_norm(gram)


def _by_the_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / max x of x ≥ 0 (…, r), so that no power overflows, and max x (…, 1), held constant in differentiation."""
    largest = x.detach().amax(-1, keepdim=True)
    return x / torch.where(largest > 0, largest, 1), largest
