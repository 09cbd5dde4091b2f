"""Recording an adapter's spectra under a Trainer of transformers or TRL, and telling them to its tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.spectral import Measured
from rankwise.spectral.record import DIRECTIONS
from rankwise.training.live import tell
from rankwise.training.recording import EVERY, ScheduledRecorder


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
        self._recorder = ScheduledRecorder(
            folder, every=every, adapter=adapter, directions=directions, pretrained=pretrained
        )
        self._tracker = tracker

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """The record before the first step. Only the first process records: all have the same adapter."""
        if state.is_world_process_zero:
            self._tell(self._recorder.begin(model, state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A record every so many steps."""
        self._tell(self._recorder.after_step(state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The record after the last step."""
        self._tell(self._recorder.end(state.global_step))

    def _tell(self, found: Measured | None) -> None:
        if found is not None and self._tracker is not None:
            tell(self._tracker, found.record)
