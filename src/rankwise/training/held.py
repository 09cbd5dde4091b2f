"""Parameters with a learning rate of their own, or without weight decay, in an optimiser that knows of neither."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankwise.shards import part


@dataclass
class Held:
    """Parameters whose move by the optimiser is rescaled, or kept free of weight decay."""

    ratio: float
    zeroed: bool
    parameters: list[Tensor]
    old: list[Tensor]

    @classmethod
    def of(cls, ratio: float, zeroed: bool, parameters: list[Tensor]) -> Held:
        """Remember their values and, `zeroed`, show the optimiser zeros."""
        data = [part(p.data) for p in parameters]
        found = cls(ratio, zeroed, parameters, list(torch._foreach_mul(data, 1.0)))  # type: ignore[arg-type]
        if zeroed:
            torch._foreach_zero_(data)
        return found

    def settle(self) -> None:
        """p ← p_old + ratio · (the optimiser's move)."""
        data = [part(p.data) for p in self.parameters]  # asked for now: an optimiser may have put others there
        if self.zeroed:
            torch._foreach_mul_(data, self.ratio)
            torch._foreach_add_(data, self.old)
        else:
            torch._foreach_lerp_(data, self.old, 1 - self.ratio)

    def give_back(self) -> None:
        """p ← p_old."""
        for p, old in zip(self.parameters, self.old, strict=True):
            part(p.data).copy_(old)
