"""Optimisers that keep an average of the weights beside a base step: Defazio et al., "The Road Less Scheduled", 2024.

A schedule-free optimiser (arXiv 2405.15682) has three sequences of weights: z takes the base optimiser's steps, x is an
average of z, and gradients are taken at y = (1 − β)·z + β·x. A parameter holds y in training and x in evaluation; the
optimiser's `train()` and `eval()` exchange them. z is in the optimiser's state. (`ScheduleFreeWrapper` steps an inner
optimiser while the parameter holds z and the state holds x.)

A rule sees the parameter only, so two things are done for the others:

- An entry that a rule has set to a value has that value in every sequence: a pruned rank is 0 in x, y and z.
- Gates, singular values and what has a learning rate of its own follow z alone, without an average. An average of a
  gate that was ever open is never 0, and y moves by another rate than the optimiser's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.methods.stack import Stack, Updates
from rankwise.shards import part, stacked, write

OTHER = "z"
"""The other sequence, by its name in the optimiser's state."""
Group = Mapping[str, Any]
State = Mapping[Any, dict[str, Any]]
"""What an optimiser remembers, by parameter."""


def holds_average(group: Group) -> bool:
    """Whether a step moves the parameters of a group as y, a mixture of the average and of the base step."""
    return "weight_sum" in group and ("scheduled_lr" in group or "train_mode" in group)


def set_in_both(stacks: Sequence[Stack], updates: Updates, state: State, groups: Mapping[int, Group]) -> None:
    """Give the entries that a rule is about to change their new value in the other sequence, too.

    Args:
        stacks: the layers, with their values before the rule's.
        updates: the rule's new values.
        state: what the optimiser remembers.
        groups: its groups, by the ids of the parameters in them.
    """
    if not any("weight_sum" in group for group in groups.values()):
        return
    for stack, update in zip(stacks, updates, strict=False):
        for name, value in update.items():
            parameters = stack.tensors(name)
            # A parameter that has had no gradient yet has no other sequence: it is written to in its place.
            others = [state[p].get(OTHER, p) if p in state and id(p) in groups else p for p in parameters]
            changed = value != stack[name]
            write(others, list(torch.where(changed, value, stacked(others)).unbind(0)))


def restart(parameters: Sequence[Tensor], state: State) -> None:
    """Begin both sequences at the value that the parameters have just been given."""
    for p in parameters:
        if p in state and OTHER in state[p]:
            part(state[p][OTHER]).copy_(part(p.detach()))


class BaseStep:
    """Where the base step of some parameters was before the optimiser's step."""

    def __init__(self, shown: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        """Remember z; where there is none yet, the optimiser will start it at the value that it is shown."""
        self._states = states
        self._before = [part(state.get(OTHER, value)).clone() for state, value in zip(states, shown, strict=True)]

    def settle(self, data: list[Tensor], old: list[Tensor], ratio: float) -> None:
        """p ← p_old + ratio·(z − z_old), and z ← p."""
        z = [part(state.get(OTHER, was)) for state, was in zip(self._states, self._before, strict=True)]
        moved = torch._foreach_sub(z, self._before)
        torch._foreach_mul_(moved, ratio)
        torch._foreach_add_(moved, old)
        torch._foreach_copy_(data, moved)
        torch._foreach_copy_(z, moved)
