"""Notices what the optimiser hooks cannot: gradients that were dropped without a step, and weights moved without one.

It looks at one layer of an adapter, the first, when that layer runs forward in training. A plain optimiser under a
GradScaler is not called at all on overflow: its gradients vanish between two forward passes. An engine with optimisers
of its own moves the weights past torch's hooks: rules would never run.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from rankwise.adapters.tensors import AdapterTensors
from rankwise.precision import exact


class Seen(Enum):
    """What happened since the last step, load or cast."""

    NOTHING = "nothing new, or gradients still accumulating"
    DROPPED = "gradients came and were dropped without a step"
    MOVED = "gradients came and the weights moved without a step"


class Watch:
    """What one layer looked like when it last ran forward."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._edits = -1
        self._backward = False

    def reset(self) -> None:
        """Forget: what has just changed was a step, or our own doing."""
        self._values, self._backward = None, False

    def forward(self, tensors: AdapterTensors, output: Tensor) -> Seen:
        """Look, at a training forward whose output is `output`.

        Nothing is read back from the device unless a backward pass has run since the last step.
        """
        values = torch.stack([exact(p.detach()).sum() for p in tensors.trained()])
        seen = self._compare(tensors, values) if self._backward and self._edits == tensors.edits else Seen.NOTHING
        if seen is not Seen.NOTHING or self._values is None or self._edits != tensors.edits:
            self._values, self._edits, self._backward = values, tensors.edits, False
        if output.requires_grad:
            output.register_hook(self._ran_backward)
        return seen

    def _compare(self, tensors: AdapterTensors, values: Tensor) -> Seen:
        if self._values is not None and not torch.equal(self._values, values):
            return Seen.MOVED
        gradients = [p.grad for p in tensors.trained() if p.grad is not None]
        # Tensors that wait for their start are 0, and so are all gradients.
        held = bool(gradients) if tensors.awaits_gradient else any(bool(g.any()) for g in gradients)
        return Seen.NOTHING if held else Seen.DROPPED

    def _ran_backward(self, _: Tensor) -> None:
        self._backward = True
