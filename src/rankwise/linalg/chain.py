"""The product of a chain of square matrices.

Its gradient is written out: autograd's keeps every partial product of float64, here they are made again. With
L_l = W_L ⋯ W_{l+1}, R_l = W_{l−1} ⋯ W_1 and g the gradient of the product, ∂W_l = L_lᵀ g R_lᵀ.
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
        factors, g = exact(W).unbind(-3), exact(g)
        right = accumulate(factors[:-1], lambda R, factor: factor @ R, initial=_eye_like(factors[0]))
        left = accumulate(factors[:0:-1], torch.matmul, initial=_eye_like(factors[0]))
        found = [L.mT @ g @ R.mT for L, R in zip([*left][::-1], right, strict=True)]
        return torch.stack(found, -3).to(W.dtype)


def _product(W: Tensor) -> Tensor:
    return reduce(torch.matmul, exact(W).unbind(-3)[::-1]).to(W.dtype)


def _eye_like(factor: Tensor) -> Tensor:
    return torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
