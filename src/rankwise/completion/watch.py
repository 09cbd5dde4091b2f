"""When a fit ends: at its target, at rest, at its most iterations, or when held-out entries are met worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.completion.descent import sides
from rankwise.completion.entries import Entries
from rankwise.completion.misfit import residual
from rankwise.completion.plan import Plan
from rankwise.completion.standard import size

LEFT = 0.7
"""The relative error that shows that a flat start has been left behind."""


class Look(NamedTuple):
    """A product at some point of its fit."""

    chain: Sequence[Tensor]
    error: float
    """Relative, of the entries that it fits."""
    done: int
    """Iterations."""


class Fitted(NamedTuple):
    """How a fit of a product ended."""

    chain: list[Tensor]
    losses: list[float]
    done: int
    settled: bool
    """Whether it ended by itself."""
    held_error: float | None
    """Relative, of the held-out entries, if there are any."""


def watched(
    looks: Iterable[Look], ended: Callable[[list[float]], bool], train: Entries, held: Entries | None, plan: Plan
) -> Fitted:
    """Go through the looks until the fit has ended.

    Args:
        looks: without end; their factors may change with the next.
        ended: whether errors so far show that the fit is at its target or at rest.
        train: entries that are fitted, which tell a product's offset.
        held: entries to judge by; the product they are met best with is what is kept.
        plan: the most iterations, patience, and who is told how it goes.
    """
    losses: list[float] = []
    best, least, since = [], math.inf, 0
    for look in looks:
        losses.append(look.error)
        plan.say(f"{look.done} iterations, relative error {look.error:.2e}")
        settled = ended(losses)
        if held is not None:
            P, Q = sides(look.chain)
            error = relative_error(held, P, Q, residual(train, P, Q, center=plan.center)[1])
            since = 0 if error < least or look.error > LEFT else since + 1
            if error < least:
                best, least = [factor.clone() for factor in look.chain], error
            settled = settled or since >= plan.patience
        if settled or look.done >= plan.most:
            kept = best or [factor.clone() for factor in look.chain]
            return Fitted(kept, losses, look.done, settled, least if held is not None else None)
    raise AssertionError("looks go on without end")


def relative_error(entries: Entries, P: Tensor, Q: Tensor, offset: Tensor) -> float:
    """‖Ω ⊙ (P·Qᵀ + μ − M)‖_F / ‖Ω ⊙ M‖_F."""
    values = entries.at(P, Q) + offset * entries.ones - entries.data
    return float(torch.linalg.vector_norm(values)) / size(entries.data)
