"""Notices weights that moved without an optimiser step, which the hooks of optimisers cannot see.

It looks at one layer of an adapter, the first that trains, when that layer runs forward in training. An engine with
optimisers of its own moves the weights past torch's hooks: the method's rules would never run.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankwise.adapters.roster import Roster
from rankwise.adapters.tensors import AdapterTensors
from rankwise.errors import TrainingError
from rankwise.precision import exact
from rankwise.training.later import Later
from rankwise.training.optimizers import holders_of, steps_others


class Watch:
    """What one layer of an adapter looked like when it last ran forward.

    Args:
        roster: the adapter.
    """

    def __init__(self, roster: Roster) -> None:
        self.paused = False
        """While an optimiser step runs, whose closure may run the model: SAM calls it at weights that it has moved."""
        self.saw_backward = False
        """Whether a backward pass has run through the layer since the last step, load or cast."""
        self._roster = roster
        self._tensors: AdapterTensors | None = None
        self._values: Tensor | None = None
        self._edits = -1
        self._answer: Later | None = None  # of a device that was asked whether they moved
        self._two_stage: weakref.ref[Optimizer] | None = None
        self._moved_once = False

    def reset(self) -> None:
        """Forget: what has just changed was a step, or our own doing."""
        self._values, self._answer, self.saw_backward, self._moved_once = None, None, False, False

    def saw_forward(self, tensors: AdapterTensors, output: Tensor) -> None:
        """The layer ran forward in training.

        Raises:
            TrainingError: its weights moved after a backward pass, and no optimiser step was seen.
        """
        if self.paused:
            return
        if self._roster.sharded:  # FSDP2 shows a layer in its forward pass copies of its weights without gradients
            return
        if self._moved(tensors):
            self._check_mover(tensors.trained()[0])
        if output.requires_grad:
            output.register_hook(self._ran_backward)

    def _moved(self, tensors: AdapterTensors) -> bool:
        """Whether the weights are others than before a backward pass that came in between.

        Nothing is asked of the device unless a backward pass has run since the last step, as in steps that accumulate
        gradients. Its answer is looked at when the layer runs again, so that nobody waits for it.
        """
        values = torch.stack([exact(p.detach()).sum() for p in tensors.trained()])
        same_edits = self._tensors is tensors and self._edits == tensors.edits  # no load, cast or start
        known = self._values is not None and same_edits
        moved = known and self.saw_backward and self._differs(values)
        if moved or not known:
            self._answer = None
            self._tensors, self._values, self._edits, self.saw_backward = tensors, values, tensors.edits, False
        return moved

    def _differs(self, values: Tensor) -> bool:
        """Whether these are other values: on a device, whether those were that were asked for last time."""
        differs = (self._values != values).any()
        if values.device.type == "cpu":
            return bool(differs)
        answer, self._answer = self._answer, Later(differs)
        return answer is not None and bool(answer.value())

    def _check_mover(self, parameter: Tensor) -> None:
        """Raise, unless it may be an optimiser that moves weights amid a step, as SAM's `first_step()` does.

        Such an optimiser holds another one, whose step is the one that counts and must come next.
        """
        if not self._moved_once:
            self._moved_once = True
            if self._moves_in_two_stages(parameter):
                return
        holders = holders_of(parameter)
        adapter = self._roster.adapter
        moved = f"the weights of adapter {adapter!r} moved after a backward pass and no optimiser step was seen"
        if holders:
            name = type(holders[0]).__name__
            raise TrainingError(
                f"{moved}: something moved them outside of the step() of their optimiser ({name}), where the method's "
                "rules cannot run"
            )
        raise TrainingError(
            f"{moved}: an engine that bypasses torch's optimiser hooks (DeepSpeed) cannot run the method's rules"
        )

    def _moves_in_two_stages(self, parameter: Tensor) -> bool:
        known = self._two_stage() if self._two_stage is not None else None
        if known is None:
            parameters = {id(p) for p in self._roster.parameters()}
            known = next((o for o in holders_of(parameter) if steps_others(o, parameters)), None)
            self._two_stage = None if known is None else weakref.ref(known)
        return known is not None

    def _ran_backward(self, _: Tensor) -> None:
        self.saw_backward = True
