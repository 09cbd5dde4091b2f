"""How many directions a matrix uses, from its singular values: measures of rank that are not integers by accident."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.checks import require_int
from rankwise.errors import ArgumentError
from rankwise.spectral.inputs import finite


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp(−Σ_i p_i log p_i) with p_i = σ_i / Σσ: the exponential of the spectrum's entropy.

    k for k equal singular values, near 1 where one dominates, 0 for a matrix of zeros.

    Args:
        singular_values: (…, k), ≥ 0, in any order.

    Returns:
        (…), float64, dimensionless, in [1, k] or 0.

    Raises:
        ArgumentError: a value is negative, NaN or infinite.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, eq. 3.

    >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])).round(decimals=6)
    tensor(3., dtype=torch.float64)
    """
    S = _spectrum(singular_values)
    total = S.sum(-1, keepdim=True)
    p = S / torch.where(total > 0, total, 1)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0)


def stable_rank(singular_values: Tensor) -> Tensor:
    """‖W‖_F² / ‖W‖_2² = Σσ² / σ_max², which small singular values hardly move; 0 for a matrix of zeros.

    Args:
        singular_values: (…, k), ≥ 0, in any order.

    Returns:
        (…), float64, dimensionless, in [1, k] or 0.

    Raises:
        ArgumentError: a value is negative, NaN or infinite.

    Source: Rudelson and Vershynin, "Sampling from large matrices", J. ACM 54 (2007).

    >>> stable_rank(torch.tensor([2.0, 1.0, 1.0]))
    tensor(1.5000, dtype=torch.float64)
    """
    return _spectrum(singular_values).square().sum(-1)


def energy_rank(singular_values: Tensor, share: float) -> Tensor:
    """The least k with Σ_{i≤k} σ_i² ≥ share·Σσ², largest first: the rank that keeps this share of the energy.

    Truncating there leaves ‖W − W_k‖_F ≤ √(1 − share)·‖W‖_F. 0 for a matrix of zeros. Sums are compared to rounding:
    values below about 1e-8 of the largest do not count, even with share = 1.

    Args:
        singular_values: (…, k), ≥ 0, in any order.
        share: of the energy Σσ² to keep, in (0, 1].

    Returns:
        (…), int64.

    Raises:
        ArgumentError: the share is outside (0, 1], or a value is negative, NaN or infinite.

    >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), 0.9)
    tensor(2)
    """
    if not 0 < share <= 1:
        raise ArgumentError("share", "be in (0, 1]", share)
    curve = energy_curve(singular_values)
    rounding = curve.shape[-1] * torch.finfo(curve.dtype).eps
    too_little = curve < share * (1 - rounding)
    # A matrix of zeros has a curve of zeros, and keeps nothing; an empty spectrum has no curve.
    return torch.where(curve.any(-1), too_little.sum(-1) + 1, 0)


def energy_curve(singular_values: Tensor) -> Tensor:
    """E_k = Σ_{i≤k} σ_i² / Σσ², largest first: the share of the energy that each rank k = 1..K would keep.

    Args:
        singular_values: (…, K), ≥ 0, in any order.

    Returns:
        (…, K), float64, rising to 1; 0 for a matrix of zeros.

    Raises:
        ArgumentError: a value is negative, NaN or infinite.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).

    >>> energy_curve(torch.tensor([2.0, 1.0, 1.0])).round(decimals=4).tolist()
    [0.6667, 0.8333, 1.0]
    """
    S = _spectrum(singular_values).sort(-1, descending=True).values
    if S.shape[-1] == 0:
        return S
    captured = S.square().cumsum(-1)
    total = captured[..., -1:]
    return captured / torch.where(total > 0, total, 1)


def numerical_rank(singular_values: Tensor, larger_side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """#{i : σ_i > max(m, n)·eps·σ_1}: the singular values that rounding in `dtype` cannot have made.

    Args:
        singular_values: (…, k), ≥ 0, in any order.
        larger_side: max(m, n) of the matrix.
        dtype: what the matrix was trained in, whose eps counts.

    Returns:
        (…), int64; 0 for a matrix of zeros.

    Raises:
        ArgumentError: the side is below 1, or a value is negative, NaN or infinite.

    Source: Golub and Van Loan, "Matrix Computations", section 5.4.1; as `numpy.linalg.matrix_rank`.

    >>> numerical_rank(torch.tensor([1.0, 1e-2, 1e-9]), larger_side=100)
    tensor(2)
    """
    require_int("larger_side", larger_side, least=1)
    # The spectrum is relative to its largest value, so that σ_1 is 1 here.
    return (_spectrum(singular_values) > larger_side * torch.finfo(dtype).eps).sum(-1)


def subspace_use(singular_values: Tensor) -> Tensor:
    """‖W‖_* / (√r·‖W‖_F) = Σσ / √(r·Σσ²): 1 where all r singular directions are used alike, 1/√r where one is.

    Args:
        singular_values: (…, r), ≥ 0, in any order; r is how many there are, zeros included.

    Returns:
        (…), float64, dimensionless, in [1/√r, 1], or 0 for a matrix of zeros.

    Raises:
        ArgumentError: a value is negative, NaN or infinite.

    Source: NNM-LoRA, eq. 11: ‖A‖_* ≤ √r·‖A‖_F, with equality where all singular values are equal.

    >>> subspace_use(torch.tensor([3.0, 3.0, 3.0, 3.0])).item(), subspace_use(torch.tensor([3.0, 0, 0, 0])).item()
    (1.0, 0.5)
    """
    S = _spectrum(singular_values)
    most = (S.shape[-1] * S.square().sum(-1)).sqrt()
    return torch.where(most > 0, S.sum(-1) / torch.where(most > 0, most, 1), 0)


def _spectrum(S: Tensor) -> Tensor:
    """Singular values in float64, each spectrum divided by its largest, so that no square over- or underflows."""
    S = finite("singular_values", S)
    if S.ndim == 0 or (S < 0).any():
        raise ArgumentError("singular_values", "be a tensor (…, k) of numbers ≥ 0", S.min().item())
    if S.shape[-1] == 0:
        return S
    largest = S.amax(-1, keepdim=True)
    return S / torch.where(largest > 0, largest, 1)
