"""Gradients of an adapter at an optimiser step, whole or spread over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from rankwise.shards import part, part_of, whole


@torch.no_grad()
def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether every gradient is finite; reads one number back from the device if so."""
    if bool(whole(get_total_norm(gradients)).isfinite()):
        return True
    return all(bool(whole(g).isfinite().all()) for g in gradients)  # the norm of finite numbers may be infinite


@torch.no_grad()
def any_nonzero(gradients: Sequence[Tensor]) -> bool:
    """Whether any gradient is not zero; reads one number back from the device."""
    largest = whole(get_total_norm(gradients, torch.inf))
    return bool(largest != 0)


def unscaled(parameters: Sequence[Tensor], scale: Tensor | None) -> list[Tensor]:
    """The gradient of every parameter without the loss scale, zeros where the loss gave none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return found if scale is None else [g / scale for g in found]


def add_to_gradients(parameters: Sequence[Tensor], more: Sequence[Tensor]) -> None:
    """Add a whole tensor to the gradient of each parameter, also of one that the loss did not reach."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if parameters:
        own = [part_of(value, p) for p, value in zip(parameters, more, strict=True)]
        torch._foreach_add_([part(p.grad) for p in parameters], own)  # type: ignore[arg-type]
