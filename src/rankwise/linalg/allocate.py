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
    turns = torch.arange(int(room.max()) if len(room) else 0, device=room.device)
    places = turns[:, None] < room[order]
    given = places & (places.flatten().cumsum(0) <= count).view_as(places)
    counts = torch.zeros_like(room)
    counts[order] = given.sum(0)
    return counts


def keep_within(scores: Sequence[Tensor], costs: Sequence[Tensor], budget: float) -> list[Tensor]:
    """Masks that keep, from the highest score over all the tensors down, every entry whose cost still fits the budget.

    An entry that does not fit is passed over and cheaper ones after it are still kept, so that what is left over is
    less than the cost of any entry that is not kept. Ties go to the earlier entry.

    >>> scores, costs = [torch.tensor([3.0, 1.0]), torch.tensor([2.0])], [torch.tensor([2.0, 2.0]), torch.tensor([5.0])]
    >>> [m.tolist() for m in keep_within(scores, costs, 8)]
    [[True, False], [True]]
    >>> [m.tolist() for m in keep_within(scores, costs, 6)]
    [[True, True], [False]]
    """
    score = torch.cat([s.flatten().cpu() for s in scores])
    cost = torch.cat([c.expand_as(s).flatten().cpu() for c, s in zip(costs, scores, strict=True)]).double()
    order = score.sort(descending=True, stable=True).indices
    cost = cost[order]
    kept = torch.zeros_like(cost, dtype=torch.bool)
    left = budget * (1 + 1e-12)
    # Each pass keeps the run up to the first entry that does not fit. Entries that cost more than is left are out of
    # the next pass, so there are no more passes than different costs.
    while bool((candidates := ~kept & (cost <= left)).any()):
        run = candidates & (torch.where(candidates, cost, 0).cumsum(0) <= left)
        left -= float(cost[run].sum())
        kept |= run
    mask = torch.empty_like(kept)
    mask[order] = kept
    parts = mask.split([s.numel() for s in scores])
    return [part.view_as(s).to(s.device) for part, s in zip(parts, scores, strict=True)]
