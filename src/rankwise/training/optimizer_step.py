"""One step of an optimiser over the adapters that it moves, with the steps of optimisers that it steps itself.

Most steps are of one optimiser: the rules before the move run at its pre-hook, those after it at its post-hook. Three
kinds of optimisers need more.

- One whose `step()` calls that of its base class: torch calls the hooks twice for one step. The inner pair is ignored.
- One that steps another (Lookahead, SAM): the weights are moved by the inner one. The rules before the move run at the
  inner pre-hook, when SAM has put back the weights that it moved. The rules after it run when the outer step ends, when
  Lookahead has interpolated the weights: what is pruned stays pruned.
- One that is given a closure: the gradients are complete only when the closure has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.roster import Roster
from rankwise.errors import TrainingError
from rankwise.training.gradients import all_finite
from rankwise.training.optimizers import Groups, groups_of, held_by, steps_others
from rankwise.training.refusals import MANY_CALLS
from rankwise.training.session import Session, session_of
from rankwise.training.verdict import Verdict, can_be_left_to_the_device, verdict_of


class OptimizerStep:
    """The step of an optimiser, and of those within it, that move the same adapters."""

    def __init__(self) -> None:
        self._adapters: list[Session] = []  # of which an optimiser of this step holds parameters
        self._asked: list[Session] = []  # of which it is known whether they take part
        self._taking_part: list[Session] = []
        self._stepped: list[Session] = []  # of which an optimiser has moved weights, and not left it to another
        self._optimizers: list[Optimizer] = []  # whose step has begun, outermost first
        self._groups: Groups = {}  # of all of them; an inner one's win over an outer one's
        self._moving: list[Optimizer] = []  # around which rules run now
        self._moved: set[int] = set()  # parameters of those that are done
        self._flagged: tuple[Optimizer, Tensor | None] | None = None  # told on the device whether to move; what it held

    def moves(self, roster: Roster) -> bool:
        """Whether an adapter is among those that this step moves."""
        return any(session.roster is roster for session in self._adapters)

    # --- what the hooks call ----------------------------------------------------------------------------------------

    def enter(self, optimizer: Optimizer, groups: Groups, rosters: list[Roster]) -> None:
        """The step of an optimiser begins, the outermost or one within it.

        Args:
            optimizer: the optimiser.
            groups: its parameter groups.
            rosters: the adapters of which it moves a parameter.
        """
        if optimizer not in self._optimizers:
            self._optimizers.append(optimizer)
        self._groups |= groups
        for session in map(session_of, rosters):
            if session not in self._adapters:
                self._adapters.append(session)
            session.watch.paused = True

    def prepare(
        self, optimizer: Optimizer, rosters: list[Roster], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the rules that come before the move, or see to it that they run when their time comes.

        Args:
            optimizer: the optimiser whose step begins.
            rosters: the adapters of which it moves a parameter.
            args: of its `step()`.
            kwargs: of its `step()`.

        Returns:
            Other arguments for its `step()`; None: the same.

        Raises:
            TrainingError: rules cannot run in this step; see its message.
        """
        if steps_others(optimizer, {id(p) for roster in rosters for p in roster.parameters()}):
            return None
        # An outer optimiser that steps this one again has made one step already.
        if not self._moved.isdisjoint(groups_of(optimizer)):
            self._run_after()
        position = 1 if args and args[0] is optimizer else 0
        closure = kwargs.get("closure") or (args[position] if len(args) > position else None)
        if closure is None:
            self._begin(optimizer, rosters)
            return None
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TrainingError(MANY_CALLS)
        wrapped = _then(closure, lambda: self._begin(optimizer, rosters))
        if "closure" in kwargs:
            return args, kwargs | {"closure": wrapped}
        return (*args[:position], wrapped, *args[position + 1 :]), kwargs

    def leave(self, optimizer: Optimizer) -> None:
        """The step of an optimiser has ended, the outermost or one within it."""
        if optimizer in self._moving:
            self._moving.remove(optimizer)
            self._moved |= groups_of(optimizer).keys()
        self._take_flag_back()
        for session in self._taking_part:
            session.settle()

    def close(self) -> None:
        """The outermost step has ended."""
        self._run_after()
        for session in self._adapters:
            session.watch.paused = False
        for session in self._stepped:
            session.watch.reset()

    def abandon(self, optimizer: Optimizer, *, outermost: bool) -> None:
        """The step of an optimiser ended in an exception, which an outer one may have caught."""
        if optimizer in self._moving:
            self._moving.remove(optimizer)
        self._take_flag_back()
        for session in self._taking_part:
            session.give_back()
        if outermost:
            for session in self._adapters:
                session.abandon()
                session.watch.paused = False

    # --- the rules --------------------------------------------------------------------------------------------------

    def _begin(self, optimizer: Optimizer, rosters: list[Roster]) -> None:
        """An optimiser is about to move weights by the gradients that they have now.

        A step is skipped for all that the optimisers move, or for nothing of it.

        Raises:
            TrainingError: another optimiser's step is around this one, and nothing told so.
        """
        groups = groups_of(optimizer)
        for outer in self._moving:
            if not groups.keys().isdisjoint(groups_of(outer)):
                raise TrainingError(_cannot_nest(outer, optimizer))
        sessions = [session_of(roster) for roster in rosters]
        asked_now = [session for session in sessions if session not in self._asked]
        taking_part = [session for session in asked_now if session.takes_part(self._groups)]
        self._asked += asked_now
        verdict = self._left_to_the_device(optimizer, taking_part)
        if taking_part and (verdict is not None or not self._skips(optimizer, taking_part)):
            for session in taking_part:
                session.before(getattr(optimizer, "grad_scale", None), verdict)
            self._taking_part += taking_part
        self._stepped += sessions
        self._moving.append(optimizer)
        for session in self._taking_part:
            session.hold(groups, optimizer.state)

    def _skips(self, optimizer: Optimizer, sessions: list[Session]) -> bool:
        """Whether the step must move nothing; if so, it is counted, and no gradient is left that it could move by."""
        found_inf = getattr(optimizer, "found_inf", None)
        overflow = found_inf is not None and bool(found_inf > 0)
        if not overflow and all(all_finite(session.gradients()) for session in sessions):
            return False
        if not overflow:  # a fused optimiser reads `found_inf` itself
            for moving in self._optimizers:
                for group in moving.param_groups:
                    for p in group["params"]:
                        p.grad = None
        for session in sessions:
            session.skip(bad=not overflow)
        return True

    def _left_to_the_device(self, optimizer: Optimizer, sessions: list[Session]) -> Verdict | None:
        """What the device will have found out by the time it moves weights; None where the host has to know it now."""
        # What is cheap to ask comes first: on a CPU the gradients are gathered once, by `_skips`.
        if self._optimizers != [optimizer] or not can_be_left_to_the_device(optimizer):
            return None
        if not all(session.can_learn_later() for session in sessions):
            return None
        gradients = [gradient for session in sessions for gradient in session.gradients()]
        if not gradients:
            return None
        found_inf = getattr(optimizer, "found_inf", None)
        verdict = verdict_of(gradients, found_inf)
        self._flagged = optimizer, found_inf
        optimizer.found_inf = verdict.stops  # type: ignore[attr-defined]  fused optimisers look for it
        return verdict

    def _take_flag_back(self) -> None:
        """A flag is for one step; a `GradScaler` removes its own."""
        if self._flagged is None:
            return
        (optimizer, before), self._flagged = self._flagged, None
        if before is None:
            del optimizer.found_inf  # type: ignore[attr-defined]
        else:
            optimizer.found_inf = before  # type: ignore[attr-defined]

    def _run_after(self) -> None:
        states = [optimizer.state for optimizer in self._optimizers]
        for session in self._taking_part:
            session.after(states)
        self._asked, self._taking_part, self._moved = [], [], set()


def _cannot_nest(outer: Optimizer, inner: Optimizer) -> str:
    """Why rules cannot run where one optimiser steps another that moves a part of the same adapter."""
    calls = f"the step() of {type(outer).__name__} calls that of {type(inner).__name__} for parameters of an adapter"
    if any(held is inner for held in held_by(outer)):
        return (
            f"{calls} and holds it with a part of these parameters, as optimisers do that divide their state among "
            "processes (ZeroRedundancyOptimizer); the method's rules need one that moves all of them: take the inner "
            "class itself, or FSDP2"
        )
    return (
        f"{calls} and does not hold it as an attribute, or directly in a list or dictionary there: the method's rules "
        "would run around the wrong one"
    )


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
