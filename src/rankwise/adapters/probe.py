"""Sees the gradient of a frozen base weight, layer by layer, in an ordinary backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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


Start = dict[str, Tensor]


class FoundStarts:
    """The starts that backward passes have found since the last step, and which of them the coming step takes up.

    It is that of the first pass whose gradients are in `.grad` when the optimiser steps. So each start is kept beside
    the gradient tensor that its pass has made: where a loop drops the gradient, the start goes with it, and where a
    loop puts an older gradient back, the older start is back, too. What `autograd.grad` returns is in no `.grad`.
    Gradients that a loop makes by hand, or that FSDP2 or DDP has replaced, are known from no pass: then it is the last
    start whose pass has accumulated gradients, and the first of all where none has.
    """

    def __init__(self) -> None:
        self._of_gradient = WeakTensorKeyDictionary()  # (start, version of the gradient after its last accumulation)
        self._now: tuple[int, Start] | None = None  # the backward pass that runs, or ran last, and its start
        self._otherwise: Start = {}
        self._accumulated = False  # whether the pass of `_otherwise` has accumulated its gradients

    def of(self, gradient: Tensor | None) -> Start:
        """The start that a step with this gradient takes up; empty where there is none."""
        known = None if gradient is None else self._of_gradient.get(gradient)
        return self._otherwise if known is None else known[0]

    def wants_more(self, gradient: Tensor | None, *, changed_by_others: bool) -> bool:
        """Whether the backward pass that runs shall find a start, given the gradient that earlier passes have left.

        Args:
            gradient: what is in `.grad` before this pass accumulates.
            changed_by_others: whether processes average it in place; else a change in place is a loop's zeroing.
        """
        task = torch._C._current_graph_task_id()
        if self._now is not None and self._now[0] == task and self._now[1]:
            return False  # another use of the layer in the same pass
        known = None if gradient is None else self._of_gradient.get(gradient)
        if known is not None and (changed_by_others or known[1] == gradient._version):  # type: ignore[union-attr]
            self._now = task, known[0]
            return False
        if known is not None:
            del self._of_gradient[gradient]
        self._now = task, {}
        return True

    def add(self, start: Start, gradient: Tensor | None) -> None:
        """The start that the backward pass has found, given what is in `.grad` before it accumulates."""
        self._now = torch._C._current_graph_task_id(), start
        if self._accumulated and gradient is None:  # those gradients have been dropped
            self._otherwise, self._accumulated = {}, False
        if not self._otherwise:
            self._otherwise = start

    def accumulate(self, parameter: Tensor) -> None:
        """Autograd has accumulated the gradient of a parameter of the layer."""
        start = self._now[1] if self._now is not None else {}
        if start and parameter.grad is not None:
            self._of_gradient[parameter.grad] = start, parameter.grad._version
            self._otherwise, self._accumulated = start, True
