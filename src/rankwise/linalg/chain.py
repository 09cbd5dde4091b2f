"""The product of a chain of square matrices.

Its gradient is written out: autograd's keeps every partial product of float64, here they are made again. With
R_l = W_{l−1} ⋯ W_1 and g the gradient of the product, ∂W_l = G_l R_lᵀ, where G_L = g and G_{l−1} = W_lᵀ G_l.
"""

from __future__ import annotations

from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rankwise.derivatives import by_hand, outside_autocast
from rankwise.precision import exact


def chain(W: Tensor) -> Tensor:
    """W_L ⋯ W_1, computed in float64: factors of ε make products that a float16 of autocast does not hold.

    Args:
        W: (…, L, r, r), W_1 first, L ≥ 1.

    Returns:
        (…, r, r) of W's dtype, differentiable.

    >>> chain(torch.tensor([[[1.0, 2.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]]]))
    tensor([[3., 6.],
            [0., 1.]])
    """
    return _Chain.apply(W) if by_hand() else _product(W)  # type: ignore[return-value]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(W)
        return _product(W)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]  one output, one gradient
        """The gradient of every factor."""
        (W,) = ctx.saved_tensors
        factors, G = exact(W).unbind(-3), exact(g)
        before = [*accumulate(factors[:-1], _after)]  # R_2 … R_L
        found = []
        for factor, R in zip(reversed(factors[1:]), reversed(before), strict=True):
            found.append(G @ R.mT)
            G = factor.mT @ G
        return torch.stack([G, *found[::-1]], -3).to(W.dtype)


def _product(W: Tensor) -> Tensor:
    return reduce(_after, exact(W).unbind(-3)).to(W.dtype)


def _after(product: Tensor, factor: Tensor) -> Tensor:
    return factor @ product
