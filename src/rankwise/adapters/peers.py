"""The processes that train one adapter together, where what they compute on their own parts of the data must agree.

Gradients are averaged by DDP and FSDP2 themselves. What rules learn outside an ordinary backward pass is not: the
gradient that tells Deep LoRA's start, ALoRA's scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel


def peers_of(model: nn.Module | None) -> Any:
    """The group of processes that run a forward pass of this model now: its DDP's, or all where FSDP2 shards it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        return wrapper.process_group
    return dist.group.WORLD if is_sharded(model) else None


def is_sharded(model: nn.Module | None) -> bool:
    """Whether FSDP2 shards any part of it."""
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def share(tensors: Sequence[Tensor], peers: Any) -> None:
    """Give every process of a group what its first one holds."""
    with torch.no_grad():
        for tensor in tensors:
            dist.broadcast(tensor, group=peers, group_src=0)


def mean(value: Tensor, peers: Any) -> Tensor:
    """The mean over the processes of a group; the value itself where there is none."""
    if peers is None:
        return value
    total = value.clone()
    dist.all_reduce(total, group=peers)
    return total / dist.get_world_size(peers)


def mean_by(value: Tensor, weight: float, peers: Any) -> Tensor:
    """The mean over the processes of a group, each of a weight of its own."""
    if peers is None:
        return value
    weights = mean(torch.tensor(weight, dtype=torch.float64, device=value.device), peers)
    return mean(value * weight, peers) / weights.to(value.dtype)
