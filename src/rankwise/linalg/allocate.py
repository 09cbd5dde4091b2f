"""Sharing one budget of ranks over every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_top(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks that keep the `budget` highest scores over all the tensors together.

    Exactly min(budget, number of scores) entries are kept; ties go to the earlier entry, so that every process and
    every machine decides alike.

    Args:
        scores: tensors of any shapes; they may lie on several devices, and their masks do alike.
        budget: how many to keep, ≥ 0.

    Returns:
        Boolean tensors of the same shapes.

    >>> [m.tolist() for m in keep_top([torch.tensor([1.0, 5.0]), torch.tensor([5.0, 0.0, 2.0])], 2)]
    [[False, True], [True, False, False]]
    """
    flat = torch.cat([s.flatten().to(scores[0].device) for s in scores])
    order = flat.sort(descending=True, stable=True).indices
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[order[:budget]] = True
    parts = keep.split([s.numel() for s in scores])
    return [part.view_as(s).to(s.device) for part, s in zip(parts, scores, strict=True)]


def share_out(priority: Tensor, room: Tensor, count: int) -> Tensor:
    """How many of `count` new ranks each module gets: one each in turn, highest priority first, while it has room.

    Args:
        priority: (n,); ties go to the earlier module.
        room: (n,), whole numbers ≥ 0.
        count: how many to give; what finds no room is not given.

    >>> share_out(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([9, 1, 9]), 4).tolist()
    [1, 1, 2]
    """
    order = priority.sort(descending=True, stable=True).indices
    turns = torch.arange(int(room.max()) if len(room) else 0)
    places = turns[:, None] < room[order]
    given = places & (places.flatten().cumsum(0) <= count).view_as(places)
    counts = torch.zeros_like(room)
    counts[order] = given.sum(0)
    return counts


def keep_within(scores: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Masks that keep the highest scores over all the tensors together, as long as their costs fit the budget.

    The kept entries are the longest run from the highest score down whose costs add up to `budget` at most, so that
    less than one more entry's cost is left over; ties go to the earlier entry.

    >>> scores, costs = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.tensor([2.0, 2.0]), torch.tensor([5.0])]
    >>> [m.tolist() for m in keep_within(scores, costs, 8)]
    [[True, False], [True]]
    """
    flat = torch.cat([s.flatten().to(scores[0].device) for s in scores])
    cost = torch.cat([c.expand_as(s).flatten().to(flat.device) for c, s in zip(costs, scores, strict=True)])
    order = flat.sort(descending=True, stable=True).indices
    count = int((cost[order].double().cumsum(0) <= budget * (1 + 1e-12)).sum())
    return keep_top(scores, count)
