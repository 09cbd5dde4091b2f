"""Second moments of layer inputs, used to weight truncation errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.errors import ArgumentError
from rankwise.precision import exact

WIDEST = 4096
"""Inputs up to which second moments are taken in full where asked: 128 MiB a module."""


@torch.no_grad()
def second_moments_of(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor] | Tensor], modules: Iterable[str], *, full: bool = False
) -> dict[str, Tensor]:
    """The second moments of what a model's layers read, by module name, in float64.

    E[x xᵀ] (in, in) where `full` is asked and in ≤ 4096, else its diagonal E[x²] (in,). x is a convolution's patch, an
    embedding's one-hot id (diagonal anyway); positions that a batch's attention_mask hides are left out.

    Args:
        model: the base model, on the device of its batches.
        batches: each is passed as keywords, or as the one argument if it is a tensor.
        modules: names of linear layers, convolutions and embeddings.
        full: whole moments, not diagonals.

    Raises:
        ArgumentError: the model has no such module, or no batch reaches it.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(2, 1)), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> second_moments_of(net, [x], ["0"])["0"].tolist()
        [5.0, 2.0]
    """
    layers, names = dict(model.named_modules()), list(modules)
    unknown = [name for name in names if name not in layers]
    if unknown:
        raise ArgumentError("modules", "name modules of the model", unknown[0])
    sums: dict[str, Tensor] = {}
    seen = dict.fromkeys(names, 0)
    mask: Tensor | None = None

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total, count = _summed(layer, inputs[0], mask, full)
        sums[name], seen[name] = sums[name] + total if name in sums else total, seen[name] + count

    hooks = [layers[name].register_forward_pre_hook(partial(add, name)) for name in names]
    try:
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    silent = [name for name in names if not seen[name]]
    if silent:
        raise ArgumentError("batches", "reach every module", silent[0])
    return {name: (sums[name] / seen[name]).cpu() for name in names}


def _summed(layer: Any, x: Tensor, mask: Tensor | None, full: bool) -> tuple[Tensor, int]:
    """Σ x xᵀ or its diagonal over the inputs of one call, and how many they are."""
    if isinstance(layer, nn.Conv2d):
        padded = F.pad(x, layer._reversed_padding_repeated_twice)
        x = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).mT
    elif mask is not None and x.shape[:2] == mask.shape:
        x = x[mask.bool()]
    if isinstance(layer, nn.Embedding):
        return exact(torch.bincount(x.flatten(), minlength=layer.num_embeddings)), x.numel()
    rows = exact(x.flatten(0, -2))
    return rows.mT @ rows if full and rows.shape[1] <= WIDEST else rows.square().sum(0), len(rows)
