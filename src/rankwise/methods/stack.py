"""What a rule sees: the layers of one shape, stacked, at one optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.shards import part, part_of, stacked

CLOSED = "closed"
"""The buffer of a method that prunes: booleans (r,), the ranks that it holds at zero for now, or for good."""


class Size(NamedTuple):
    """The shape of one adapted layer: W is (out, into), the adapter's tensors hold r ranks."""

    out: int
    into: int
    r: int
    start: int = 0
    """Ranks in use at the start, where they are fewer than r; 0: all of them."""

    @property
    def started(self) -> int:
        """Ranks in use at the start."""
        return self.start or self.r


class Slot(NamedTuple):
    """One tensor of a layer's adapter.

    `trained` tensors are parameters, the others buffers; both are saved. `exact` ones (gates, singular values,
    averages) stay float32 whatever the model is cast to, and are free from weight decay. `start_of` names the parameter
    whose start a buffer is. `from_gradient` tensors are 0 until the first step gives them their start.
    """

    shape: tuple[int, ...]
    trained: bool = True
    exact: bool = False
    dtype: torch.dtype = torch.float32
    start_of: str | None = None
    from_gradient: bool = False


def closed_slot(size: Size) -> dict[str, Slot]:
    """The slot of `CLOSED`; at the start no rank is closed."""
    return {CLOSED: Slot((size.r,), trained=False, dtype=torch.bool)}


@dataclass(frozen=True)
class Step:
    """Where a run stands when rules run."""

    number: int
    """Attempted optimiser steps of this adapter, this one included: 1, 2, …"""
    last: int
    """The number of the last step whose rules ran; 0 before the first."""
    total: int | None
    """Steps of the whole run, None where nobody told."""
    finalized: bool = False
    """Whether the final budget was applied by hand, so that the kept ranks no longer change."""
    epoch: int | None = None
    """Steps of one pass over the training data, None where nobody told."""
    rate_estimated: bool = False
    """Whether the optimiser is still estimating its learning rate (Prodigy), which may grow by orders of magnitude."""
    ablate: Callable[[], Ablation] | None = None
    """Scores the model with single ranks left out or alone; None where no development data is known."""


class Ablation(NamedTuple):
    """Scores of the model on the development batch, higher is better; one (n, r) tensor per stack."""

    whole: float
    """With every rank in use."""
    without: list[Tensor]
    """With one rank left out; NaN for a rank that is not in use."""
    alone: list[Tensor]
    """With one rank of all modules in use; NaN for a rank that is not."""


class Stack:
    """n same-shaped layers at one optimiser step, each tensor stacked to (n, …) when it is first read.

    Args:
        sizes: the shape of each layer.
        values: trained tensors and buffers by name, one per layer.
        gradients: gives, for a trained tensor, each layer's gradient as the optimiser sees it, without the loss scale.
        rates: gives, for a trained tensor, each layer's (learning rate, peak learning rate) at this step.
        moments: gives, for a trained tensor, what the optimiser remembers of it: tensors of its shape, per layer.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        values: Mapping[str, Sequence[Tensor]],
        gradients: Callable[[str], Sequence[Tensor]] | None = None,
        rates: Callable[[str], Sequence[tuple[float, float]]] | None = None,
        moments: Callable[[str], Sequence[Sequence[Tensor]]] | None = None,
    ) -> None:
        self.sizes = sizes
        self._values, self._gradients, self._rates, self._moments = values, gradients, rates, moments
        self._read: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = stacked(self._values[name])
        return self._read[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def tensors(self, name: str) -> list[Tensor]:
        """The layers' own tensors, to write to."""
        return list(self._values[name])

    def gradient(self, name: str) -> Tensor:
        """The gradient of a trained tensor, (n, …)."""
        return stacked(self._gradients(name)) if self._gradients else torch.zeros_like(self[name])

    def forget(self, name: str, entries: Tensor) -> None:
        """Zero what the optimiser remembers of some entries of a trained tensor: booleans that broadcast to (n, …)."""
        for moments, mask in zip(self._moments(name) if self._moments else [], entries, strict=False):
            for moment in moments:
                part(moment).masked_fill_(part_of(mask.expand(moment.shape), moment), 0)

    def rate(self, name: str) -> Tensor:
        """The learning rate of a trained tensor at this step, (n, 1)."""
        return self._column(name, 0)

    def peak(self, name: str) -> Tensor:
        """The peak learning rate of a trained tensor's schedule, (n, 1)."""
        return self._column(name, 1)

    def _column(self, name: str, which: int) -> Tensor:
        found = [pair[which] for pair in self._rates(name)] if self._rates else [0.0] * len(self)
        device = self._values[name][0].device
        if len(set(found)) == 1:  # as good as always: filled in on the device, where a list would be copied to it
            return torch.full((len(found), 1), found[0], dtype=torch.float32, device=device)
        return torch.tensor(found, dtype=torch.float32, device=device).unsqueeze(1)


Updates = list[dict[str, Tensor]]
"""New values of some tensors, one dict per stack; what is not named keeps its value."""


class Penalty(NamedTuple):
    """λR: its value, and its gradient per stack for the tensors it acts on."""

    value: Tensor
    gradients: Updates
