"""The polar factor of wide matrices from their r × r Gram matrices: no singular value decomposition of (r, n)."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.precision import exact


def inverse_root(A: Tensor) -> tuple[Tensor, Tensor]:
    """(A Aᵀ)^{-1/2} and the singular values of each A, from one batched symmetric eigendecomposition of A Aᵀ.

    Directions whose singular value is zero to working precision get 0 (the pseudo-inverse's answer), so an all-zero row
    stays zero and nothing is NaN.

    Args:
        A: (…, r, n), in float64 where the device has it.

    Returns:
        (…, r, r) and the singular values (…, r), ascending, in A's dtype.
    """
    gram = A @ A.mT
    w, V = torch.linalg.eigh(gram)
    floor = A.shape[-1] * torch.finfo(w.dtype).eps * w.amax(-1, keepdim=True)
    alive = w > floor
    sigma = torch.where(alive, w, 1).sqrt()
    root = (V * torch.where(alive, 1 / sigma, 0).unsqueeze(-2)) @ V.mT
    # Rounding leaves traces of the other rows in that of a zero row of A.
    root *= (gram.diagonal(dim1=-2, dim2=-1) != 0).unsqueeze(-1)
    return root, torch.where(alive, sigma, 0)


def polar(A: Tensor) -> tuple[Tensor, Tensor]:
    """The partial isometry U Vᵀ = (A Aᵀ)^{-1/2} A and the nuclear norm Σσ of each A = U Σ Vᵀ.

    Args:
        A: (…, r, n) with r ≤ n for full speed; any r and n are right.

    Returns:
        U Vᵀ of A's shape and dtype, and the nuclear norm (…), in float64 where the device has it.

    >>> Q, nuclear = polar(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
    >>> Q.tolist(), float(nuclear)
    ([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 7.0)
    """
    A64 = exact(A)
    root, sigma = inverse_root(A64)
    return (root @ A64).to(A.dtype), sigma.sum(-1)
