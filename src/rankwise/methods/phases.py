"""Runs in three phases: a warm-up of tinit steps, a phase in which ranks change, and tfinal steps with final ranks.

AdaLoRA's schedule (arXiv 2303.10512), which SaLoRA shares.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.checks import require_int, require_number
from rankwise.errors import ArgumentError
from rankwise.methods.base import Method
from rankwise.methods.stack import Step
from rankwise.schedules import steps_of


@dataclass
class Phased(Method):
    """A method whose ranks change between tinit and total_step − tfinal."""

    # Ours: AdaLoRA's authors set steps for each task, 0.09 to 0.15 and 0.44 to 0.58 of the run. In runs of hundreds of
    # steps a shorter end leaves the scores more time.
    tinit: float = field(default=0.1, metadata={"help": "steps before ranks change, or a share of the run"})
    tfinal: float = field(default=0.3, metadata={"help": "steps with final ranks at the end, or a share of the run"})
    total_step: int | None = field(default=None, metadata={"help": "optimiser steps of the run; None: the trainer's"})

    def check(self) -> None:
        """Durations that are numbers, and fit a run whose length is known."""
        super().check()
        if self.total_step is not None:
            require_int("total_step", self.total_step, least=1)
        for name in ("tinit", "tfinal"):
            require_number(name, getattr(self, name))
        self.phases(self.total_step or 10**9)  # whether they fit is asked again once the run's length is known

    def phases(self, total: int | None) -> tuple[int, int]:
        """(tinit, total − tfinal) in steps: when ranks begin to change, and when they become final."""
        if total is None:
            raise ArgumentError("total_step", "be known before ranks can be allocated", total)
        tinit, tfinal = steps_of("tinit", self.tinit, total), steps_of("tfinal", self.tfinal, total)
        if tinit + tfinal >= total:
            raise ArgumentError("tinit + tfinal", f"be less than total_step ({total})", tinit + tfinal)
        return tinit, total - tfinal

    def falling(self, total: int | None) -> int:
        """Steps of the phase in which ranks change."""
        first, final = self.phases(total)
        return final - first

    def needs(self, step: Step) -> tuple[str, str] | None:
        """The length of the run, from which every phase is derived."""
        return None if step.total else ("total_step=1000", "the number of optimiser steps of the whole run")

    def final_step(self, total: int | None, epoch: int | None = None) -> int | None:
        """total − tfinal."""
        return None if total is None else self.phases(total)[1]
