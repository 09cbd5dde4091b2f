"""Units in which every matrix looks alike, so that no setting depends on the data's scale and offset."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.completion.entries import Entries
from rankwise.completion.starts import leading

ROUNDING = 8
"""Roundings of the largest entry: what differs by less than this is constant."""


class Units(NamedTuple):
    """M = scale · M' + offset."""

    offset: float
    scale: float


def standardised(entries: Entries, *, center: bool, seed: int) -> tuple[Entries, Units]:
    """M' = (M − offset)/scale with mean 0 on Ω (if `center`) and ‖Ω ⊙ M'‖₂ = p, p the share observed, and its units.

    Then the matrix behind it has a spectral norm of about 1. Where M is constant on Ω, M' is 0 and the scale 1.
    """
    largest = float(entries.data.abs().max()) or 1.0
    data = entries.data / largest  # first, so that no square overflows or vanishes
    offset = float(data.sum() / entries.count) if center else 0.0
    data = data - offset * entries.ones
    if float(data.abs().max()) <= ROUNDING * torch.finfo(data.dtype).eps * (abs(offset) or 1.0):
        return entries.with_data(torch.zeros_like(data)), Units(offset * largest, 1.0)
    share = entries.count / (entries.shape[0] * entries.shape[1])
    norm = float(leading(entries.with_data(data), 1, seed=seed).s[0]) / share
    return entries.with_data(data / norm), Units(offset * largest, norm * largest)


def size(values: Tensor) -> float:
    """‖Ω ⊙ M‖_F of its values; 1 where that is 0, to divide by."""
    return float(torch.linalg.vector_norm(values)) or 1.0
