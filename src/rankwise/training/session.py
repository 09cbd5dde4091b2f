"""One adapter under an optimiser: the rules of its method around every optimiser step.

`OptimizerStep` calls it. Before the optimiser moves the weights, `before` adds the penalty's gradient and lets the
method observe, and `hold` remembers what has a learning rate of its own. Afterwards `settle` gives these tensors their
move, and `after` lets the method act and counts the step. Layers of one shape are stacked, so that a rule costs as many
kernels for 96 layers as for 6.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rankwise.adapters.progress import CONFIG, TRAINER, Progress, final_ranks_due
from rankwise.adapters.roster import Roster
from rankwise.adapters.tensors import AdapterTensors
from rankwise.errors import TrainingError
from rankwise.methods.stack import Ablation, Stack, Step, Updates
from rankwise.shards import write
from rankwise.training.aside import backward_through
from rankwise.training.counters import Counters
from rankwise.training.development import ablate, can_ablate, check
from rankwise.training.gradients import add_to_gradients, any_nonzero, unscaled
from rankwise.training.held import Held
from rankwise.training.optimizers import Groups
from rankwise.training.rates import Rates
from rankwise.training.refusals import check_needs_no_rate, check_together, check_whole
from rankwise.training.schedule_free import holds_average, restart, set_in_both
from rankwise.training.verdict import Verdict, keep_where_stopped
from rankwise.training.watch import Watch

T = TypeVar("T")
Moments = Mapping[Any, dict[str, Any]]
"""An optimiser's state by parameter."""


class Session:
    """The runtime state of one adapter in training; everything that must outlive the process is in `Progress`."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.last_penalty: Tensor | None = None
        self.watch = Watch(roster)
        self._step: Step | None = None
        self._held: list[Held] = []
        self._members: list[AdapterTensors] = []
        self._groups: Groups = {}
        self._rates = Rates()
        self._counters = Counters(roster, self._rates.forget)
        self._verdict: Verdict | None = None  # on this step, where the device alone knows it
        self._told = False
        self._looked = False
        self._trains = False

    # --- one optimiser step -----------------------------------------------------------------------------------------

    def takes_part(self, groups: Groups) -> bool:
        """Whether the coming step is one of this adapter's.

        It is if the adapter trains: it is active, and the optimiser holds a parameter of it that requires gradients.
        Gradients that are zero or missing then make no difference: the loss may give none in a step. It also is if the
        adapter has gradients, although another one has been made the active adapter since.

        Raises:
            TrainingError: the optimiser holds only a part of what trains, or processes cannot agree; gradients were
                bad in five steps in a row, of which the last one has been left to the device.
        """
        self.abandon()
        if self._counters.learn():
            self._counters.check()
        self._groups = groups
        layers = self.roster.layers
        self._members = [layer.started(self.roster.adapter) for layer in layers]
        active = self.roster.adapter in layers[0].active_adapters
        self._trains = active and any(p.requires_grad and id(p) in groups for p in self._trained())
        if not self._trains and not self._has_gradients():
            return False
        self._join()
        check_whole(self.roster, self._members[0], [p for p in self._trained() if id(p) not in groups])
        check_together(self.roster, self._members[0])
        return True

    def _has_gradients(self) -> bool:
        """Whether gradients are there and not left from an earlier step, after which the loop has set them to zero."""
        gradients = self.gradients()
        return bool(gradients) and (self.watch.saw_backward or any_nonzero(gradients))

    def can_learn_later(self) -> bool:
        """Whether the host need not know yet if the coming step happens: it is one of a run's ordinary steps.

        The first step has checks and starts that read from the device anyway, and so have some rules.
        """
        first = self._members[0].trained()[0]
        if first.device.type == "cpu" or self.roster.sharded or any(t.awaits_gradient for t in self._members):
            return False
        progress = self.progress()
        return progress.last > 0 and not self.roster.method.reads_back(self._next_step(progress))

    @torch.no_grad()
    def before(self, scale: Tensor | None, verdict: Verdict | None = None) -> None:
        """Run the rules that come before the move: the gradients are complete, and nothing has moved.

        Args:
            scale: what the gradients are still multiplied by, under a GradScaler and a fused optimiser.
            verdict: whether the step happens, where the device alone knows it; None: it does.
        """
        self._verdict = verdict
        self.roster.together.forget()
        progress = self.progress()
        self._rates.read(self._members, self._groups)
        step = self._step = self._next_step(progress)
        self._check_runnable(step)
        self._find_starts()
        stacks = self.stacks(scale)
        self._add_penalty(stacks, step, scale)
        self._write(stacks, self.roster.method.before_step(stacks, step))

    @torch.no_grad()
    def after(self, states: Sequence[Moments]) -> None:
        """Run the rules that come after the move, and count the step.

        Args:
            states: what each of the step's optimisers remembers, by parameter.
        """
        step = self._step
        if step is None:
            return
        for tensors in self._members:
            if not tensors.awaits_gradient:
                continue
            if tensors.from_gradient and any(self._may_move(p) for p in tensors.trained()):
                tensors.fill(tensors.from_gradient)
                for state in states:
                    restart(tensors.trained(), state)
            tensors.forget_starts()
        stacks = self.stacks(moments=states)
        updates = self.roster.method.after_step(stacks, step)
        for state in states:
            set_in_both(stacks, updates, state, self._groups)
        self._write(stacks, updates)
        self._step = None
        progress = self.progress()
        before = replace(progress)
        progress.step = progress.last = step.number
        progress.total, progress.epoch = step.total or 0, step.epoch or 0
        progress.rules += 1
        progress.bad = 0
        self._rates.store(self._members)
        if self._verdict is None:
            self._counters.store(progress)
        else:
            self._counters.store_undecided(progress, before, self._verdict)
        self._verdict = None

    @torch.no_grad()
    def finalize(self) -> None:
        """The method's final budget, applied now; once the ranks are final, what is closed is closed again."""
        stacks, progress = self.stacks(), self.progress()
        if final_ranks_due(self.roster.method, progress) is None:
            self._write(stacks, self.roster.method.close_again(stacks))
        else:
            self._write(stacks, self.roster.method.finalize(stacks))
            progress.finalized = 1
        self._counters.store(progress)

    # --- counters ---------------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """The stored counters."""
        return self._counters.read()

    def learn(self) -> None:
        """Count the last step as what it was, where the host has not asked yet."""
        self._counters.learn()

    def _next_step(self, progress: Progress) -> Step:
        roster = self.roster
        return Step(
            number=progress.step + 1,
            last=progress.last,
            total=self._total(progress),
            finalized=bool(progress.finalized),
            epoch=progress.epoch or (None if progress.total else roster.trainer_epoch),
            rate_estimated=self._rates.estimated,
            ablate=self._ablate if can_ablate(roster) else None,
        )

    def _total(self, progress: Progress) -> int | None:
        """The stored total wins; else the config's, else the trainer's."""
        told = self.roster.trainer_total
        if progress.total:
            if told and told != progress.total and not self._told:
                self._told = True
                warnings.warn(
                    f"the trainer now says {told} steps in all and adapter {self.roster.adapter!r} began its schedule "
                    f"with {progress.total}: the schedule keeps {progress.total}",
                    stacklevel=2,
                )
            return progress.total
        configured = getattr(self.roster.method, "total_step", None)
        progress.source = CONFIG if configured else TRAINER if told else 0
        return configured or told

    # --- checks -----------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Where a compiled model gave the roster no forward pass to find its processes in."""
        roster = self.roster
        if roster.in_ddp and roster.peers is None and dist.is_initialized():
            roster.join(dist.group.WORLD)
            self._counters.forget()

    def skip(self, *, bad: bool) -> None:
        """Count a step that moves nothing: an overflow of the loss scale or, `bad`, gradients that are not finite.

        Raises:
            TrainingError: bad gradients, the fifth time in a row.
        """
        self._counters.skip(self.progress(), bad=bad)
        self._counters.check()

    def _check_runnable(self, step: Step) -> None:
        """A run whose ranks cannot adapt fails at its first step."""
        method = self.roster.method
        if self._rates.unknown:
            check_needs_no_rate(method)
        missing = method.needs(step)
        if missing:
            argument, meaning = missing
            raise TrainingError(
                f"{type(method).__name__} needs {argument.partition('=')[0]}, {meaning}, and no trainer told it: pass "
                f"it in the config, as in {type(method).__name__}({argument}, …)"
            )
        if step.last == 0:
            due = method.final_step(step.total, step.epoch)
            if method.scores_ranks and due is not None:
                check(self.roster)
            advice = method.advice(self.stacks(), step)
            if advice:
                warnings.warn(advice, stacklevel=2)

    # --- what the rules read and write ------------------------------------------------------------------------------

    def stacks(self, scale: Tensor | None = None, moments: Sequence[Moments] = ()) -> list[Stack]:
        """The adapter's layers grouped by shape, in model order.

        Args:
            scale: what the gradients are multiplied by.
            moments: what each optimiser remembers, by parameter.
        """
        if not self._members:
            self._members = [layer.started(self.roster.adapter) for layer in self.roster.layers]
        return [self._stack(alike, scale, moments) for alike in self._grouped(self._members)]

    def _grouped(self, values: Sequence[T]) -> list[list[T]]:
        """One value per layer, grouped as stacks are: by shape, dtype and device."""
        by_kind: dict[Any, list[T]] = {}
        for tensors, value in zip(self._members, values, strict=True):
            first = tensors.trained()[0]
            by_kind.setdefault((tensors.size, first.dtype, first.device), []).append(value)
        return list(by_kind.values())

    def _ablate(self) -> Ablation:
        found = ablate(self.roster)
        without, alone = ([torch.stack(group) for group in self._grouped(part)] for part in found[1:])
        return Ablation(found.whole, without, alone)

    def _stack(self, alike: Sequence[AdapterTensors], scale: Tensor | None, moments: Sequence[Moments]) -> Stack:
        names = alike[0].slots
        values = {name: [getattr(tensors, name) for tensors in alike] for name in names}
        return Stack(
            [tensors.size for tensors in alike],
            values,
            gradients=lambda name: unscaled(values[name], scale),
            rates=lambda name: [self._rates_of(p, name) for p in values[name]],
            moments=lambda name: [_moments(moments, p) for p in values[name]],
        )

    def _rates_of(self, parameter: Tensor, name: str) -> tuple[float, float]:
        rate, peak = self._rates.of(parameter)
        ratio = 1.0 if self._step is None else self.roster.method.ratio(name, peak, self._step)
        return rate * ratio, peak

    def _write(self, stacks: Sequence[Stack], updates: Updates) -> None:
        """Give tensors new values, all in a few operations; in a step that is stopped they keep the old ones."""
        self.watch.reset()
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for stack, update in zip(stacks, updates, strict=False):
            for name, value in update.items():
                targets += stack.tensors(name)
                values += value.unbind(0)
        if self._verdict is not None:
            values = keep_where_stopped(self._verdict, targets, values)
        write(targets, values)

    def _add_penalty(self, stacks: Sequence[Stack], step: Step, scale: Tensor | None) -> None:
        penalty = self.roster.method.penalty(stacks, step)
        if penalty is None:
            return
        self.last_penalty = penalty.value
        for stack, gradients in zip(stacks, penalty.gradients, strict=True):
            for name, gradient in gradients.items():
                gradient = gradient if scale is None else gradient * scale
                self._accumulate(stack.tensors(name), gradient)

    def _accumulate(self, parameters: Sequence[Tensor], gradient: Tensor) -> None:
        """Add to what the optimiser will move: a layer that the loss did not reach gets the penalty alone."""
        moving = [self._may_move(p) for p in parameters]
        more = gradient.to(parameters[0].dtype).unbind(0)
        add_to_gradients(list(compress(parameters, moving)), list(compress(more, moving)))

    def _may_move(self, p: Tensor) -> bool:
        """Whether a parameter is not frozen.

        Of an adapter that is not the active one any more, no parameter requires gradients; what has some will move.
        """
        return p.requires_grad if self._trains else p.grad is not None

    # --- rates of their own, and no weight decay --------------------------------------------------------------------

    def _find_starts(self) -> None:
        """For tensors that wait for a gradient of the base weight: from `init_batch`, else from this step's own.

        Raises:
            TrainingError: every layer waits and none has seen a gradient.
        """
        waiting = [tensors for tensors in self._members if tensors.awaits_gradient]
        if waiting and not self._looked and getattr(self.roster.method, "init_batch", None) is not None:
            for tensors in waiting:
                tensors.forget_starts()
            backward_through(self.roster)
            self._looked = True  # layers that the batch does not reach go on waiting for the loop's own gradients
        if len(waiting) == len(self._members) and not any(tensors.saw_gradient for tensors in waiting):
            raise TrainingError(
                f"adapter {self.roster.adapter!r} starts from the gradient of its base weights, and no backward pass "
                "has shown one: pass `init_batch`"
            )

    @torch.no_grad()
    def hold(self, groups: Groups, state: Moments) -> None:
        """Save the parameters whose update will be rescaled, exempt from decay, or suppressed in this step.

        Weight decay is undone without knowing the optimiser's formula: it is shown a zero in the tensor's place, which
        no decay can shrink, and the tensor is then moved by what the optimiser made of the zero.

        Args:
            groups: of the optimiser that is about to move weights.
            state: what it remembers, by parameter.
        """
        step = self._step
        if step is None:
            return
        kinds: dict[tuple[float, bool, bool], list[Tensor]] = {}
        for tensors in self._members:
            waits = tensors.awaits_gradient  # nothing of it moves before it has its start
            for name, slot in tensors.slots.items():
                group = groups.get(id(getattr(tensors, name))) if slot.trained else None
                if group is None:
                    continue
                peak = self._rates.of(getattr(tensors, name))[1]
                ratio = 0.0 if waits else self.roster.method.ratio(name, peak, step)
                zeroed = (slot.exact or waits) and group.get("weight_decay", 0) != 0
                averaged = holds_average(group)
                if ratio != 1.0 or zeroed or (averaged and slot.exact):
                    kinds.setdefault((ratio, zeroed, averaged), []).append(getattr(tensors, name))
        for (ratio, zeroed, averaged), parameters in kinds.items():
            states = [state[p] for p in parameters] if averaged else None
            self._held.append(Held.of(ratio, zeroed, parameters, states))

    @torch.no_grad()
    def settle(self) -> None:
        """Give what was held its move: the optimiser that moves weights has done so."""
        for held in self._held:
            held.settle()
        self._held = []

    @torch.no_grad()
    def give_back(self) -> None:
        """Put back what was held, after an optimiser that raised."""
        for held in self._held:
            held.give_back()
        self._held = []

    def abandon(self) -> None:
        """Forget an optimiser step that raised."""
        self.give_back()
        self._step = self._verdict = None

    def _trained(self) -> list[Tensor]:
        return [p for tensors in self._members for p in tensors.trained()]

    def gradients(self) -> list[Tensor]:
        """What the loss gave, layer by layer."""
        return [p.grad for p in self._trained() if p.grad is not None]


def session_of(roster: Roster) -> Session:
    """The session of an adapter, made when first asked for."""
    if roster.session is None:
        roster.session = Session(roster)
    return roster.session


def _moments(states: Sequence[Moments], parameter: Tensor) -> list[Tensor]:
    """What optimisers remember entry by entry of a parameter (momentum, squares), as floating point numbers."""
    found = [value for state in states if parameter in state for value in state[parameter].values()]
    return [t for t in found if isinstance(t, Tensor) and t.shape == parameter.shape and t.is_floating_point()]
