"""What can be found out about torch's optimisers: what they move, which of them run now, which of them step another."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

Groups = dict[int, dict[str, Any]]
"""The optimiser's parameter group of every parameter it moves, by the parameter's id at this step."""

AROUND_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
"""The code that torch puts around the `step()` of every class of optimisers, to call the hooks; it is one for all."""


def groups_of(optimizer: Any) -> Groups:
    """The parameter group of every parameter of an optimiser."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def running_optimizers() -> list[Optimizer]:
    """The optimisers whose `step()` this thread is inside of, outermost first; one that calls itself is there twice.

    The Python stack tells it. Hooks alone cannot: torch calls no hook after a step that raised.
    """
    found: list[Optimizer] = []
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is AROUND_STEP:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found[::-1]


def steps_others(optimizer: Optimizer, adapter_parameters: set[int]) -> bool:
    """Whether an optimiser leaves the parameters of adapters to optimisers that it holds, as Lookahead and SAM do.

    Args:
        optimizer: the optimiser.
        adapter_parameters: the ids of the adapters' parameters.
    """
    left_to_others: set[int] = set()
    for inner in held_by(optimizer):
        left_to_others |= groups_of(inner).keys()
    if not left_to_others:
        return False
    own = adapter_parameters & groups_of(optimizer).keys()
    return bool(own) and own <= left_to_others


def held_by(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Other optimisers among an optimiser's attributes, or in a list or dictionary there."""
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults"):  # torch's own, which hold tensors and numbers
            continue
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (other for other in values if isinstance(other, Optimizer) and other is not optimizer)


def holders_of(parameter: Tensor) -> list[Optimizer]:
    """The living optimisers that move a parameter and whose steps torch's hooks see.

    This looks at every object of the process, which takes a good part of a second: it is for finding out what went
    wrong, and for nothing that happens at every step.
    """
    # By type() and not by isinstance(), which asks objects for their __class__: some import a package then.
    optimizers: list[Any] = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    hooked = [o for o in optimizers if getattr(type(o).step, "__code__", None) is AROUND_STEP]
    return [optimizer for optimizer in hooked if id(parameter) in groups_of(optimizer)]
