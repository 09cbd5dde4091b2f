"""Condition numbers κ = σ_max/σ_min, of matrices and of the three matrices of an update in SVD form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.spectral.inputs import finite, matrices
from rankwise.update import Factors


class ConditionNumbers(NamedTuple):
    """κ of the product and of its two outer factors, (…) each, ≥ 1."""

    W: Tensor
    """κ(W_p), from the r largest singular values of W_p = U_p diag(S_p) V_pᵀ."""
    U: Tensor
    """κ(U_p); 1 where the columns are orthonormal up to one common scale."""
    V: Tensor
    """κ(V_p)."""


def condition_number(W: Tensor) -> Tensor:
    """κ(W) = σ_1/σ_k with k = min(m, n), of each matrix.

    Infinite where σ_k is 0 to working precision (σ_k ≤ max(m, n)·eps·σ_1), NaN for a matrix of zeros.

    Args:
        W: (…, m, n), of any floating dtype; read in float64.

    Returns:
        (…), dimensionless.

    Raises:
        ArgumentError: W is not a matrix, or holds a NaN or infinity.

    Source: SORSA (arXiv 2409.00055), eq. 30.

    >>> condition_number(torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
    tensor(8., dtype=torch.float64)
    >>> condition_number(torch.ones(3, 2))
    tensor(inf, dtype=torch.float64)
    """
    W = matrices("W", W)
    return _ratio(torch.linalg.svdvals(W), max(W.shape[-2:]))


def condition_numbers(triplets: Factors) -> ConditionNumbers:
    """κ(W_p), κ(U_p) and κ(V_p) of W_p = U_p diag(S_p) V_pᵀ, as SORSA's theorem 5 compares them.

    κ(W_p) is σ_1/σ_r of the rank-r product, not σ_1/σ_min(m,n), which would be infinite; where r > min(m, n) the last
    one of min(m, n). No dense matrix is formed. Infinite and NaN as in `condition_number`; NaN for r = 0.

    Args:
        triplets: Factors(U_p (…, m, r), S_p (…, r), V_pᵀ (…, r, n)).

    Returns:
        The three condition numbers, (…) each, float64, dimensionless.

    Raises:
        ArgumentError: a factor holds a NaN or infinity.

    Source: SORSA (arXiv 2409.00055), eq. 30–36.

    >>> U, S, Vh = torch.eye(4, 2), torch.tensor([6.0, 2.0]), torch.eye(2, 3)
    >>> [float(kappa) for kappa in condition_numbers(Factors(U, S, Vh))]
    [3.0, 1.0, 1.0]
    """
    U, S, Vh = finite("U", triplets.B), finite("S", triplets.s), finite("Vh", triplets.A)
    if triplets.r == 0:
        undefined = S.new_full(S.shape[:-1], torch.nan)
        return ConditionNumbers(undefined, undefined, undefined)
    m, n = U.shape[-2], Vh.shape[-1]
    return ConditionNumbers(
        _ratio(Factors(U, S, Vh).singular_values(), max(m, n)),
        _ratio(torch.linalg.svdvals(U), max(U.shape[-2:])),
        _ratio(torch.linalg.svdvals(Vh), max(Vh.shape[-2:])),
    )


def _ratio(S: Tensor, larger_side: int) -> Tensor:
    """σ_1/σ_k of falling singular values (…, k)."""
    first, last = S[..., 0], S[..., -1]
    last = torch.where(last > larger_side * torch.finfo(S.dtype).eps * first, last, 0)
    return first / last
