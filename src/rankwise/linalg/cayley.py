"""The Cayley transform of tall matrices: orthonormal columns from free parameters.

Its gradient is written out: autograd's takes twice as long, most of it over matrices that are nowhere needed. Of rows,
as G is stored, with M = I + Zᵀ and V = M⁻¹, Qᵀ = [2V − I, −2V Yᵀ] and for gradients P₁ and P₂ of the two blocks

    ∂V = 2P₁ − 2P₂Y,   ∂M = −Vᵀ ∂V Vᵀ,   ∂Xᵀ = ∂M − ∂Mᵀ,   ∂Yᵀ = (∂M + ∂Mᵀ)Yᵀ − 2VᵀP₂.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.derivatives import by_hand
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
        Q of G's shape and dtype, the inverse and what goes into it in float64; differentiable.

    >>> Q = cayley(torch.tensor([[0.5, 2.0], [1.0, 0.0], [3.0, 4.0]]))
    >>> torch.allclose(Q.mT @ Q, torch.eye(2, dtype=Q.dtype))
    True
    """
    rows = G.mT
    return (_Cayley.apply(rows) if by_hand() else _transform(rows)[0]).mT  # type: ignore[union-attr]


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Qᵀ."""
        Q, V = _transform(rows)
        ctx.save_for_backward(rows, V)
        return Q

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """The gradient of Gᵀ."""
        (P,), (rows, V) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives go through V, too
            V = _transform(rows)[1]
        r = rows.shape[-2]
        Y, P1, P2 = rows[..., r:], P[..., :r], P[..., r:]
        dV = 2 * (P1 - P2 @ Y.mT).to(V.dtype)
        dM = -(V.mT @ dV @ V.mT)
        dY = (dM + dM.mT).to(Y.dtype) @ Y - (2 * V.mT).to(P.dtype) @ P2
        return torch.cat([(dM - dM.mT).to(rows.dtype), dY], -1)


def _transform(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Qᵀ and V = Wᵀ of each Gᵀ (…, r, m)."""
    r = rows.shape[-2]
    X, Y = exact(rows).split([r, rows.shape[-1] - r], dim=-1)
    skew, gram = X.mT - X, Y @ Y.mT
    with torch.no_grad():
        sizes = gram.diagonal(dim1=-2, dim2=-1) + torch.linalg.vector_norm(skew, dim=-2)
        diagonal = torch.diag_embed(1 + MARGIN * r * torch.finfo(gram.dtype).eps * sizes)
    # inv_ex rather than inv: it does not stop a CUDA stream to ask whether the matrix was singular, and none is.
    V = torch.linalg.inv_ex(diagonal + skew + gram).inverse.mT
    upper = 2 * V - torch.eye(r, dtype=V.dtype, device=V.device)
    return torch.cat([upper.to(rows.dtype), ((-2 * V) @ Y).to(rows.dtype)], -1), V
