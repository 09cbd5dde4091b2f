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
    lengths = [len(v) for v in values]
    cost_of_each = np.repeat(costs, lengths)
    if cost_of_each.sum() <= budget:
        return lengths
    every = torch.cat([v.cpu() for v in values]).double().numpy()
    owner = np.repeat(np.arange(len(values)), lengths)

    # Bought by value per unit of cost, the first value that the budget does not reach sets the price.
    by_yield = np.argsort(-every / cost_of_each, kind="stable")
    first_left_out = by_yield[np.cumsum(cost_of_each[by_yield]) > budget][0]
    price = float(every[first_left_out] / cost_of_each[first_left_out])

    # Modules of one cost are one pool, whose values fall; its curve is V(k).
    falling = np.argsort(-every, kind="stable")
    unit_costs = np.unique(cost_of_each)[::-1]
    members = [falling[cost_of_each[falling] == cost] for cost in unit_costs]
    pools = [
        _Pool(cost, np.concatenate([[0.0], np.cumsum(every[own])]), price)
        for cost, own in zip(unit_costs, members, strict=True)
    ]
    bound = float(price * budget + sum(pool.most_gain for pool in pools))
    gap, counts = 1e-9 * bound, None
    while counts is None:
        counts = _search(pools, budget, price, bound, gap)
        gap *= 4
    taken = np.concatenate([owner[own[:k]] for own, k in zip(members, counts, strict=True)])
    return np.bincount(taken, minlength=len(values)).tolist()


class _Pool:
    """The values of all modules with one cost per value.

    Args:
        cost: of one value.
        curve: V(k), the sum of the k largest, from k = 0 on.
        price: of a unit of cost.
    """

    def __init__(self, cost: int, curve: Any, price: float) -> None:
        self.cost = cost
        self.curve = curve
        self.gains = curve - price * cost * np.arange(len(curve))
        self.most_gain = self.gains.max()

    def counts_within(self, gap: float) -> Any:
        """Every k that gains less than the best one by no more than the gap; neighbours, since V is concave."""
        return np.flatnonzero(self.gains >= self.most_gain - gap)


def _search(pools: Sequence[_Pool], budget: int, price: float, bound: float, gap: float) -> list[int] | None:
    """How many of each pool the best choice takes; None if it is below the bound by more than the gap."""
    windows = [pool.counts_within(gap) for pool in pools]
    # What the pools that are still to come will spend at least, and at most.
    least = sum(pool.cost * counts[0] for pool, counts in zip(pools, windows, strict=True))
    most = sum(pool.cost * counts[-1] for pool, counts in zip(pools, windows, strict=True))

    # The choices so far: what each spends and is worth, by rising cost and value.
    spent, value = np.zeros(1, np.int64), np.zeros(1)
    best_gain, trail = 0.0, []
    for pool, counts in zip(pools, windows, strict=True):
        least -= pool.cost * counts[0]
        most -= pool.cost * counts[-1]
        best_gain += pool.most_gain

        # Every choice so far with every count of this pool.
        now_spent = (spent[:, None] + pool.cost * counts).ravel()
        now_value = (value[:, None] + pool.curve[counts]).ravel()
        can_be_paid = now_spent + least <= budget
        unspent_is_cheap = price * (budget - now_spent - most) <= gap
        loses_little = best_gain - (now_value - price * now_spent) <= gap
        left = np.flatnonzero(can_be_paid & unspent_is_cheap & loses_little)

        # Of two choices, one that costs more and is worth no more is dropped.
        left = left[np.lexsort((-now_value[left], now_spent[left]))]
        highest_before = np.maximum.accumulate(np.concatenate([[-1.0], now_value[left]]))[:-1]
        left = left[now_value[left] > highest_before]
        spent, value = now_spent[left], now_value[left]
        trail.append((left // len(counts), counts[left % len(counts)]))

    # A little less than the gap, so that rounding at its edge cannot have hidden a better choice.
    if not len(value) or bound - value[-1] > 0.99 * gap:
        return None
    at, taken = len(value) - 1, []
    for parents, counts in reversed(trail):
        taken.append(int(counts[at]))
        at = parents[at]
    return taken[::-1]
