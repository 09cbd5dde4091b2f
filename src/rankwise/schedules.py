"""Schedules: pure functions from a step to a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from rankwise.errors import ArgumentError


@dataclass(frozen=True)
class CubicBudget:
    """AdaLoRA's budget of triplets and the steps at which it is applied (arXiv 2303.10512).

    b(t) = start                                                         for t < tinit,
           end + (start − end)·(1 − (t − tinit)/(total − tinit − tfinal))³  until total − tfinal,
           end                                                           afterwards; floored.

    >>> budget = CubicBudget(start=12, end=8, tinit=2, tfinal=3, total=10, every=2)
    >>> [budget.at(t) for t in range(1, 11)]
    [12, 12, 10, 8, 8, 8, 8, 8, 8, 8]
    """

    start: int
    end: int
    tinit: int
    tfinal: int
    total: int
    every: int

    @property
    def final(self) -> int:
        """The step after which the kept set no longer changes."""
        return self.total - self.tfinal

    def at(self, t: int) -> int:
        """b(t), in triplets over all layers."""
        if t < self.tinit:
            return self.start
        if t >= self.final:
            return self.end
        # In whole numbers: a float would round some exact values of b(t) down by one.
        return self.end + (self.start - self.end) * (self.final - t) ** 3 // (self.final - self.tinit) ** 3

    def due(self, last: int, t: int) -> bool:
        """Whether an allocation falls in (last, t].

        `last` is the last step whose rules ran. Steps skipped in between (an overflow) hand their allocation on to t.
        """
        if last < self.final <= t:
            return True
        newest = min(t, self.final - 1) // self.every * self.every
        return newest > last and newest >= self.tinit


class Rounds(NamedTuple):
    """ALoRA's rounds (arXiv 2403.16187): they happen after steps warmup + j·recovery, j = 0 … rounds − 1."""

    warmup: int
    recovery: int
    rounds: int

    @property
    def final(self) -> int:
        """The step of the last round; 0 without rounds."""
        return self.warmup + (self.rounds - 1) * self.recovery if self.rounds else 0

    def due(self, last: int, t: int) -> bool:
        """Whether a round falls in (last, t]; steps skipped in between hand theirs on."""
        done, now = (min(self.rounds, max(0, (at - self.warmup) // self.recovery + 1)) for at in (last, t))
        return now > done


def steps_of(argument: str, value: float, total: int, *, least: int = 0) -> int:
    """A duration in steps from a number of steps or, for a float in (0, 1), a share of `total`, rounded.

    >>> steps_of("tinit", 0.1, 300), steps_of("tinit", 25, 300)
    (30, 25)
    """
    if not math.isfinite(value):
        raise ArgumentError(argument, "be finite", value)
    if isinstance(value, float) and 0 < value < 1:
        return max(least, round(value * total))
    if value != int(value) or value < least:
        raise ArgumentError(argument, f"be a whole number of steps ≥ {least}, or a share between 0 and 1", value)
    return int(value)
