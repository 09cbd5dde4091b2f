"""Where derivatives written by hand may stand in for autograd's, and how they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad


def by_hand() -> bool:
    """Not in a graph that is compiled, traced or transformed by torch.func, nor for forward-mode derivatives."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a backward pass that may be called within autocast: its dtypes are those of the forward pass."""

    @wraps(backward)
    def run(ctx: Any, *gradients: torch.Tensor) -> Any:
        device = gradients[0].device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *gradients)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *gradients)

    return run
