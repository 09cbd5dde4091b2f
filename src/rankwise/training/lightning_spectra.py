"""Recording an adapter's spectra under a Trainer of Lightning. The only file that imports lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from peft import PeftModel
from torch import nn

from rankwise.checks import require_int
from rankwise.spectral.record import DIRECTIONS
from rankwise.training.recording import Recorder
from rankwise.training.spectra import EVERY


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
        require_int("every", every, least=1)
        self._folder, self._every = folder, every
        self._settings: dict[str, Any] = {"adapter": adapter, "directions": directions, "pretrained": pretrained}
        self._recorder: Recorder | None = None
        self._recorded = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The record before the first step. Only the first process records: all have the same adapter."""
        if trainer.is_global_zero:
            self._recorder = Recorder(_model_with_adapter(pl_module), self._folder, **self._settings)
            self._record(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """A record every so many steps. Several batches may make one step."""
        if trainer.global_step % self._every == 0:
            self._record(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The record after the last step."""
        self._record(trainer.global_step)
        self._recorder = None

    def _record(self, step: int) -> None:
        if self._recorder is not None and step != self._recorded:
            self._recorder.record(step)
            self._recorded = step


def _model_with_adapter(module: nn.Module) -> nn.Module:
    """PEFT's model inside of a Lightning module, whose attribute would stand in the names of its modules."""
    return next((part for part in module.modules() if isinstance(part, PeftModel)), module)
