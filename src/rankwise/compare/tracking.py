"""Telling an experiment tracker of a run while it goes: losses, rates, ranks and spectra by module, and the scores.

The trackers are those of accelerate, which opens TensorBoard, Weights & Biases and trackio alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from transformers import TrainerCallback

from rankwise.errors import ArgumentError
from rankwise.spectral import Record
from rankwise.training.live import tell

FOLDER = "tracking"
"""Where TensorBoard's and W&B's files go, in the output folder."""
LOOKS = 10
"""Times in a run that spectra are sent, as numbers and images, which take as long as a step of a small model."""


def check_tracker(name: str | None) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ArgumentError: naming the package.
    """
    if name is not None and importlib.util.find_spec(name) is None:
        raise ArgumentError("tracker", f"be installed (pip install {name})", name)


class Tracking(TrainerCallback):
    """Sends what the Trainer logs to a tracker, with the rank and the spectrum of each module beside it.

    Args:
        name: "tensorboard", "wandb" or "trackio".
        output: the output folder of the comparison, whose name is the project's.
        key: the name of the run.
        settings: what the run was made from.
        ranks: the rank of each module now, by name; asked at every log.
        look: the record of the adapter at a step, asked for ten times in a run; None for what has no spectra.
    """

    def __init__(
        self,
        name: str,
        output: Path,
        key: str,
        settings: Mapping[str, Any],
        ranks: Callable[[], dict[str, int]],
        look: Callable[[int], Record] | None,
    ) -> None:
        self._ranks = ranks
        self._look = look
        self._next_look = 0
        self._settings = {setting: str(value) for setting, value in settings.items()}
        self._tracker = _tracker(name, output, key)
        self._step = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Open the run, and tell its settings."""
        self._tracker.start()
        self._tracker.store_init_configuration(self._settings)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Numbers of the log, under `train/`, and ranks, under `rank/`; spectra at every tenth of the run."""
        self._step = state.global_step
        told: dict[str, float] = {}
        for name, value in (logs or {}).items():
            if isinstance(value, int | float):
                told[f"train/{name}"] = value

        is_due = self._look is not None and self._step >= self._next_look
        if not is_due:  # a record has the ranks itself
            for module, rank in self._ranks().items():
                told[f"rank/{module}"] = rank
        self._tracker.log(told, step=self._step)
        if self._look is not None and is_due:
            tell(self._tracker, self._look(self._step))
            self._next_look = self._step + max(1, state.max_steps // LOOKS)

    def validated(self, step: int, score: float) -> None:
        """The validation score on the way."""
        self._tracker.log({"validation/score": score}, step=step)

    def finish(self, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Tell the scores of the finished run, and close it.

        Args:
            scores: for each split, its metrics by name.
        """
        told = {f"{split}/{metric}": value for split, metrics in scores.items() for metric, value in metrics.items()}
        self._tracker.log(told, step=self._step)
        self._tracker.finish()


def _tracker(name: str, output: Path, key: str) -> GeneralTracker:
    folder = output / FOLDER
    if name == "tensorboard":
        return TensorBoardTracker(key, str(folder))
    if name == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        # The run's own name is its id: a run that was killed goes on in its old curves.
        return WandBTracker(output.name, name=key, id=key, resume="allow", dir=str(folder), reinit="finish_previous")
    return TrackioTracker(output.name, name=key, resume="allow")
