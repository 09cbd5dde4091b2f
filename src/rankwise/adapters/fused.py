"""A frozen linear layer and its low-rank update as one differentiable function.

    y = (W + F) x + b + B·diag(s)·A z

z is x, or x after dropout; F is a frozen part of the update. Autograd would take a pass over y for every sum, forward
and backward. Here every sum is made within the product that ends in it, and of all that grows with the number of inputs
z and h = A z alone are kept. With g = ∂L/∂y and e = s ∘ Bᵀg:

    ∂x = (W + F)ᵀ g,   ∂z = Aᵀ e,   ∂B = g (s ∘ h)ᵀ,   ∂s = Σ h ∘ Bᵀg,   ∂A = e zᵀ,

the first two as one where z is x. Where that takes less time and the weight has the digits for it, the update is added
to a copy of the weight in each pass, V = W + F + B·diag(s)·A,

    y = V x + b,   ∂x = Vᵀ g,

which saves A x and B h in the forward pass and Aᵀ e in the backward pass, where h is made instead, for out·in·r each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.derivatives import outside_autocast
from rankwise.precision import multiplied_whole
from rankwise.update import Factors

COPY = 32
"""Multiplications in the time of copying one element of a weight, about (`bench/README.md`)."""


def fused_linear(
    x: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, update: Factors, frozen: Factors | None = None
) -> Tensor:
    """(W + F) x + b + B·diag(s)·A z; all of one dtype, but for s.

    What is added to W is added to a copy that is made anew in each pass: none is kept between them.

    Args:
        x: (…, in).
        z: (…, in), or None for x.
        W: (out, in), without a gradient.
        b: (out,), without a gradient.
        update: B (out, r), s (r,), A (r, in).
        frozen: F, without a gradient.
    """
    into_weight = z is None and worth_adding(x, W, update.r, W.dtype, copies=2)
    y: Tensor = _FusedLinear.apply(x, z, W, b, *update, *(frozen or (None, None, None)), into_weight)
    # Shaped out here: what a function of one's own returns as a view cannot be changed in place.
    return y.view(*x.shape[:-1], W.shape[0])


def worth_adding(x: Tensor, W: Tensor, r: int, dtype: torch.dtype, *, copies: int = 1) -> bool:
    """Whether r ranks cost less where they are added to W than where n inputs x are multiplied by them.

    A rank then takes out·in operations for each of the `copies` of W that save it n·(in + out), one multiplication by
    all inputs and outputs; and a copy itself takes time. Not where products in `dtype` would round a small update away
    in W (bfloat16, TF32).
    """
    saved = r * (x.shape[:-1].numel() * sum(W.shape) - copies * W.numel())
    return saved > COPY * copies * W.numel() and multiplied_whole(dtype, W.device)


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
        s0: Tensor | None,
        A0: Tensor | None,
        into_weight: bool,
    ) -> Tensor:
        """The rows of y."""
        rows, Bs = _rows(x), _scaled(B, s)
        h = None if into_weight else _narrow(rows if z is None else _rows(z), A.mT)
        y = F.linear(rows, _with(W, _frozen(W, B0, s0, A0), (Bs, A) if into_weight else None), b)
        ctx.shape, ctx.dropped, ctx.into_weight = x.shape, z is not None, into_weight
        trained = any(ctx.needs_input_grad[4:7])  # of a frozen update, no gradient needs the inputs
        ctx.save_for_backward(*((x if z is None else z, h) if trained else (None, None)), W, B, s, A, B0, s0, A0)
        return y if h is None else y.addmm_(h, Bs.mT)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, z, B, s and A, those that are wanted."""
        (g,) = gradients
        z, h, W, B, s, A, *frozen = ctx.saved_tensors
        wants_x, wants_z, _, _, wants_B, wants_s, wants_A, *_ = ctx.needs_input_grad
        rows = None if z is None else _rows(z)
        Bs, beside = _scaled(B, s), not (ctx.dropped or ctx.into_weight)
        e = _narrow(g, Bs) if wants_A or wants_z or (wants_x and beside) else None
        dx = dz = dA = dB = ds = None
        if wants_x:
            dx = g @ _with(W, _frozen(W, *frozen), (Bs, A) if ctx.into_weight else None)
            dx = (dx if e is None or not beside else dx.addmm_(e, A)).view(ctx.shape)
        if e is not None:
            dz = (e @ A).view(ctx.shape) if wants_z else None
            dA = e.mT @ rows if wants_A and rows is not None else None
        if rows is not None and (wants_B or wants_s):
            if h is None or torch.is_grad_enabled():  # second derivatives go through h, too
                h = _narrow(rows, A.mT)
            G = _narrow(g.mT, h)
            dB, ds = _scaled(G, s), (B * G).sum(0, dtype=s.dtype) if wants_s else None
        return dx, dz, None, None, dB, ds, dA, None, None, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _scaled(B: Tensor, s: Tensor) -> Tensor:
    """B·diag(s) in B's dtype."""
    return (B * s).to(B.dtype)


def _narrow(a: Tensor, b: Tensor) -> Tensor:
    """A b for a b of few columns: below 16 of them, a CPU is two to three times as fast with the rows of bᵀaᵀ."""
    return a @ b if b.shape[1] >= 16 else (b.mT @ a.mT).mT


def _frozen(W: Tensor, B: Tensor | None, s: Tensor | None, A: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """B·diag(s) and A in W's dtype, anew in each pass: kept from one to the other, they would take half an adapter."""
    return None if B is None or s is None or A is None else ((B * s).to(W.dtype), A.to(W.dtype))


def _with(W: Tensor, *parts: tuple[Tensor, Tensor] | None) -> Tensor:
    """W + Σ B A over the parts that are there, in one pass over W."""
    held = [part for part in parts if part is not None]
    if len(held) < 2:
        return torch.addmm(W, *held[0]) if held else W
    return torch.addmm(W, torch.cat([B for B, _ in held], 1), torch.cat([A for _, A in held], 0))
