"""Ranks under one budget: how many leading values each module keeps so that they hold the most together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def best_ranks(values: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """How many leading values to take of each module, so that their sum is largest at Σ rᵢ·costᵢ ≤ budget.

    Exact. Modules of one cost are one pool, whose best k values are simply its k largest; V(k), their sum, is concave.
    At the price per unit of cost where the budget runs out, the best Σ V(k) − price·(Σ cost·k − budget) bounds every
    choice from above. A choice is below it by what each pool loses at that price, plus the price of what is unspent.
    All choices that lose at most a small gap in total are searched pool by pool, dropping those that a cheaper one
    equals; the gap widens until it holds a choice, which then is the best one. Milliseconds for hundreds of modules.

    Args:
        values: of each module, positive and falling.
        costs: of one value of each module, whole numbers ≥ 1.
        budget: a whole number ≥ 0.

    Example:
        >>> best_ranks([torch.tensor([9.0, 1.0]), torch.tensor([8.0, 7.0])], [5, 3], 8)
        [1, 1]
    """
    spent = np.repeat(costs, [len(v) for v in values])
    if spent.sum() <= budget:
        return [len(v) for v in values]
    every, owner = torch.cat(list(values)).double().numpy(), np.repeat(np.arange(len(values)), [len(v) for v in values])
    dearest = np.argsort(-every / spent, kind="stable")
    first_left_out = dearest[np.cumsum(spent[dearest]) > budget][0]
    price = float(every[first_left_out] / spent[first_left_out])
    falling = np.argsort(-every, kind="stable")
    units = np.unique(spent)[::-1]
    pools = [falling[spent[falling] == cost] for cost in units]
    curves = [np.concatenate([[0.0], np.cumsum(every[pool])]) for pool in pools]
    best = [(V - price * c * np.arange(len(V))).max() for V, c in zip(curves, units, strict=True)]
    bound = float(price * budget + sum(best))
    gap, counts = 1e-9 * bound, None
    while counts is None:
        counts = _search(curves, units, budget, price, bound, gap)
        gap *= 4
    taken = np.concatenate([owner[pool[:k]] for pool, k in zip(pools, counts, strict=True)])
    return np.bincount(taken, minlength=len(values)).tolist()


def _search(curves: Any, units: Any, budget: int, price: float, bound: float, gap: float) -> list[int] | None:
    """How many of each pool the best choice takes; None if it is below the bound by more than the gap."""
    gains = [V - price * c * np.arange(len(V)) for V, c in zip(curves, units, strict=True)]
    windows = [np.flatnonzero(g >= g.max() - gap) for g in gains]
    least, most = (sum(c * k[end] for c, k in zip(units, windows, strict=True)) for end in (0, -1))
    spent, value, best, trail = np.zeros(1, np.int64), np.zeros(1), 0.0, []
    for V, c, g, k in zip(curves, units, gains, windows, strict=True):
        least, most, best = least - c * k[0], most - c * k[-1], best + g.max()
        w, v = (spent[:, None] + c * k).ravel(), (value[:, None] + V[k]).ravel()
        fits = (w + least <= budget) & (price * (budget - w - most) <= gap) & (best - (v - price * w) <= gap)
        left = np.flatnonzero(fits)
        left = left[np.lexsort((-v[left], w[left]))]
        highest = np.maximum.accumulate(np.concatenate([[-1.0], v[left]]))
        left = left[v[left] > highest[:-1]]
        spent, value = w[left], v[left]
        trail.append((left // len(k), k[left % len(k)]))
    # a little less than the gap, so that rounding at its edge cannot have hidden a better choice
    if not len(value) or bound - value[-1] > 0.99 * gap:
        return None
    at, counts = len(value) - 1, []
    for parent, taken in reversed(trail):
        counts.insert(0, int(taken[at]))
        at = parent[at]
    return counts
