"""L-BFGS that finds its way out of flat starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

EACH = 5
"""Iterations between looks at the loss."""
STUCK = 1e-6
"""A relative change of the loss over as many, from which on the memory is given up."""


def quasi_newton(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> Iterator[float]:
    """Minimise in place, by L-BFGS with a strong Wolfe line search; the loss after each five iterations, without end.

    Args:
        parameters: leaves that require gradients.
        loss: of what the parameters are now, differentiable.
    """
    while True:
        before = math.inf
        for now in _round(parameters, loss):
            yield now
            if before - now <= STUCK * now:
                break
            before = now


def _round(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> Iterator[float]:
    """L-BFGS without a memory of what was before, in units in which its first gradient has norm 1.

    Below an absolute size torch's L-BFGS forgets the changes that it learns from: near the start of a deep product,
    where gradients are of order ε^(L−1), it would go on as plain gradient descent.
    """
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=EACH,
        max_eval=4 * EACH,
        tolerance_grad=0,
        tolerance_change=0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def value(unit: Tensor | float) -> Tensor:
        optimizer.zero_grad()
        found = loss() / unit
        found.backward()
        return found.detach()

    value(1.0)
    size = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    unit = torch.where(size > 0, size, 1)
    while True:
        optimizer.step(lambda: value(unit))  # type: ignore[arg-type]
        with torch.no_grad():
            yield float(loss())
