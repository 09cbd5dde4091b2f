"""The default engine: every run in this process, one after another."""

from __future__ import annotations

from collections import deque

from rankwise.compare.engines.base import Ended, Engine
from rankwise.compare.failures import Failure
from rankwise.compare.plan import Run
from rankwise.compare.together import processes
from rankwise.compare.train import train_run


class Here(Engine):
    """Every run in this process, one after another."""

    def __init__(self) -> None:
        self._waiting: deque[Run] = deque()

    def submit(self, run: Run) -> None:
        """Take a run on."""
        self._waiting.append(run)

    def next_ended(self) -> Ended:
        """Train the run that has waited longest.

        Raises:
            Exception: whatever training raises, where several processes train one run together.
        """
        run = self._waiting.popleft()
        self.watch.at_step(run, 0)
        try:
            output = self.plan.spec.output
            result = train_run(self.plan, run, output, self.command, lambda step: self.watch.at_step(run, step))
            return Ended(run, result)
        except Exception as error:
            # The other processes may wait for this one, and only its end makes their launcher end them.
            if processes() > 1:
                raise
            return Ended(run, Failure.of(run, error))

    def stop(self) -> None:
        """Give up the runs that wait."""
        self._waiting.clear()
