"""Layers of one shape put together, so that they are decomposed at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from rankwise.errors import ArgumentError
from rankwise.spectral.inputs import finite
from rankwise.update import Factors

TOGETHER = 64 * 2**20
"""Bytes of factors in float64 that are put together at most: a large model's layers make several stacks."""


def stacks_of(updates: Mapping[str, Factors]) -> Iterator[list[str]]:
    """The names of layers of one shape and device, as many together as may be decomposed at once.

    Raises:
        ArgumentError: an update is of a stack of layers already; the message names it.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, update in updates.items():
        if update.B.ndim != 2:
            shape = tuple(update.B.shape)
            raise ArgumentError(f"updates[{name!r}]", "be the Factors of one layer", f"B of shape {shape}")
        groups.setdefault((update.B.shape, update.A.shape, update.B.device), []).append(name)
    for names in groups.values():
        first = updates[names[0]]
        bytes_each = 8 * (first.B.numel() + first.A.numel())
        several = max(1, TOGETHER // max(1, bytes_each))
        for start in range(0, len(names), several):
            yield names[start : start + several]


def stacked(argument: str, names: Sequence[str], updates: Mapping[str, Factors]) -> Factors:
    """The Factors of some layers of one shape as one stack, in float64.

    Raises:
        ArgumentError: a factor holds a NaN or infinity; the message names the layer.
    """
    layers = [[finite(f"{argument}[{name!r}]", t) for t in updates[name]] for name in names]
    return Factors(*(torch.stack(tensors) for tensors in zip(*layers, strict=True)))
