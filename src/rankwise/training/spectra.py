"""Recording an adapter's spectra under a Trainer of transformers or TRL, and telling them to its tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.checks import require_int
from rankwise.spectral.record import DIRECTIONS
from rankwise.training.live import tell
from rankwise.training.recording import Recorder

EVERY = 100
"""Steps between records by default: a record takes a part of a step's time, and this many share it."""


class SpectraCallback(TrainerCallback):
    """Records spectra every so many steps, at the start and at the end: see `Recorder`.

    Args:
        folder: where the records go.
        every: optimiser steps between records, ≥ 1.
        adapter: its name.
        directions: as in `Recorder`.
        pretrained: as in `Recorder`.
        tracker: one of accelerate's trackers, started; it gets each record as numbers and images. None: no tracker.

    Raises:
        ArgumentError: a number is out of its range.

    Example:
        >>> import rankwise
        >>> callback = rankwise.SpectraCallback("runs/mine/spectra", every=50)  # Trainer(…, callbacks=[callback])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = EVERY,
        adapter: str = "default",
        directions: int = DIRECTIONS,
        pretrained: int | None = None,
        tracker: GeneralTracker | None = None,
    ) -> None:
        require_int("every", every, least=1)
        require_int("directions", directions, least=0)
        if pretrained is not None:
            require_int("pretrained", pretrained, least=1)
        self._folder, self._every, self._tracker = folder, every, tracker
        self._settings: dict[str, Any] = {"adapter": adapter, "directions": directions, "pretrained": pretrained}
        self._recorder: Recorder | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """The record before the first step. Only the first process records: all have the same adapter."""
        if state.is_world_process_zero:
            self._recorder = Recorder(model, self._folder, **self._settings)
            self._record(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A record every so many steps."""
        if state.global_step % self._every == 0:
            self._record(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The record after the last step."""
        if state.global_step % self._every:
            self._record(state.global_step)
        self._recorder = None

    def _record(self, step: int) -> None:
        if self._recorder is None:
            return
        found = self._recorder.record(step)
        if self._tracker is not None:
            tell(self._tracker, found.record)
