"""The loss of a completion, ½‖Ω ⊙ (P·Qᵀ + μ − M)‖_F², at the cost of its observed entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.completion.entries import Entries


def residual(entries: Entries, P: Tensor, Q: Tensor, *, center: bool) -> tuple[Tensor, Tensor]:
    """The values of P·Qᵀ + μ − M on Ω, and μ: the offset at which they have mean 0, or 0 without `center`."""
    values = entries.at(P, Q).sub_(entries.data)
    offset = -values.sum() / entries.count if center else values.new_zeros(())
    return (values.add_(offset * entries.ones) if center else values), offset


def misfit(entries: Entries, P: Tensor, Q: Tensor, *, center: bool) -> Tensor:
    """½‖Ω ⊙ (P·Qᵀ + μ − M)‖_F² (eq. 10) at the best offset μ (0 without `center`), differentiable in P and Q.

    Its gradients are R·Q and Rᵀ·P, R the residual: μ is a minimiser, so that its own part in them is 0.

    Args:
        entries: Ω and M.
        P: (m, k).
        Q: (n, k).
        center: whether there is an offset.
    """
    return _Misfit.apply(P, Q, entries, center)  # type: ignore[return-value]


class _Misfit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, P: Tensor, Q: Tensor, entries: Entries, center: bool) -> Tensor:
        """The loss."""
        values, _ = residual(entries, P, Q, center=center)
        ctx.save_for_backward(P, Q, values)
        ctx.entries = entries
        return 0.5 * values.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        """With respect to P and Q."""
        P, Q, values = ctx.saved_tensors
        dP = gradient * ctx.entries.times(values, Q) if ctx.needs_input_grad[0] else None
        dQ = gradient * ctx.entries.transposed_times(values, P) if ctx.needs_input_grad[1] else None
        return dP, dQ, None, None
