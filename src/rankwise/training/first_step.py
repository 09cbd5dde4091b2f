"""What is looked at once in a run, when an optimiser first steps after an adapter has run: does the adapter train?

Scripts written for PEFT's LoRA may look for "lora" in the names of parameters, which these adapters do not have. They
then freeze the adapter, leave it out of the optimiser, or give it other rates than they mean, all without an error.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import base_name
from rankwise.adapters.roster import Roster, living_rosters
from rankwise.errors import TrainingError

PATIENCE = 10
"""Steps of other optimisers that an adapter with gradients may wait for its first one, where it is not plain at once
that none will come: an optimiser that holds its parameters exists, or those that have stepped train other models."""
NAMES = 'the names of its parameters do not contain "lora", which code for other adapters looks for'
LORA_FA = (
    'PEFT\'s LoRA-FA optimiser finds A by "lora_A" in the names of parameters and would train all of this adapter: '
    'call requires_grad_(False) on the parameters whose names end in ".A", and take torch.optim.AdamW'
)

_looked_at: weakref.WeakSet[Roster] = weakref.WeakSet()
_waited: weakref.WeakKeyDictionary[Roster, int] = weakref.WeakKeyDictionary()
_installed = False


def install() -> None:
    """Look at every optimiser's first step, once per process."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        _installed = True


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for roster in living_rosters():
        if roster not in _looked_at and _has_run(roster):
            _look_at(roster, optimizer)


def _has_run(roster: Roster) -> bool:
    """Whether the adapter is active and a training pass has met it: a layer has run, or all have been passed by."""
    layers = roster.layers
    if not layers or layers[0].disable_adapters or roster.adapter not in layers[0].active_adapters:
        return False
    met = [layer.passed_by for layer in layers]
    return any(passed_by is False for passed_by in met) or all(met)


def _look_at(roster: Roster, optimizer: Optimizer) -> None:
    """Warn of an adapter that does not train as it seems to.

    Raises:
        TrainingError: the optimiser is PEFT's LoRA-FA.
    """
    moved = _held_by(optimizer)
    trainable = [p for p in roster.parameters() if p.requires_grad]
    if any(id(p) in moved for p in trainable):
        _looked_at.add(roster)
        if isinstance(optimizer, LoraFAOptimizer):
            raise TrainingError(LORA_FA)
        _warn_of_empty_groups(roster, optimizer)
        _warn_of_layers_passed_by(roster)
    elif trainable:
        if any(p.grad is not None for p in trainable):
            _wait(roster, moved, trainable)
    elif _trains_in_model(roster, moved):
        _looked_at.add(roster)
        if not _beside_a_trained_one(roster):
            warnings.warn(
                f"nothing of the active adapter {roster.adapter!r} trains: none of its parameters requires a gradient "
                f"({NAMES}; an adapter that was loaded trains with is_trainable=True)",
                stacklevel=2,
            )


def _wait(roster: Roster, moved: set[int], trainable: list[nn.Parameter]) -> None:
    """Warn of an adapter with gradients that is in no optimiser: at once where that is plain, else after a while."""
    waited = _waited[roster] = _waited.get(roster, 0) + 1
    if waited == PATIENCE or (_trains_in_model(roster, moved) and not _in_an_optimiser(trainable)):
        _looked_at.add(roster)
        warnings.warn(
            f"nothing of the active adapter {roster.adapter!r} trains: no optimiser that has stepped holds its "
            f"parameters ({NAMES})",
            stacklevel=2,
        )


def _held_by(optimizer: Optimizer) -> set[int]:
    """The ids of an optimiser's parameters; of one whose making has failed, none."""
    groups = getattr(optimizer, "param_groups", ())
    return {id(p) for group in groups for p in group["params"]}


def _in_an_optimiser(parameters: list[nn.Parameter]) -> bool:
    """Whether any optimiser in the process holds one of them: it may step later.

    Optimisers keep no list of themselves, so that the garbage collector's is searched. Its objects are asked for their
    type alone, since some would do work (lazy imports) when asked for more.
    """
    living = (thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer))
    wanted = {id(p) for p in parameters}
    return any(not wanted.isdisjoint(_held_by(optimizer)) for optimizer in living)


def _trains_in_model(roster: Roster, moved: set[int]) -> bool:
    """Whether the optimiser trains anything of the adapter's model."""
    return roster.model is not None and any(p.requires_grad and id(p) in moved for p in roster.model.parameters())


def _beside_a_trained_one(roster: Roster) -> bool:
    """Whether another active adapter of the same model trains, beside which this one may be frozen on purpose."""
    others = (other for other in living_rosters() if other is not roster and other.model is roster.model)
    return any(_has_run(other) and any(p.requires_grad for p in other.parameters()) for other in others)


def _warn_of_empty_groups(roster: Roster, optimizer: Optimizer) -> None:
    """PEFT's `create_loraplus_optimizer` makes a group of a higher rate for "lora_B", of which it then finds none."""
    rates = {_rate(group) for group in optimizer.param_groups if group["params"]}
    if any(not group["params"] and _rate(group) not in rates for group in optimizer.param_groups):
        warnings.warn(
            f"a group of the optimiser that has a learning rate of its own is empty, and adapter {roster.adapter!r} "
            f"trains without that rate: {NAMES}; for LoRA+, pass rankwise.loraplus_groups(model, …) to the optimiser",
            stacklevel=2,
        )


def _rate(group: dict[str, Any]) -> float | None:
    """A group's learning rate without its schedule; warm-up may begin at 0 in all groups."""
    rate = group.get("initial_lr", group.get("lr"))
    return None if rate is None else float(rate)


def _warn_of_layers_passed_by(roster: Roster) -> None:
    """`nn.MultiheadAttention` and fused kernels multiply by the weight of a layer and never run it."""
    modules = roster.model.named_modules() if roster.model is not None else ()
    own = [(base_name(name), m) for name, m in modules if isinstance(m, AdapterLayer) and roster.adapter in m.rosters]
    names = [name for name, layer in own if layer.passed_by]
    if names:
        warnings.warn(
            f"the model reads the weights of {len(names)} adapted layers and does not run them, so that their updates "
            f"neither act nor train (leave them out with exclude_modules): {', '.join(names[:3])}"
            f"{', …' if len(names) > 3 else ''}",
            stacklevel=2,
        )
