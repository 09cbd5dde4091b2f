"""Ways to train in which rules would not run, or not do the same on every process: refused at the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from rankwise.adapters.roster import Roster
from rankwise.adapters.tensors import AdapterTensors
from rankwise.errors import TrainingError
from rankwise.methods.base import Method

DEEPSPEED = "DeepSpeed's ZeRO moves flat partitions of weights, where no method's rules can run: take DDP or FSDP2"
MANY_CALLS = "an optimiser that calls its closure many times a step (LBFGS) cannot train an adapter"


def check_whole(roster: Roster, first: AdapterTensors, unmoved: Sequence[Tensor]) -> None:
    """Raise where the rules, which act on whole adapters, would see a part of one.

    Args:
        roster: the adapter.
        first: its tensors on its first layer.
        unmoved: its parameters that the optimiser does not move.
    """
    elsewhere = [p for p in unmoved if p.requires_grad]
    if elsewhere:
        raise TrainingError(
            f"the parameters of adapter {roster.adapter!r} must be in one optimiser; {len(elsewhere)} of them are in "
            "another or in none"
        )
    if any(getattr(first, name).shape != slot.shape for name, slot in first.slots.items()):
        raise TrainingError(
            f"the parameters of adapter {roster.adapter!r} are in pieces, as FSDP1 cuts them: take FSDP2 or DDP"
        )


def check_together(roster: Roster, first: AdapterTensors) -> None:
    """Raise where processes that train together would not find out the same.

    Args:
        roster: the adapter.
        first: its tensors on its first layer.
    """
    if not roster.sharded and any(isinstance(p, DTensor) for p in first.trained()):
        raise TrainingError("FSDP2 shards nothing but the model as a whole: call fully_shard on its blocks first")
    alone = roster.peers is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if alone and (roster.method.scores_ranks or any(slot.from_gradient for slot in first.slots.values())):
        raise TrainingError(
            f"the {dist.get_world_size()} processes cannot agree on what {type(roster.method).__name__} finds out from "
            "data: train with DDP or FSDP2"
        )


def check_needs_no_rate(method: Method) -> None:
    """Raise where rules multiply or divide by a learning rate, and the optimiser's `lr` is not it: see `rates`."""
    if method.uses_rate:
        raise TrainingError(
            f"{type(method).__name__} needs the learning rate at which its tensors move, and this optimiser tells none "
            "(Adadelta; torch's Adafactor; another one with relative_step=True or scale_parameter=True; lr=None; an lr "
            "of 1 or more that is only a factor): give the optimiser `lr` below 1, Adafactor also relative_step=False "
            "and scale_parameter=False, or take torch.optim.AdamW"
        )
