"""How far an adapter's training has come: counters stored in every layer's state, hence in every checkpoint.

Every layer holds the same copy. It is redundant on purpose: whatever part of a model is saved, copied or loaded, its
schedule goes with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from rankwise.methods.base import Method

CONFIG, TRAINER = 1, 2
SOURCES = {0: None, CONFIG: "config", TRAINER: "trainer"}
"""Where `total` came from, by its stored code."""


@dataclass
class Progress:
    """The stored counters of one adapter."""

    step: int = 0
    """Attempted optimiser steps."""
    last: int = 0
    """The last step whose rules ran."""
    total: int = 0
    """Optimiser steps of the whole run, fixed by the first step; 0 where unknown."""
    source: int = 0
    """What told `total`: a key of SOURCES."""
    rules: int = 0
    """Steps whose rules ran."""
    skipped: int = 0
    """Steps skipped: overflows of a loss scale, and bad gradients."""
    bad: int = 0
    """Bad gradients in a row, up to now."""
    finalized: int = 0
    """1 once the final budget was applied by `finalize`."""
    epoch: int = 0
    """Optimiser steps of one pass over the training data, fixed by the first step; 0 where unknown."""

    def tensor(self) -> Tensor:
        """The counters as they are stored, int64 (9,)."""
        return torch.tensor(astuple(self), dtype=torch.int64)

    @classmethod
    def of(cls, stored: Tensor) -> Progress:
        """The counters from their stored form."""
        return cls(*stored.tolist())


LENGTH = len(fields(Progress))
"""Entries of the stored form."""


def final_ranks_due(method: Method, progress: Progress) -> int | None:
    """The step at which an adapter's ranks become final; None if they never change that way, or already are."""
    due = method.final_step(progress.total or getattr(method, "total_step", None), progress.epoch or None)
    return None if due is None or progress.finalized or progress.last >= due else due


def unfinished(method: Method, progress: Progress, ranks: Iterable[int]) -> str | None:
    """A sentence about ranks that a run left short of their budget, achieved against asked; None if there are none."""
    due = final_ranks_due(method, progress)
    if due is None:
        return None
    kept = list(ranks)
    mean = f": their mean is {sum(kept) / len(kept):.3g}" if kept else ""
    return (
        f"the ranks of this {method.method} adapter would have become final at step {due}, at a mean of "
        f"{method.final_rank:g}, and training stopped at {progress.step}{mean}; "
        "call rankwise.finalize(model) to apply the final budget"
    )
