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
