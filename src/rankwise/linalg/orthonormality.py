"""How far the columns of a matrix are from orthonormal, and the gradients of that distance."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.precision import exact


def orthonormality_gap(P: Tensor) -> tuple[Tensor, Tensor]:
    """‖PᵀP − I‖_F of each P and its gradient 2·P(PᵀP − I)/‖PᵀP − I‖_F.

    The norm has no gradient at exact orthonormality, and a rounding error's direction near it: the gradient is 0 below
    10·r·eps of P's dtype.

    Args:
        P: (…, m, r).

    Returns:
        The norms (…), in float64 where the device has it, and the gradients, of P's shape and dtype.
    """
    P64, E, norm = _gram_error(P)
    floor = 10 * P.shape[-1] * torch.finfo(P.dtype).eps
    scale = torch.where(norm > floor, 2 / norm.clamp_min(floor), 0)
    return norm, ((P64 @ E) * scale[..., None, None]).to(P.dtype)


def orthonormality_gap_squared(P: Tensor) -> tuple[Tensor, Tensor]:
    """‖PᵀP − I‖_F² of each P (…, m, r) and its gradient 4·P(PᵀP − I)."""
    P64, E, norm = _gram_error(P)
    return norm.square(), (4 * P64 @ E).to(P.dtype)


def _gram_error(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    P64 = exact(P)
    E = P64.mT @ P64 - torch.eye(P.shape[-1], dtype=P64.dtype, device=P.device)
    return P64, E, torch.linalg.matrix_norm(E)
