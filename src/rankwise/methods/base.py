"""What a method is: hyper-parameters, the tensors of a layer, the update they make, and rules at the optimiser step.

A method file subclasses `Method` with a dataclass of its hyper-parameters and overrides what its paper defines. Its
functions go from tensors to tensors; they know neither PEFT nor `nn.Module`. Rules act on `Stack`s, all the layers of
one shape at once. Importing `rankwise.methods` registers every method file there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from rankwise.checks import require_int
from rankwise.schedules import CubicBudget
from rankwise.update import Factors

METHODS: dict[str, type[Method]] = {}
"""Every registered method by its name, in the order of registration."""

M = TypeVar("M", bound="type[Method]")


def register(method: M) -> M:
    """Class decorator of a method file: lists the method, for the command line, the tests and the documentation."""
    METHODS[method.method] = method
    return method


class Size(NamedTuple):
    """The shape of one adapted layer: W is (out, into), the adapter starts with rank r."""

    out: int
    into: int
    r: int


class Slot(NamedTuple):
    """One tensor of a layer's adapter.

    `trained` tensors are parameters, the others buffers; both are saved. `exact` ones (gates, singular values,
    averages) stay float32 whatever the model is cast to, and are free from weight decay. `start_of` names the parameter
    whose start a buffer is.
    """

    shape: tuple[int, ...]
    trained: bool = True
    exact: bool = False
    dtype: torch.dtype = torch.float32
    start_of: str | None = None


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


class Stack:
    """n same-shaped layers at one optimiser step, each tensor stacked to (n, …) when it is first read.

    Args:
        sizes: the shape of each layer.
        values: trained tensors and buffers by name, one per layer.
        gradients: gives, for a trained tensor, each layer's gradient as the optimiser sees it, without the loss scale.
        rates: gives, for a trained tensor, each layer's (learning rate, peak learning rate) at this step.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        values: Mapping[str, Sequence[Tensor]],
        gradients: Callable[[str], Sequence[Tensor]] | None = None,
        rates: Callable[[str], Sequence[tuple[float, float]]] | None = None,
    ) -> None:
        self.sizes = sizes
        self._values, self._gradients, self._rates = values, gradients, rates
        self._read: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            self._read[name] = torch.stack([t.detach() for t in self._values[name]])
        return self._read[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def tensors(self, name: str) -> list[Tensor]:
        """The layers' own tensors, to write to."""
        return list(self._values[name])

    def gradient(self, name: str) -> Tensor:
        """The gradient of a trained tensor, (n, …)."""
        return torch.stack(list(self._gradients(name))) if self._gradients else torch.zeros_like(self[name])

    def rate(self, name: str) -> Tensor:
        """The learning rate of a trained tensor at this step, (n, 1)."""
        return self._column(name, 0)

    def peak(self, name: str) -> Tensor:
        """The peak learning rate of a trained tensor's schedule, (n, 1)."""
        return self._column(name, 1)

    def _column(self, name: str, which: int) -> Tensor:
        pairs = self._rates(name) if self._rates else [(0.0, 0.0)] * len(self)
        return torch.tensor(
            [pair[which] for pair in pairs], dtype=torch.float32, device=self._values[name][0].device
        ).unsqueeze(1)


Updates = list[dict[str, Tensor]]
"""New values of some tensors, one dict per stack; what is not named keeps its value."""


class Penalty(NamedTuple):
    """λR: its value, and its gradient per stack for the tensors it acts on."""

    value: Tensor
    gradients: Updates


@dataclass
class Method:
    """The hyper-parameters every method has, and the questions the rest of the library asks a method."""

    r: int = field(default=8, metadata={"help": "rank of every module at the start; AdaLoRA: the mean at the end"})

    method: ClassVar[str]
    summary: ClassVar[str]
    scaled: ClassVar[bool] = True
    """Whether the update is multiplied by lora_alpha / r."""
    starts_from_weight: ClassVar[bool] = False
    """Whether `start` reads the base weight."""
    cancels: ClassVar[bool] = False
    """Whether the update is a small difference of large factors, which an export must take in float64."""

    def check(self) -> None:
        """Raise `ArgumentError` for the first hyper-parameter that breaks its rule. Runs whenever a config is made."""
        require_int("r", self.r, least=1)

    @property
    def start_rank(self) -> int:
        """The rank of the tensors a layer starts with, where no rank_pattern names the layer."""
        return self.r

    @property
    def final_rank(self) -> int:
        """The mean rank a run ends with, where the method has a schedule for it."""
        return self.r

    def slots(self, size: Size) -> dict[str, Slot]:
        """The tensors of one layer's adapter. B (out, r) and A (r, into) unless overridden."""
        return {"A": Slot((size.r, size.into)), "B": Slot((size.out, size.r))}

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """First values of the tensors, float32, those that start at 0 left out.

        Args:
            size: the layer's shape.
            weight: gives the base weight (out, into), float32; called only where `starts_from_weight`.
            zero: False asks for a clearly non-zero random update instead of the method's own start.
        """
        start = {"A": kaiming_uniform(size.r, size.into)}
        return start if zero else start | {"B": kaiming_uniform(size.out, size.r)}

    def factors(self, t: Mapping[str, Tensor], scale: float) -> Factors:
        """The update the tensors of one layer, or of a stack, make; `scale` is lora_alpha / r."""
        return Factors(t["B"], t["B"].new_full(t["B"].shape[:-2] + t["B"].shape[-1:], scale), t["A"])

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """Which ranks the method has not pruned, a boolean (…, r)."""
        rows = t["A"]
        return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)

    def needs(self, step: Step) -> str | None:
        """What the method cannot run without and was not told, as the end of "needs …"; None if nothing is missing."""
        return None

    def advice(self, stacks: Sequence[Stack], step: Step) -> str | None:
        """A sentence of warning for a run that cannot do what the method is for, asked at the first step."""
        return None

    def ratio(self, tensor: str, peak: float) -> float:
        """What the optimiser's move of a tensor is multiplied by, for tensors with a learning rate of their own."""
        return 1.0

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """What is added to the loss, as a gradient: once per optimiser step, after clipping."""
        return None

    def before_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """Runs once the gradients are complete, before the optimiser moves the weights."""
        return []

    def after_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """Runs after the optimiser moved the weights."""
        return []

    def final_step(self, total: int | None) -> int | None:
        """The step from which the kept ranks no longer change; None for a method without such a step."""
        return None

    def budget(self, sizes: Sequence[Size], total: int | None) -> CubicBudget | None:
        """The schedule of ranks over all layers in a run of `total` steps; None for a method without one."""
        return None

    def finalize(self, stacks: Sequence[Stack]) -> Updates:
        """The final budget applied now, for a run that stopped before its schedule ended."""
        return []


def kaiming_uniform(rows: int, columns: int) -> Tensor:
    """PEFT's start of LoRA's A: uniform on ±1/√columns (Kaiming with a = √5)."""
    return torch.nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5))
