"""How many directions a matrix uses, from its singular values: measures of rank that are not integers by accident."""

from __future__ import annotations

import torch
from torch import Tensor

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
    S = _spectrum(singular_values).sort(-1, descending=True).values
    if S.shape[-1] == 0:
        return torch.zeros(S.shape[:-1], dtype=torch.int64, device=S.device)
    captured = S.square().cumsum(-1)
    enough = share * captured[..., -1:] * (1 - S.shape[-1] * torch.finfo(S.dtype).eps)
    return torch.where(captured[..., -1] > 0, (captured < enough).sum(-1) + 1, 0)


def _spectrum(S: Tensor) -> Tensor:
    """Singular values in float64, each spectrum divided by its largest, so that no square over- or underflows."""
    S = finite("singular_values", S)
    if S.ndim == 0 or (S < 0).any():
        raise ArgumentError("singular_values", "be a tensor (…, k) of numbers ≥ 0", S.min().item())
    if S.shape[-1] == 0:
        return S
    largest = S.amax(-1, keepdim=True)
    return S / torch.where(largest > 0, largest, 1)
