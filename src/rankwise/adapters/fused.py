"""A frozen linear layer and its low-rank update as one differentiable function.

    y = (W + F) x + b + c·B·diag(s)·A z

z is x, or x after dropout; F is a frozen part of the update; c is a plain number, which a product takes along. Autograd
would take a pass over y for every sum, forward and backward. Here every sum is made within the product that ends in it,
and of all that grows with the number of inputs z and h = A z alone are kept. With g = ∂L/∂y and e = s ∘ Bᵀg:

    ∂x = (W + F)ᵀ g,   ∂z = c·Aᵀ e,   ∂B = c·g (s ∘ h)ᵀ,   ∂s = c·Σ h ∘ Bᵀg,   ∂A = c·e zᵀ,

the first two as one where z is x. Where that takes less time and the weight has the digits for it, the update is added
to a copy of the weight in each pass, V = W + F + c·B·diag(s)·A,

    y = V x + b,   ∂x = Vᵀ g,

which saves A x and B h in the forward pass and Aᵀ e in the backward pass, where h is made instead, for out·in·r each.
Where not even F is worth a copy, it stands beside the update: products have the ranks of both, gradients those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.derivatives import outside_autocast
from rankwise.precision import multiplied_whole
from rankwise.update import Factors, Parts, joined_factors

COPY = 32
"""Multiplications in the time of copying one element of a weight, about (`bench/README.md`)."""


def fused_linear(
    x: Tensor,
    z: Tensor | None,
    W: Tensor,
    b: Tensor | None,
    update: Factors | Parts,
    frozen: Factors | None = None,
    *,
    beside: Factors | None = None,
    joined: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """(W + F) x + b + c·B·diag(s)·A z; all of one dtype, but for s.

    What is added to W is added to a copy that is made anew in each pass: none is kept between them.

    Args:
        x: (…, in).
        z: (…, in), or None for x.
        W: (out, in), without a gradient.
        b: (out,), without a gradient.
        update: B (out, r), s (r,) or None for ones, A (r, in).
        frozen: F, without a gradient.
        beside: F, where it shall not be added to W; it sees z.
        joined: what `joined_factors` makes of the update and of F beside it, if that is there already.
        scale: c.
    """
    into_weight = z is None and beside is None and worth_adding(x, W, update.r, W.dtype, copies=2)
    F0, (left, right) = beside or frozen or (None, None, None), joined or (None, None)
    places = (into_weight, beside is not None)
    y: Tensor = _FusedLinear.apply(x, z, W, b, *update, *F0, left, right, scale, *places)
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
        s: Tensor | None,
        A: Tensor,
        B0: Tensor | None,
        s0: Tensor | None,
        A0: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        scale: float,
        into_weight: bool,
        beside: bool,
    ) -> Tensor:
        """The rows of y."""
        ctx.shape = x.shape
        ctx.dropped = z is not None
        ctx.scale = scale
        ctx.into_weight = into_weight
        ctx.beside = beside
        trained = any(ctx.needs_input_grad[4:7])  # of a frozen update, no gradient needs the inputs
        rows, input_ = _rows(x), x if z is None else z
        in_weight = None if beside else _frozen(W, B0, s0, A0)
        kept = (W, B, s, A, B0, s0, A0, left, right)
        if into_weight:
            ctx.save_for_backward(input_ if trained else None, None, *kept)
            return F.linear(rows, _with(W, in_weight, (_gated(B, s), A), scale), b)
        left, right, c = _products(B, s, A, scale, (B0, s0, A0) if beside else None, (left, right))
        h = _narrow(_rows(input_), right.mT)
        ctx.save_for_backward(*((input_, h[:, : A.shape[0]]) if trained else (None, None)), *kept)
        return F.linear(rows, _with(W, in_weight, None, c), b).addmm_(h, left.mT, alpha=c)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, z, B, s and A, those that are wanted."""
        (g,) = gradients
        z, h, W, B, s, A, *frozen, left, right = ctx.saved_tensors
        wants_x, wants_z, _, _, wants_B, wants_s, wants_A, *_ = ctx.needs_input_grad
        rows = None if z is None else _rows(z)
        differentiated = torch.is_grad_enabled()  # second derivatives go through h and the products, too
        made = (None, None) if differentiated else (left, right)
        left, right, c = _products(B, s, A, ctx.scale, frozen if ctx.beside else None, made)
        in_weight = None if ctx.beside else _frozen(W, *frozen)
        of_x = not (ctx.dropped or ctx.into_weight)
        e = _narrow(g, left) if wants_A or wants_z or (wants_x and of_x) else None
        dx = dz = dA = dB = ds = None
        if wants_x:
            dx = g @ _with(W, in_weight, (left, right) if ctx.into_weight else None, c)
            dx = (dx if e is None or not of_x else dx.addmm_(e, right, alpha=c)).view(ctx.shape)
        if e is not None:
            dz = _product(e, right, c).view(ctx.shape) if wants_z else None
            dA = _product(e[:, : A.shape[0]].mT, rows, c) if wants_A and rows is not None else None
        if rows is not None and (wants_B or wants_s):
            if h is None or differentiated:
                h = _narrow(rows, A.mT)
            G = _narrow(g.mT, h, ctx.scale)
            dB, ds = _gated(G, s), (B * G).sum(0, dtype=s.dtype) if wants_s and s is not None else None
        return dx, dz, None, None, dB, ds, dA, *[None] * 8


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gated(B: Tensor, s: Tensor | None) -> Tensor:
    """B·diag(s) in B's dtype."""
    return B if s is None else (B * s).to(B.dtype)


def _products(
    B: Tensor,
    s: Tensor | None,
    A: Tensor,
    c: float,
    beside: Sequence[Any] | None,
    joined: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, float]:
    """The factors that inputs are multiplied by, and by what number."""
    if joined[0] is not None and joined[1] is not None:
        return joined[0], joined[1], 1.0
    left = _gated(B, s)
    if beside is None:
        return left, A, c
    return *joined_factors(left if c == 1 else c * left, A, Factors(*beside)), 1.0


def _product(a: Tensor, b: Tensor, c: float) -> Tensor:
    """c·a b in one operation, which leaves out what it is told to multiply by zero."""
    return a @ b if c == 1 else torch.addmm(a.new_empty(1), a, b, beta=0, alpha=c)


def _narrow(a: Tensor, b: Tensor, c: float = 1.0) -> Tensor:
    """c·a b for a b of few columns: below 16 of them, a CPU is two to three times as fast with the rows of bᵀaᵀ.

    A GPU is not, and the gradient of B, lying transposed, would then be copied into the layout of B.
    """
    if b.shape[1] >= 16 or a.device.type != "cpu":
        return _product(a, b, c)
    return _product(b.mT, a.mT, c).mT


def _frozen(W: Tensor, B: Tensor | None, s: Tensor | None, A: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """B·diag(s) and A in W's dtype, anew in each pass: kept from one to the other, they would take half an adapter."""
    return None if B is None or s is None or A is None else ((B * s).to(W.dtype), A.to(W.dtype))


def _with(W: Tensor, frozen: tuple[Tensor, Tensor] | None, update: tuple[Tensor, Tensor] | None, c: float) -> Tensor:
    """W, with the frozen part and c times the update added where they are there, in one pass over W."""
    if update is None:
        return W if frozen is None else torch.addmm(W, *frozen)
    if frozen is None:
        return torch.addmm(W, *update, alpha=c)
    B = torch.cat([frozen[0], update[0] if c == 1 else c * update[0]], 1)
    return torch.addmm(W, B, torch.cat([frozen[1], update[1]], 0))
