"""What a transformers Trainer (and every TRL trainer) knows that an optimiser does not: total steps, data, logs.

A callback class in `transformers.trainer.DEFAULT_CALLBACKS` is part of every Trainer made afterwards. A callback is
never shown its trainer, whose evaluation data some rules need, so `Trainer.train` introduces the two.
"""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import wrapt
from torch import nn
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.roster import Roster
from rankwise.checks import say_once
from rankwise.errors import TrainingError
from rankwise.training.aside import random_states
from rankwise.training.refusals import DEEPSPEED
from rankwise.training.session import session_of
from rankwise.training.status import metrics

DEVELOPMENT = 32
"""Examples ranks are scored on (the paper of ALoRA's)."""


class RankwiseCallback(TrainerCallback):
    """Tells adapters how long the run is, and trainers' reporters how the ranks stand."""

    trainer: weakref.ref[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Hand the total steps to every adapter of the model.

        Raises:
            ArgumentError: a schedule cannot fit the steps.
            TrainingError: training resumes and an adapter was not in the checkpoint (PEFT would start it afresh);
                DeepSpeed.
        """
        if args.deepspeed is not None and rosters_of(model):
            raise TrainingError(DEEPSPEED)
        for roster in rosters_of(model):
            roster.trainer_total, roster.in_trainer = state.max_steps, True
            roster.trainer_epoch = _steps_per_epoch(kwargs.get("train_dataloader"), args)
            if self.trainer is not None:
                roster.development = functools.partial(_development_batches, self.trainer)
            if roster.model is None:
                roster.attach(model)
            if state.global_step and not session_of(roster).progress().step:
                raise TrainingError(
                    f"the checkpoint at step {state.global_step} did not hold adapter {roster.adapter!r}, which is "
                    "still at step 0: it was saved from an adapter of another name"
                )
            if not session_of(roster).progress().total:
                total = getattr(roster.method, "total_step", None) or state.max_steps
                roster.method.final_step(total, roster.trainer_epoch)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """From here on, saving warns of ranks that the run left short of their budget."""
        for roster in rosters_of(model):
            roster.in_trainer = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add mean rank, penalty and steps skipped to what the reporters get."""
        if logs is not None and "loss" in logs:
            for roster in rosters_of(model):
                logs.update(metrics(roster))


def rosters_of(model: nn.Module | None) -> list[Roster]:
    """The adapters of a model that are set to train, in model order."""
    found: dict[int, Roster] = {}
    for module in model.modules() if model is not None else ():
        if isinstance(module, AdapterLayer):
            for adapter in module.active_adapters:
                roster = module.rosters.get(adapter)
                if roster is not None:
                    found[id(roster)] = roster
    return list(found.values())


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> int | None:
    """Optimiser steps of one pass over the training data; None where its length is unknown."""
    try:
        return max(1, math.ceil(len(loader) / args.gradient_accumulation_steps))
    except TypeError:
        return None


def _development_batches(trainer: weakref.ref[Any]) -> list[Any]:
    """About 32 examples of the trainer's evaluation set, else of its training set, as its own loader gives them."""
    owner: Any = trainer()
    data = owner.eval_dataset
    data = next(iter(data.values())) if isinstance(data, dict) and data else data
    if not data:
        say_once("no evaluation set was given: ranks are scored on examples of the training set")
        data = owner.train_dataset
    with random_states():
        return list(owner.get_eval_dataloader(_some(data)))


def _some(data: Any) -> Any:
    """DEVELOPMENT examples spread evenly over a data set, or the first of one without a length."""
    try:
        count = len(data)
    except TypeError:
        return list(itertools.islice(data, DEVELOPMENT))
    rows = sorted({i * count // DEVELOPMENT for i in range(DEVELOPMENT)})
    return data.select(rows) if hasattr(data, "select") else Subset(data, rows)


def _introduce(train: Callable[..., Any], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Show our callback its trainer, then train."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, RankwiseCallback):
            callback.trainer = weakref.ref(trainer)
    return train(*args, **kwargs)


def install() -> None:
    """Add the callback to every Trainer made from now on, once."""
    from transformers import trainer  # noqa: PLC0415  only once the trainer module is loaded

    if RankwiseCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(RankwiseCallback)  # type: ignore[arg-type]
        wrapt.wrap_function_wrapper(trainer.Trainer, "train", _introduce)
