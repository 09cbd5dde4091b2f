"""Tensors within what modules give and take: nested tuples, lists and dicts, repeated for ranks that share a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from rankwise.training.aside import Batch


def samples_of(batch: Batch) -> int:
    """How many samples a batch holds: the first dimension of its first tensor."""
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim())


def over_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` applied to the tensors of nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({key: over_tensors(item, change) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(over_tensors(item, change) for item in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All of them, in order."""
    found: list[Tensor] = []
    over_tensors(value, lambda t: found.append(t) or t)
    return found


def repeat_batch(batch: Batch, copies: int, samples: int) -> dict[str, Any]:
    """Copies behind one another of every input with one row per sample."""
    found = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == samples:
            found[key] = value.repeat(copies, *[1] * (value.dim() - 1))
    return found


def repeat(value: Any, copies: int, grows: Sequence[bool]) -> Any:
    """Copies behind one another of the tensors that grow with the batch; one copy is the recorded tensor itself."""
    if copies == 1:
        return value
    flags = iter(grows)
    return over_tensors(value, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)) if next(flags) else t)


def copy_of(value: Any, k: int, copies: int, grows: Sequence[bool]) -> Any:
    """Copy k of what was repeated."""
    flags = iter(grows)
    return over_tensors(value, lambda t: t.chunk(copies)[k] if next(flags) else t)
