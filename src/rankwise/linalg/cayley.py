"""The Cayley transform of tall matrices: orthonormal columns from free parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.precision import exact

MARGIN = 4
"""How many roundings of its own size, times r, the diagonal of I + Z is raised by."""


def cayley(G: Tensor) -> Tensor:
    """Q with orthonormal columns from each G = [X; Y], X the first r rows.

    Z = X − Xᵀ + YᵀY and Q = [(I − Z)(I + Z)⁻¹; −2Y(I + Z)⁻¹], by one batched inverse W = (I + Z)⁻¹ of r × r matrices:
    (I − Z)W = 2W − I. Y = 0 gives a zero lower block exactly.

    The diagonal of I + Z is raised by its own rounding, τ_j ≈ 4·r·eps·((YᵀY)_jj + ‖X − Xᵀ‖_j): about 1e-14 at ordinary
    sizes. QᵀQ = I − 4WᵀτW then: where Y is so large and collinear that I is lost against YᵀY, Q shrinks; it is never
    longer than orthonormal beyond a few millionths, and no finite float32 G makes it NaN.

    Args:
        G: (…, m, r), m ≥ r.

    Returns:
        Q of G's shape, in float64 where the device has it; differentiable.

    >>> Q = cayley(torch.tensor([[0.5, 2.0], [1.0, 0.0], [3.0, 4.0]]))
    >>> torch.allclose(Q.mT @ Q, torch.eye(2, dtype=Q.dtype))
    True
    """
    r = G.shape[-1]
    X, Y = exact(G).split([r, G.shape[-2] - r], dim=-2)
    skew, gram = X - X.mT, Y.mT @ Y
    with torch.no_grad():
        sizes = gram.diagonal(dim1=-2, dim2=-1) + torch.linalg.vector_norm(skew, dim=-2)
        diagonal = torch.diag_embed(1 + MARGIN * r * torch.finfo(gram.dtype).eps * sizes)
    # inv_ex rather than inv: it does not stop a CUDA stream to ask whether the matrix was singular, and none is.
    W = torch.linalg.inv_ex(diagonal + skew + gram).inverse
    return torch.cat([2 * W - torch.eye(r, dtype=W.dtype, device=W.device), Y @ (-2 * W)], -2)
