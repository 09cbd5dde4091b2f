"""What a deep completion is to do: its estimator's settings with every default filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Plan(NamedTuple):
    """Settings by their estimator's names, or as `DeepMatrixCompletion` explains them."""

    rank: int
    depth: int
    scale: float
    rate: float
    outer_ratio: float
    most: int
    tol: float
    center: bool
    hold_out: bool
    share: float
    patience: int
    seed: int
    say: Callable[[str], None]
