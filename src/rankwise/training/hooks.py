"""Finds every optimiser step in the process, through torch's own optimiser hooks.

One mechanism for Trainer, SFTTrainer, Accelerate and bare loops. The hooks see every optimiser; one that moves no
parameter of a rankwise adapter costs a dictionary of its parameters and nothing else, and nothing at all while no
adapter lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.roster import Roster, living_rosters
from rankwise.errors import TrainingError
from rankwise.training import averaged
from rankwise.training.refusals import DEEPSPEED, MANY_CALLS
from rankwise.training.session import Groups, session_of

_installed = False


def install() -> None:
    """Register the two hooks, and follow averaged models, once per process."""
    global _installed
    if not _installed:
        Roster.on_forward = _saw_forward
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        averaged.install()
        _installed = True


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the rules now or, where the optimiser is given a closure that does the backward pass, right after it."""
    if not living_rosters():
        return None
    position = 1 if args and args[0] is optimizer else 0
    closure = kwargs.get("closure") or (args[position] if len(args) > position else None)
    if closure is None:
        _run_before(optimizer)
        return None
    if not _moved_by(optimizer):
        return None
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TrainingError(MANY_CALLS)
    wrapped = _then(closure, lambda: _run_before(optimizer))
    if "closure" in kwargs:
        return args, kwargs | {"closure": wrapped}
    return (*args[:position], wrapped, *args[position + 1 :]), kwargs


def _after_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for roster in _moved_by(optimizer):
        session_of(roster).after(optimizer.state)


def _saw_forward(roster: Roster, layer: AdapterLayer, output: torch.Tensor) -> None:
    session_of(roster).saw_forward(layer.tensors(roster.adapter), output)


def _run_before(optimizer: torch.optim.Optimizer) -> None:
    """Run the rules of every adapter in this step, or of none: a step is skipped for all that the optimiser moves."""
    groups = _groups(optimizer)
    sessions = [session_of(roster) for roster in _moved_by(optimizer, groups)]
    sessions = [session for session in sessions if session.takes_part(groups)]
    if not sessions:
        _refuse_partitions()
        return
    overflow = getattr(optimizer, "found_inf", None)
    overflowed = overflow is not None and bool(overflow > 0)
    if not overflowed and all(session.finite() for session in sessions):
        for session in sessions:
            session.before(getattr(optimizer, "grad_scale", None), optimizer.state)
        return
    if not overflowed:  # leave nothing that the optimiser could move by
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
    for session in sessions:
        session.skip(bad=not overflowed)


def _refuse_partitions() -> None:
    """Raise where ZeRO has put flat partitions in the place of an adapter's parameters, which it marks so."""
    for roster in living_rosters():
        first = next(roster.parameters(), None)
        if hasattr(first, "ds_id") or hasattr(first, "_hp_mapping"):
            raise TrainingError(DEEPSPEED)


def _moved_by(optimizer: torch.optim.Optimizer, groups: Groups | None = None) -> list[Roster]:
    """The adapters of which this optimiser moves a parameter, oldest first."""
    rosters = living_rosters()
    if not rosters:
        return []
    groups = _groups(optimizer) if groups is None else groups
    return [roster for roster in rosters if any(id(p) in groups for p in roster.parameters())]


def _groups(optimizer: torch.optim.Optimizer) -> Groups:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _then(closure: Callable[[], Any], rules: Callable[[], None]) -> Callable[[], Any]:
    called = False

    def with_rules() -> Any:
        nonlocal called
        if called:
            raise TrainingError(MANY_CALLS)
        called = True
        loss = closure()
        rules()
        return loss

    return with_rules
