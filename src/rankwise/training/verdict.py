"""Whether a step may move anything, decided by the device itself where the host would have to wait for the answer.

The rule is the same everywhere: gradients that are not finite, or an overflow of the loss scale, move nothing, neither
weights nor an optimiser's state nor anything that rules keep. Somebody must know of it before the weights move.

- On a CPU the host looks at the gradients: it has made them, and waits for nobody.
- On another device, a fused optimiser of torch reads a flag `found_inf` there before it moves anything, as a
  `GradScaler` sets it. The flag is set here too. Rules write under the same flag, and the host counts the step one step
  later, from a copy that it does not wait for.
- Any other optimiser knows of no flag. It may keep what it likes of a step, in Python as well as in tensors, so that
  nothing could be put back for certain: there the host waits for one number a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

BAD, OVERFLOW = 1, 2
"""What a verdict can be, other than 0: the step is one."""


class Verdict(NamedTuple):
    """What the device has found out about one step, for all that its optimiser moves; numbers () in float32."""

    kind: Tensor
    """0, `BAD` or `OVERFLOW`."""
    stops: Tensor
    """1 where nothing may move, else 0: what fused optimisers read."""


def verdict_of(gradients: Sequence[Tensor], found_inf: Tensor | None) -> Verdict:
    """Have the device look at the gradients of a step.

    Args:
        gradients: of its adapters.
        found_inf: what a `GradScaler` has found, where there is one: above 0 for an overflow.
    """
    # The largest entry in size, unlike a norm, is finite wherever all entries are; NaN or infinity times 0 is NaN.
    bad = get_total_norm(gradients, torch.inf).float().mul(0).ne_(0)
    if found_inf is None:
        return Verdict(bad, bad)
    kind = torch.where(found_inf.reshape(()) > 0, OVERFLOW, bad)
    return Verdict(kind, kind.clamp(max=1))


def can_be_left_to_the_device(optimizer: Optimizer) -> bool:
    """Whether an optimiser reads a flag on the device before it moves anything: a fused one of torch's own."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def keep_where_stopped(verdict: Verdict, targets: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """The values, or what the targets hold now where the verdict stops the step.

    A few operations, whatever their number: all of one kind are laid end to end.
    """
    found = list(values)
    kinds = [(value.dtype, value.device) for value in values]
    for kind in dict.fromkeys(kinds):
        dtype, device = kind
        places = [i for i, other in enumerate(kinds) if other == kind]
        new = torch.cat([values[i].reshape(-1) for i in places])
        old = torch.cat([targets[i].detach().reshape(-1) for i in places]).to(dtype)
        stops = verdict.stops.to(device).bool()
        kept = torch.where(stops, old, new).split([values[i].numel() for i in places])
        for i, value in zip(places, kept, strict=True):
            found[i] = value.view(values[i].shape)
    return found
