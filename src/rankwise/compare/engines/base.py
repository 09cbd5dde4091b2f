"""What carries out the runs of a comparison, and what is told of them on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.compare.failures import Failure

if TYPE_CHECKING:
    from rankwise.compare.plan import Plan, Run
    from rankwise.compare.results import Result


class Watch:
    """Is told how the runs get on. This one does nothing; what shows progress overrides what it needs."""

    def at_step(self, run: Run, step: int) -> None:
        """So many optimiser steps of a run are done; 0 says that it has started.

        The number falls when a run starts anew or goes on from a checkpoint, after its process was killed.
        """

    def finished(self, run: Run, result: Result) -> None:
        """A run is finished, or was found finished."""

    def failed(self, run: Run, failure: Failure) -> None:
        """A run ended in an error."""


@dataclass(frozen=True)
class Ended:
    """A run that has ended, and how."""

    run: Run
    outcome: Result | Failure


class Engine(ABC):
    """Carries out runs: where, in which process, and how many at a time.

    An engine only trains. Which runs there are, and writing down what they came to, is the caller's part.
    """

    def start(self, plan: Plan, command: str, watch: Watch) -> None:
        """Get ready for the runs of a plan.

        Args:
            plan: the checked SPEC.
            command: what the user typed, kept with each result.
            watch: told of every step.

        Raises:
            ArgumentError: what the engine was asked for is not there.
        """
        self.plan = plan
        self.command = command
        self.watch = watch

    @abstractmethod
    def submit(self, run: Run) -> None:
        """Take a run on; runs start in this order."""

    @abstractmethod
    def next_ended(self) -> Ended:
        """Wait until one of the submitted runs has ended. An error in a run is its outcome, and is not raised."""

    @abstractmethod
    def stop(self) -> None:
        """Let go of what `start` took; runs that have not ended are given up."""
