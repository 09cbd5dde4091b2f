"""What the analyses accept: real, finite tensors, read in float64."""

from __future__ import annotations

from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.precision import exact


def matrices(argument: str, value: Tensor) -> Tensor:
    """`value` (…, m, n), detached, in float64 where the device has it; raises unless m, n ≥ 1 and all is finite."""
    if value.ndim < 2 or 0 in value.shape[-2:]:
        raise ArgumentError(argument, "be a matrix or a stack of matrices (…, m, n) with m, n ≥ 1", tuple(value.shape))
    return finite(argument, value)


def finite(argument: str, value: Tensor) -> Tensor:
    """`value`, detached, in float64 where the device has it; raises where an entry is not a finite number."""
    value = value.detach()
    wrong = ~value.isfinite()
    if wrong.any():
        raise ArgumentError(argument, "hold finite numbers only", float(value[wrong][0]))
    return exact(value)
