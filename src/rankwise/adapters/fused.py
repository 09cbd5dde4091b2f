"""A frozen linear layer and its low-rank update as one differentiable function.

    y = (W + F) x + b + B·diag(s)·A z

z is x, or x after dropout; F is a frozen part of the update. Autograd would take a pass over y for every sum, forward
and backward. Here every sum is made within the product that ends in it, and of all that grows with the number of inputs
z and h = A z alone are kept. With g = ∂L/∂y and e = s ∘ Bᵀg:

    ∂x = (W + F)ᵀ g,   ∂z = Aᵀ e,   ∂B = g (s ∘ h)ᵀ,   ∂s = Σ h ∘ Bᵀg,   ∂A = e zᵀ,

the first two as one where z is x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.derivatives import outside_autocast
from rankwise.update import Factors


def fused_linear(
    x: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, update: Factors, frozen: Factors | None = None
) -> Tensor:
    """(W + F) x + b + B·diag(s)·A z; all of one dtype, but for s.

    F is added to a copy of W that is made anew in each pass: it takes time out·in·r, and no memory between passes.

    Args:
        x: (…, in).
        z: (…, in), or None for x.
        W: (out, in), without a gradient.
        b: (out,), without a gradient.
        update: B (out, r), s (r,), A (r, in).
        frozen: F, without a gradient.
    """
    B0, A0 = (None, None) if frozen is None else ((frozen.B * frozen.s).to(W.dtype), frozen.A.to(W.dtype))
    y: Tensor = _FusedLinear.apply(x, z, W, b, *update, B0, A0)
    # Shaped out here: what a function of one's own returns as a view cannot be changed in place.
    return y.view(*x.shape[:-1], W.shape[0])


class _FusedLinear(torch.autograd.Function):
    """The rows of y. Not for torch.func: a function that it can transform costs more time than a small layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        W: Tensor,
        b: Tensor | None,
        B: Tensor,
        s: Tensor,
        A: Tensor,
        B0: Tensor | None,
        A0: Tensor | None,
    ) -> Tensor:
        """The rows of y."""
        rows = _rows(x)
        y = F.linear(rows, _with(W, B0, A0), b)
        h = _narrow(rows if z is None else _rows(z), A.mT)
        ctx.shape, ctx.dropped = x.shape, z is not None
        trained = any(ctx.needs_input_grad[4:7])  # of a frozen update, no gradient needs the inputs
        ctx.save_for_backward(*((x if z is None else z, h) if trained else (None, None)), W, B, s, A, B0, A0)
        return y.addmm_(h, _scaled(B, s).mT)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, z, B, s and A, those that are wanted."""
        (g,) = gradients
        z, h, W, B, s, A, B0, A0 = ctx.saved_tensors
        wants_x, wants_z, _, _, wants_B, wants_s, wants_A, *_ = ctx.needs_input_grad
        rows = None if z is None else _rows(z)
        if rows is not None and torch.is_grad_enabled():  # second derivatives go through h, too
            h = rows @ A.mT
        e = _narrow(g, _scaled(B, s))
        dx = dz = dB = ds = None
        if wants_x:
            dx = g @ _with(W, B0, A0)
            dx = (dx if ctx.dropped else dx.addmm_(e, A)).view(ctx.shape)
        if ctx.dropped and wants_z:
            dz = (e @ A).view(ctx.shape)
        dA = e.mT @ rows if wants_A and rows is not None else None
        if wants_B or wants_s:
            G = _narrow(g.mT, h)
            dB, ds = _scaled(G, s), (B * G).sum(0, dtype=s.dtype) if wants_s else None
        return dx, dz, None, None, dB, ds, dA, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled(B: Tensor, s: Tensor) -> Tensor:
    """B·diag(s) in B's dtype."""
    return (B * s).to(B.dtype)


def _narrow(a: Tensor, b: Tensor) -> Tensor:
    """A b for a b of few columns: below 16 of them, a CPU is two to three times as fast with the rows of bᵀaᵀ."""
    return a @ b if b.shape[1] >= 16 else (b.mT @ a.mT).mT


def _with(W: Tensor, B0: Tensor | None, A0: Tensor | None) -> Tensor:
    return W if B0 is None or A0 is None else torch.addmm(W, B0, A0)
