"""The validation score on the way through a run, and the weights that had the best one.

Measuring changes nothing about training: random numbers go on as if it had not been. The curve is kept in the Trainer's
own log, and so in its checkpoints; the best weights lie beside these. A run that is killed and goes on therefore ends
with the same curve and the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState

from rankwise.compare.together import is_first

VALIDATION = "validation_score"
"""The name of the score in the Trainer's log."""


class Validation(TrainerCallback):
    """Measures the validation score after the given steps and, where asked, keeps the weights of the best one.

    Args:
        steps: after which to measure.
        score: what measures; it may put the model in evaluation mode.
        lower_is_better: whether a lower score is a better one.
        folder: where the best weights are kept, None to keep none.
        first: the first step whose weights may be the best.
        on_value: told of each step and its score.
    """

    def __init__(
        self,
        steps: Collection[int],
        score: Callable[[], float],
        *,
        lower_is_better: bool,
        folder: Path | None,
        first: int,
        on_value: Callable[[int, float], None] | None = None,
    ) -> None:
        self._steps = steps
        self._score = score
        self._sign = -1 if lower_is_better else 1
        self._folder = folder
        self._first = first
        self._on_value = on_value

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Measure, if this step is one of those."""
        if state.global_step not in self._steps:
            return
        was_training = model.training
        # A new pass over the validation split draws a random number, even where nothing is shuffled.
        with torch.random.fork_rng():
            value = self._score()
        model.train(was_training)
        state.log_history.append({VALIDATION: value, "step": state.global_step})
        if self._on_value is not None:
            self._on_value(state.global_step, value)
        if self._folder is None or self.best_step(state) != state.global_step or not is_first():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_state(model), self._file(state.global_step))
        if args.save_strategy == "no":  # the run would begin anew, and nothing would ask for an earlier best
            self._forget_others(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """A new checkpoint knows the best step so far; weights of an earlier best are of no use any more."""
        if self._folder is not None and is_first():
            self._forget_others(state)

    def curve(self, state: TrainerState) -> list[tuple[int, float]]:
        """(step, score) as measured, before a resumption too; a score that is not finite is left out."""
        points = [(int(log["step"]), float(log[VALIDATION])) for log in state.log_history if VALIDATION in log]
        return [(step, value) for step, value in points if math.isfinite(value)]

    def best_step(self, state: TrainerState) -> int | None:
        """The step with the best score so far, the earliest of equal ones; None before there is one."""
        allowed = [(step, value) for step, value in self.curve(state) if step >= self._first]
        if not allowed:
            return None
        return max(allowed, key=lambda point: self._sign * point[1])[0]

    def restore_best(self, model: nn.Module, state: TrainerState) -> int:
        """Put the best weights into the model; the step that they are of."""
        best = self.best_step(state)
        if best is None or best == state.global_step:
            return state.global_step
        model.load_state_dict(load_file(self._file(best)), strict=False)
        return best

    def _file(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"best-{step}.safetensors"

    def _forget_others(self, state: TrainerState) -> None:
        assert self._folder is not None
        best = self.best_step(state)
        for file in self._folder.glob("best-*.safetensors"):
            if best is None or file != self._file(best):
                file.unlink()


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all that training may change: parameters that train, and buffers, by their names in the state dict."""
    changing = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    changing |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    # The clones share no memory, as tied weights do, which safetensors refuses.
    return {name: value.cpu().clone().contiguous() for name, value in model.state_dict().items() if name in changing}
