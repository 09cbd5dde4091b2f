"""Sees the gradient of a frozen base weight, layer by layer, in an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS = 512
"""Rows of a layer's input that are multiplied at a time."""


class GradientProbe(torch.autograd.Function):
    """The identity on a layer's output y = W x; in the backward pass, ∂L/∂W = Σ g xᵀ is handed to `receive`.

    Only one layer's (out, in) gradient lives at a time: it is made when the backward pass reaches the layer and dropped
    when `receive` returns. x is saved as autograd saves tensors, so that checkpointing recomputes it. y itself is
    returned, not a view, so that what follows may change it in place. A layer that is used several times in a forward
    pass is probed at each use: `receive` gets one use's part of ∂L/∂W at a time, the last use's first.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """Y, unchanged."""
        ctx.save_for_backward(x)
        ctx.mark_dirty(y)
        ctx.receive = receive
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of y, unchanged."""
        (g,), (x,) = gradients, ctx.saved_tensors
        with torch.no_grad():
            ctx.receive(_sum_of_products(g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])))
        return g, None, None


def _sum_of_products(g: Tensor, x: Tensor) -> Tensor:
    """Σ g xᵀ (out, in) in float32, few rows widened at a time; in place, which autocast leaves alone."""
    total = torch.zeros(g.shape[1], x.shape[1], dtype=torch.float32, device=g.device)
    for some_g, some_x in zip(g.split(ROWS), x.split(ROWS), strict=True):
        total.addmm_(some_g.float().mT, some_x.float())
    return total
