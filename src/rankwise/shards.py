"""Tensors that are spread over processes, as FSDP2 keeps parameters: DTensors, of which each process holds a part.

Rules need whole matrices (`torch.linalg` of a shard is wrong), so layers of one shape are gathered in one exchange;
what a rule writes is the same on every process, and each writes its own part. Plain tensors are whole and a part of
their own, and pass through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def whole(t: Tensor) -> Tensor:
    """A tensor from its parts; every process must ask."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def part(t: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return t.to_local() if isinstance(t, DTensor) else t


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Whole tensors of one shape as (n, …)."""
    first = tensors[0]
    found = torch.stack([part(t.detach()) for t in tensors])
    if not isinstance(first, DTensor):
        return found
    placements = [Shard(p.dim + 1) if isinstance(p, Shard) else p for p in first.placements]
    shape = torch.Size((len(tensors), *first.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(found, first.device_mesh, placements, shape=shape, stride=stride).full_tensor()


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole value that this process holds of a tensor spread as `like` is; nothing is exchanged."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy whole values into tensors, all of one dtype at once."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in zip(targets, values, strict=True):
        own, new = by_dtype.setdefault(value.dtype, ([], []))
        own.append(part(target.detach()))
        new.append(part_of(value, target))
    for own, new in by_dtype.values():
        torch._foreach_copy_(own, new)
