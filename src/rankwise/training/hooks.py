"""Finds every optimiser step in the process, through torch's own optimiser hooks.

One mechanism for Trainer, SFTTrainer, Accelerate and bare loops. The hooks see every optimiser; one that moves no
parameter of a rankwise adapter costs a dictionary of its parameters and nothing else, and nothing at all while no
adapter lives.

Two functions of torch are wrapped beside the hooks. A `GradScaler` that finds an overflow does not call a plain
optimiser at all, so that the step it skips shows nowhere else. And `torch.distributed.checkpoint` calls `step()` of an
optimiser only to make its state, which is no step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import wrapt
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.roster import Roster, living_rosters
from rankwise.errors import TrainingError
from rankwise.training import averaged
from rankwise.training.optimizer_step import OptimizerStep
from rankwise.training.optimizers import Groups, groups_of, running_optimizers
from rankwise.training.refusals import DEEPSPEED
from rankwise.training.session import session_of


class Call(NamedTuple):
    """A call of an optimiser's `step()` that has begun and not ended."""

    optimizer: torch.optim.Optimizer
    step: OptimizerStep
    """What it is a part of: calls within one another share it."""


class Calls(threading.local):
    """The calls of this thread."""

    def __init__(self) -> None:
        self.open: list[Call] = []
        """Of optimisers that move an adapter, outermost first."""
        self.begun = 0
        """How many have begun so far, of any optimiser."""
        self.making_state = False
        """Whether `step()` is called for the optimiser's state alone."""


_calls = Calls()
_installed = False


def install() -> None:
    """Register the hooks, wrap the two functions and follow averaged models, once per process."""
    global _installed
    if not _installed:
        Roster.on_forward = _saw_forward
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        wrapt.wrap_function_wrapper("torch.amp.grad_scaler", "GradScaler.step", _observe_scaler)
        wrapt.register_post_import_hook(_wrap_init_optim_state, "torch.distributed.checkpoint.state_dict")
        averaged.install()
        _installed = True


# --- the hooks ------------------------------------------------------------------------------------------------------


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the rules now or, where the optimiser is given a closure that does the backward pass, right after it."""
    _calls.begun += 1
    if _calls.making_state or not living_rosters():
        return None
    _drop_calls_that_raised()
    groups = groups_of(optimizer)
    rosters = _moved_by(groups)
    if not rosters:
        _refuse_partitions()
        return None
    calls_itself = any(call.optimizer is optimizer for call in _calls.open)
    around = [call.step for call in _calls.open if any(call.step.moves(roster) for roster in rosters)]
    step = around[-1] if around else OptimizerStep()
    _calls.open.append(Call(optimizer, step))
    if calls_itself:
        return None
    try:
        step.enter(optimizer, groups, rosters)
        return step.prepare(optimizer, rosters, args, kwargs)
    except BaseException:
        _calls.open.pop()
        step.abandon(optimizer, outermost=not around)
        raise


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not any(call.optimizer is optimizer for call in _calls.open):
        return
    ended = _calls.open.pop()
    while ended.optimizer is not optimizer:  # a call within this one raised, and this one caught the exception
        ended.step.abandon(ended.optimizer, outermost=False)
        ended = _calls.open.pop()
    if any(call.optimizer is optimizer for call in _calls.open):  # it has called itself
        return
    ended.step.leave(optimizer)
    if not any(call.step is ended.step for call in _calls.open):
        ended.step.close()


def _drop_calls_that_raised() -> None:
    """Torch calls no hook after a step that raised; the Python stack tells which calls are still running."""
    if not _calls.open:
        return
    running = iter(running_optimizers()[:-1])  # the last of them has just begun and is no open call yet
    still_running = [call for call in _calls.open if any(optimizer is call.optimizer for optimizer in running)]
    for call in reversed(_calls.open[len(still_running) :]):
        call.step.abandon(call.optimizer, outermost=not any(other.step is call.step for other in still_running))
    _calls.open = still_running


def _saw_forward(roster: Roster, layer: AdapterLayer, output: torch.Tensor) -> None:
    session_of(roster).watch.saw_forward(layer.tensors(roster.adapter), output)


def _moved_by(groups: Groups) -> list[Roster]:
    """The adapters of which a parameter is in these groups, oldest first."""
    return [roster for roster in living_rosters() if any(id(p) in groups for p in roster.parameters())]


def _refuse_partitions() -> None:
    """Raise where ZeRO has put flat partitions in the place of an adapter's parameters, which it marks so."""
    for roster in living_rosters():
        first = next(roster.parameters(), None)
        if hasattr(first, "ds_id") or hasattr(first, "_hp_mapping"):
            raise TrainingError(DEEPSPEED)


# --- what the hooks do not see --------------------------------------------------------------------------------------


def _observe_scaler(step: Callable[..., Any], scaler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`GradScaler.step`: where it did not call the optimiser, it has skipped a step."""
    begun = _calls.begun
    result = step(*args, **kwargs)
    if _calls.begun == begun:
        optimizer = args[0] if args else kwargs["optimizer"]
        groups = groups_of(optimizer)
        for session in map(session_of, _moved_by(groups)):
            if session.takes_part(groups):
                session.skip(bad=False)
    return result


def _wrap_init_optim_state(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "_init_optim_state", _make_state)


def _make_state(make: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_init_optim_state` steps an optimiser with gradients of zero and a learning rate of zero."""
    _calls.making_state = True
    try:
        return make(*args, **kwargs)
    finally:
        _calls.making_state = False
