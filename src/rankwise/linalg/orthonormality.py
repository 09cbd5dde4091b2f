"""How far the columns of a matrix are from orthonormal, and the gradients of that distance."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.precision import exact


def orthonormality_gap(P: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """w·‖PᵀP − I‖_F of each P and its gradient 2w·P(PᵀP − I)/‖PᵀP − I‖_F.

    The norm has no gradient at exact orthonormality, and a rounding error's direction near it: the gradient is 0 below
    10·r·eps of P's dtype.

    Args:
        P: (…, m, r).
        weight: w, a number or (…).

    Returns:
        The norms (…), in float64 where the device has it, and the gradients, of P's shape and dtype.
    """
    E = _gram_error(P)
    norm = torch.linalg.matrix_norm(E)
    floor = 10 * P.shape[-1] * torch.finfo(P.dtype).eps
    scale = torch.where(norm > floor, 2 / norm.clamp_min(floor), 0)
    return weight * norm, _times(P, (weight * scale)[..., None, None] * E)


def orthonormality_gap_squared(P: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """w·‖PᵀP − I‖_F² of each P (…, m, r) and its gradient 4w·P(PᵀP − I), as `orthonormality_gap`."""
    E = _gram_error(P)
    value = weight * E.square().sum((-2, -1))
    return value, _times(P, 4 * torch.as_tensor(weight, device=E.device)[..., None, None] * E)


def _gram_error(P: Tensor) -> Tensor:
    """PᵀP − I, in float64 where the device has it: near orthonormal it is a small difference."""
    P64 = exact(P)
    return P64.mT @ P64 - torch.eye(P.shape[-1], dtype=P64.dtype, device=P.device)


def _times(P: Tensor, E: Tensor) -> Tensor:
    """P·E for a symmetric E (…, r, r), in P's dtype and laid out as P: nothing cancels here any more."""
    E = E.to(P.dtype)
    return P @ E if P.is_contiguous() else (E @ P.mT).mT
