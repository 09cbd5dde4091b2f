"""The counters of one adapter, as every layer stores them, and a copy of them on the host.

Of a step that the device alone has decided on (`verdict.py`), the host counts as if it had happened, and puts that
right as soon as it knows better: before the next step, and before anybody reads or saves the counters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.adapters.progress import Progress
from rankwise.adapters.roster import Roster
from rankwise.errors import TrainingError
from rankwise.training.later import Later
from rankwise.training.verdict import BAD, Verdict

BAD_GRADIENTS = 5
"""Steps in a row with NaN or infinite gradients that stop a run."""


class Counters:
    """What `Progress` holds of one adapter.

    Args:
        roster: the adapter.
        read_again: called when somebody else, a loaded checkpoint, has written them.
    """

    def __init__(self, roster: Roster, read_again: Callable[[], None]) -> None:
        self._roster = roster
        self._read_again = read_again
        self._now = Progress()
        self._read_from: tuple[int, int] | None = None
        self._undecided: tuple[Later, Progress] | None = None  # of the last step: its verdict, and what was before it

    def read(self) -> Progress:
        """The counters, from the device only when somebody else has written them."""
        self.learn()
        if self._seen() != self._read_from:
            self._now, self._read_from = Progress.of(self._stored()[0]), self._seen()
            self._read_again()
        return self._now

    def store(self, progress: Progress) -> None:
        """Keep new ones in every layer."""
        value, stored = progress.tensor(), self._stored()
        torch._foreach_copy_(stored, [value.to(stored[0].device)] * len(stored))
        self._now, self._read_from = progress, self._seen()

    def forget(self) -> None:
        """Read them again next time."""
        self._read_from = None

    def store_undecided(self, progress: Progress, before: Progress, verdict: Verdict) -> None:
        """Keep those of a step that has happened, or those from before it and one skipped, as its verdict says."""
        self.store(progress)
        self._undecided = Later(verdict.kind), before

    def learn(self) -> bool:
        """Take note of the last step's verdict, where nobody has yet; whether it is now known to have been stopped."""
        if self._undecided is None:
            return False
        (verdict, before), self._undecided = self._undecided, None
        kind = int(verdict.value())
        written_by_others = self._seen() != self._read_from
        if kind == 0 or written_by_others:
            return False
        self.skip(before, bad=kind == BAD)
        return True

    def skip(self, progress: Progress, *, bad: bool) -> None:
        """Count a step that moved nothing: an overflow of the loss scale or, `bad`, gradients that are not finite."""
        progress.step += 1
        progress.skipped += 1
        progress.bad += bad
        self.store(progress)

    def check(self) -> None:
        """Raise for bad gradients in too many steps in a row.

        Raises:
            TrainingError: they are too many.
        """
        if self._now.bad >= BAD_GRADIENTS:
            raise TrainingError(
                f"the gradients of adapter {self._roster.adapter!r} were NaN or infinite in {BAD_GRADIENTS} steps in a "
                f"row, up to step {self._now.step}; lower the learning rate or look at the data"
            )

    def _stored(self) -> list[Tensor]:
        return [layer.tensors(self._roster.adapter).progress for layer in self._roster.layers]

    def _seen(self) -> tuple[int, int]:
        """Tells whether the counters of the first layer are still those that were read or stored here."""
        stored = self._roster.layers[0].tensors(self._roster.adapter).progress
        return id(stored), stored._version
