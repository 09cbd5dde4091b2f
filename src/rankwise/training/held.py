"""Parameters with a learning rate of their own, or without weight decay, in an optimiser that knows of neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.shards import part
from rankwise.training.schedule_free import BaseStep


@dataclass
class Held:
    """Parameters whose move by the optimiser is rescaled, or kept free of weight decay."""

    ratio: float
    zeroed: bool
    parameters: list[Tensor]
    old: list[Tensor]
    base: BaseStep | None = None
    """Of an optimiser that averages: the parameters shall move as its base step does."""

    @classmethod
    def of(
        cls, ratio: float, zeroed: bool, parameters: list[Tensor], states: Sequence[dict[str, Any]] | None = None
    ) -> Held:
        """Remember their values and, `zeroed`, show the optimiser zeros.

        Args:
            ratio: what the optimiser's move is multiplied by.
            zeroed: whether weight decay must find nothing to shrink.
            parameters: which.
            states: what an optimiser that averages remembers of each; None for any other optimiser.
        """
        data = [part(p.data) for p in parameters]
        found = cls(ratio, zeroed, parameters, list(torch._foreach_mul(data, 1.0)))  # type: ignore[arg-type]
        if zeroed:
            torch._foreach_zero_(data)
        found.base = None if states is None else BaseStep(data, states)
        return found

    def settle(self) -> None:
        """p ← p_old + ratio · (the optimiser's move)."""
        data = [part(p.data) for p in self.parameters]  # asked for now: an optimiser may have put others there
        if self.base is not None:
            self.base.settle(data, self.old, self.ratio)
        elif self.zeroed:
            torch._foreach_mul_(data, self.ratio)
            torch._foreach_add_(data, self.old)
        else:
            torch._foreach_lerp_(data, self.old, 1 - self.ratio)

    def give_back(self) -> None:
        """p ← p_old."""
        for p, old in zip(self.parameters, self.old, strict=True):
            part(p.data).copy_(old)
