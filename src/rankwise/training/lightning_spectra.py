"""Recording an adapter's spectra under a Trainer of Lightning. The only file that imports lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from peft import PeftModel
from torch import nn

from rankwise.spectral.record import DIRECTIONS
from rankwise.training.recording import EVERY, ScheduledRecorder


class LightningSpectra(Callback):
    """Records spectra every so many optimiser steps, at the start and at the end: see `Recorder`.

    Args:
        folder: where the records go.
        every: optimiser steps between records, ≥ 1.
        adapter: its name.
        directions: as in `Recorder`.
        pretrained: as in `Recorder`.

    Raises:
        ArgumentError: a number is out of its range.

    Example:
        >>> import rankwise
        >>> callback = rankwise.LightningSpectra("runs/mine/spectra", every=50)  # Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = EVERY,
        adapter: str = "default",
        directions: int = DIRECTIONS,
        pretrained: int | None = None,
    ) -> None:
        self._recorder = ScheduledRecorder(
            folder, every=every, adapter=adapter, directions=directions, pretrained=pretrained
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The record before the first step. Only the first process records: all have the same adapter."""
        if trainer.is_global_zero:
            self._recorder.begin(_model_with_adapter(pl_module), trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """A record every so many steps. Several batches may make one step."""
        self._recorder.after_step(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The record after the last step."""
        self._recorder.end(trainer.global_step)


def _model_with_adapter(module: nn.Module) -> nn.Module:
    """PEFT's model inside of a Lightning module, whose attribute would stand in the names of its modules."""
    return next((part for part in module.modules() if isinstance(part, PeftModel)), module)
