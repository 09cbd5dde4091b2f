"""Sees the gradient of a frozen base weight, layer by layer, in an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GradientProbe(torch.autograd.Function):
    """The identity on a layer's output y = W x; in the backward pass, ∂L/∂W = Σ g xᵀ is handed to `receive`.

    Only one layer's (out, in) gradient lives at a time: it is made when the backward pass reaches the layer and dropped
    when `receive` returns. x is saved as autograd saves tensors, so that checkpointing recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
        """Y, unchanged."""
        ctx.save_for_backward(x)
        ctx.receive = receive
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of y, unchanged."""
        (g,), (x,) = gradients, ctx.saved_tensors
        with torch.no_grad():
            ctx.receive(g.flatten(0, -2).float().mT @ x.flatten(0, -2).float())
        return g, None, None
