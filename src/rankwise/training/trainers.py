"""What a transformers Trainer (and every TRL trainer) knows that an optimiser does not: total steps, and where logs go.

A callback class in `transformers.trainer.DEFAULT_CALLBACKS` is part of every Trainer made afterwards.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.adapters.layer import AdapterLinear
from rankwise.adapters.roster import Roster
from rankwise.errors import TrainingError
from rankwise.training.session import session_of
from rankwise.training.status import metrics


class RankwiseCallback(TrainerCallback):
    """Tells adapters how long the run is, and trainers' reporters how the ranks stand."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Hand the total steps to every adapter of the model.

        Raises:
            ArgumentError: a schedule cannot fit the steps.
            TrainingError: training resumes and an adapter was not in the checkpoint (PEFT would start it afresh).
        """
        for roster in rosters_of(model):
            roster.trainer_total, roster.in_trainer = state.max_steps, True
            if state.global_step and not session_of(roster).progress().step:
                raise TrainingError(
                    f"the checkpoint at step {state.global_step} did not hold adapter {roster.adapter!r}, which is "
                    "still at step 0: it was saved from an adapter of another name"
                )
            if not session_of(roster).progress().total:
                roster.method.final_step(getattr(roster.method, "total_step", None) or state.max_steps)

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
        if isinstance(module, AdapterLinear):
            for adapter in module.active_adapters:
                roster = module.rosters.get(adapter)
                if roster is not None:
                    found[id(roster)] = roster
    return list(found.values())


def install() -> None:
    """Add the callback to every Trainer made from now on, once."""
    from transformers.trainer import DEFAULT_CALLBACKS  # noqa: PLC0415  only once the trainer module is loaded

    if RankwiseCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(RankwiseCallback)  # type: ignore[arg-type]
