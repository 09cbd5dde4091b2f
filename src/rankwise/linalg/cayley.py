"""The Cayley transform of tall matrices: orthonormal columns from free parameters.

Its gradient is written out: autograd's takes twice as long, most of it over matrices that are nowhere needed. Of rows,
as G is stored, with M = I + Zᵀ and V = M⁻¹, Qᵀ = [2V − I, −2V Yᵀ] and for gradients P₁ and P₂ of the two blocks

    ∂V = 2P₁ − 2P₂Y,   ∂M = −Vᵀ ∂V Vᵀ,   ∂Xᵀ = ∂M − ∂Mᵀ,   ∂Yᵀ = (∂M + ∂Mᵀ)Yᵀ − 2VᵀP₂.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rankwise.derivatives import by_hand, outside_autocast
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
    return cayley_of_blocks(G.mT)[0].mT


def cayley_of_blocks(*rows: Tensor) -> tuple[Tensor, ...]:
    """Qᵀ in blocks, from Gᵀ in blocks (…, r, m_1), (…, r, m_2), …, m_1 ≥ r: as `cayley`, without a copy of all."""
    return _Cayley.apply(*rows) if by_hand() else _transform(rows)[0]  # type: ignore[return-value]


def inverse_cayley(Q: Tensor) -> Tensor:
    """G = [X; Y] whose Cayley transform is Q (m, r), where I + Q₁ is invertible (see `invertible_signs`).

    Z = (I + Q₁)⁻¹(I − Q₁), Y = −½Q₂(I + Z), X − Xᵀ = Z − YᵀY, of which X is chosen skew.

    >>> Q = torch.linalg.qr(torch.tensor([[0.5, 2.0], [1.0, 0.0], [3.0, 4.0]], dtype=torch.float64)).Q
    >>> Q = Q * invertible_signs(Q[:2])
    >>> torch.allclose(cayley(inverse_cayley(Q)), Q)
    True
    """
    r = Q.shape[1]
    eye = torch.eye(r, dtype=Q.dtype, device=Q.device)
    Z = torch.linalg.solve(eye + Q[:r], eye - Q[:r])
    Y = -0.5 * Q[r:] @ (eye + Z)
    skew = Z - Y.mT @ Y
    return torch.cat([0.25 * (skew - skew.mT), Y])


def invertible_signs(top: Tensor) -> Tensor:
    """Signs d of columns with which I + top·diag(d) is safely invertible: an elimination's pivots, each ≥ 1 in size."""
    work, signs = top.clone(), torch.ones(len(top), dtype=top.dtype, device=top.device)
    for j in range(len(top)):
        signs[j] = 1 if work[j, j] >= 0 else -1
        work[j, j] += signs[j]
        work[j + 1 :, j] /= work[j, j].clone()
        work[j + 1 :, j + 1 :] -= work[j + 1 :, j, None] * work[j, None, j + 1 :]
    return signs


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *rows: Tensor) -> tuple[Tensor, ...]:
        """The blocks of Qᵀ."""
        Q, V = _transform(rows)
        ctx.save_for_backward(V, *rows)
        return Q

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the blocks of Gᵀ."""
        V, *rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives go through V, too
            V = _transform(rows)[1]
        dtype = rows[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        P1, P2 = _first_columns([gradient.to(wide) for gradient in gradients])
        _, Y = _first_columns([block.to(wide) for block in rows])

        # −∂V = −2(P₁ − P₂Y), block by block of Yᵀ.
        half = P1
        for p, y in zip(P2, Y, strict=True):
            half = _less_product(half, p, y.mT)
        minus_dV = (-2 * half).to(V.dtype)
        dM = V.mT @ minus_dV @ V.mT

        # ∂Xᵀ = ∂M − ∂Mᵀ and ∂Yᵀ = (∂M + ∂Mᵀ)Yᵀ − 2VᵀP₂.
        dX = (dM - dM.mT).to(wide)
        symmetric = (dM + dM.mT).to(wide)
        twice_V = (2 * V.mT).to(wide)
        dY = [_less_product(symmetric @ y, twice_V, p) for p, y in zip(P2, Y, strict=True)]

        first_block = torch.cat([dX, dY[0]], dim=-1)
        return tuple(block.to(dtype) for block in (first_block, *dY[1:]))


def _less_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """A − b c, as one operation for a matrix or a stack of them."""
    if a.dim() == 3:
        return torch.baddbmm(a, b, c, alpha=-1)
    return torch.addmm(a, b, c, alpha=-1) if a.dim() == 2 else a - b @ c


def _first_columns(blocks: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The square that the first block begins with, and the blocks without it."""
    r = blocks[0].shape[-2]
    return blocks[0][..., :r], [blocks[0][..., r:], *blocks[1:]]


def _transform(rows: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """The blocks of Qᵀ, in the dtype of those of Gᵀ, and V = Wᵀ."""
    r, dtype = rows[0].shape[-2], rows[0].dtype
    X, Y = _first_columns([exact(block) for block in rows])

    # I + Zᵀ, where Zᵀ = Xᵀ − X + YᵀY of the stored rows. What is added to the diagonal alone is added to it in place.
    skew = X.mT - X
    gram = reduce(torch.add, (y @ y.mT for y in Y))
    with torch.no_grad():
        sizes = gram.diagonal(dim1=-2, dim2=-1) + torch.linalg.vector_norm(skew, dim=-2)
        raised_ones = 1 + MARGIN * r * torch.finfo(gram.dtype).eps * sizes
    M = skew + gram
    M.diagonal(dim1=-2, dim2=-1).add_(raised_ones)
    # inv_ex rather than inv: it does not stop a CUDA stream to ask whether the matrix was singular, and none is.
    V = torch.linalg.inv_ex(M).inverse.mT

    # Qᵀ = [2V − I, −2V·Yᵀ].
    minus_twice_V = -2 * V
    upper = -minus_twice_V
    upper.diagonal(dim1=-2, dim2=-1).sub_(1)
    lower = [(minus_twice_V @ y).to(dtype) for y in Y]
    first_block = torch.cat([upper.to(dtype), lower[0]], dim=-1)
    return (first_block, *lower[1:]), V
