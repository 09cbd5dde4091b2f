"""What a method is: hyper-parameters, the tensors of a layer, the update they make, and rules at the optimiser step.

A method file subclasses `Method` with a dataclass of its hyper-parameters and overrides what its paper defines. Its
functions go from tensors to tensors; they know neither PEFT nor `nn.Module`. Rules act on `Stack`s, all the layers of
one shape at once. Importing `rankwise.methods` registers every method file there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from rankwise.checks import require_int
from rankwise.errors import ArgumentError
from rankwise.methods.stack import CLOSED, Penalty, Size, Slot, Stack, Step, Updates
from rankwise.schedules import CubicBudget
from rankwise.update import Factors, Parts

METHODS: dict[str, type[Method]] = {}
"""Every registered method by its name, in the order of registration."""

M = TypeVar("M", bound="type[Method]")


def register(method: M) -> M:
    """Class decorator of a method file: lists the method, for the command line, the tests and the documentation."""
    METHODS[method.method] = method
    return method


@dataclass
class Method:
    """The hyper-parameters every method has, and the questions the rest of the library asks a method."""

    r: int = field(default=8, metadata={"help": "rank of every module at the start; AdaLoRA: the mean at the end"})

    method: ClassVar[str]
    config_name: ClassVar[str]
    """Of its config class in `rankwise`, which cannot be asked without importing PEFT."""
    summary: ClassVar[str]
    scaled: ClassVar[bool] = True
    """Whether the update is multiplied by lora_alpha / r."""
    starts_from_weight: ClassVar[bool] = False
    """Whether `start` reads the base weight."""
    linear_only: ClassVar[bool] = False
    """Whether convolutions and embeddings are refused: the method is not of LoRA's form B·diag·A with free A and B."""
    cancels: ClassVar[bool] = False
    """Whether the update is a small difference of large factors, which an export must take in float64."""
    negligible: ClassVar[float] = 0.0
    """Share of the whole adapter's ‖ΔW‖_F that an export may leave out to drop ranks that hold next to nothing."""
    caches_frozen_part: ClassVar[bool] = False
    """Whether layers shall keep a copy of their base weight with the frozen part added."""
    scores_ranks: ClassVar[bool] = False
    """Whether rules run the model on development data."""
    closing_values: ClassVar[Mapping[str, float]] = {}
    """The trained tensors (r,) that close a rank, each with the value at which it does."""
    uses_rate: ClassVar[bool] = False
    """Whether rules multiply or divide by the learning rate, so that the optimiser must tell it."""
    refuses_updates: ClassVar[str | None] = None
    """Why no given update can be its start, where that is so."""
    suggested_rate: ClassVar[float]
    """Peak learning rate for AdamW at the default fields: the best on validation data in `bench/learning_rates.py`."""

    def check(self) -> None:
        """Raise `ArgumentError` for the first hyper-parameter that breaks its rule. Runs whenever a config is made."""
        require_int("r", self.r, least=1)

    def suggest_rate(self) -> float:
        """The peak learning rate for AdamW where nobody chose one, with these hyper-parameters."""
        return self.suggested_rate

    @property
    def start_rank(self) -> int:
        """The rank of the tensors a layer starts with, where no rank_pattern names the layer."""
        return self.r

    @property
    def final_rank(self) -> float:
        """The mean rank a run ends with, where the method has a schedule for it."""
        return self.r

    def capacity(self, r: int) -> int:
        """The ranks a layer's tensors hold, r of them in use at the start."""
        return r

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

    prepared_from: ClassVar[tuple[str, ...]] = ()
    """The tensors that `prepare` reads; none where it has nothing to do."""

    prepares_on_cpu: ClassVar[bool] = True
    """Whether that is worth it on a CPU too, where it saves little but takes copies of the tensors."""

    def prepare(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a training pass makes of tensors before it multiplies by them, of one layer or of a stack, by new names.

        Made for all layers at once where that can be; `training_parts` finds it among the tensors then.
        """
        return {}

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """The update the tensors of one layer, or of a stack, make, but for lora_alpha / r."""
        return Parts(t["B"], None, t["A"])

    def training_parts(self, t: Mapping[str, Tensor]) -> Parts:
        """As `parts`, in a training forward: another update where gates are drawn at random."""
        return self.parts(t)

    def evaluation_parts(self, t: Mapping[str, Tensor]) -> Parts:
        """As `parts`, in evaluation, in what is merged and in what is exported: without the ranks that are closed.

        A closed rank is 0 in its parameters too, unless something outside of the optimiser's step (an average of the
        weights, an interpolation) has moved them since.
        """
        B, s, A = self.parts(t)
        if CLOSED not in t:
            return Parts(B, s, A)
        return Parts(B, torch.where(t[CLOSED], 0, torch.ones_like(B[..., 0, :]) if s is None else s), A)

    def factor_of(self, scale: float) -> float:
        """What multiplies the update: `scale`, which is lora_alpha / r, or 1 for a method without it."""
        return scale if self.scaled else 1.0

    def factors(self, t: Mapping[str, Tensor], scale: float) -> Factors:
        """The update with every scale folded in; `scale` is lora_alpha / r."""
        return self.parts(t).scaled(self.factor_of(scale))

    def training_factors(self, t: Mapping[str, Tensor], scale: float) -> Factors:
        """As `factors`, in a training forward."""
        return self.training_parts(t).scaled(self.factor_of(scale))

    def evaluation_factors(self, t: Mapping[str, Tensor], scale: float) -> Factors:
        """As `factors`, in evaluation."""
        return self.evaluation_parts(t).scaled(self.factor_of(scale))

    def moving_factors(self, t: Mapping[str, Tensor], scale: float) -> Factors:
        """The part of the update that training moves: all of it in evaluation, but for a `frozen_part`."""
        if self.frozen_part(t) is None:
            return self.evaluation_factors(t, scale)
        return self.moving_part(t).scaled(self.factor_of(scale))

    def take_up(self, size: Size, update: Factors, scale: float, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors whose update is a given one of at most `size.started` ranks, as a start.

        Args:
            size: the layer's shape.
            update: what the layer shall compute; none of its ranks is zero.
            scale: lora_alpha / r.
            t: the layer's tensors at their own start, which ranks beyond the update's keep.

        Raises:
            ArgumentError: the method's form cannot hold a given update.
        """
        if self.refuses_updates:
            raise ArgumentError(
                "config", f"be of a method that can hold any update ({self.refuses_updates})", self.method
            )
        A, B = t["A"].clone(), t["B"].clone()
        A[: update.r], B[:, : update.r] = update.A, update.B * update.s / scale
        return {"A": A, "B": B}

    def ranks_left(self, t: Mapping[str, Tensor]) -> Tensor:
        """Which ranks the method has not pruned and are not closed, a boolean (…, r)."""
        kept = self.kept(t)
        return kept & ~t[CLOSED] if CLOSED in t else kept

    def frozen_part(self, t: Mapping[str, Tensor]) -> Factors | None:
        """A part of the update that never changes, which a layer may add to its weight rather than to its output."""
        return None

    def moving_part(self, t: Mapping[str, Tensor]) -> Parts:
        """What is left of the update beside its `frozen_part`."""
        return self.parts(t)

    def joined_with_frozen(self, t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """The factors of both parts together, where `prepare` has made them; see `joined_factors`."""
        return None

    def ranks_open(self, t: Mapping[str, Tensor]) -> Tensor | None:
        """Booleans (r,) where the other ranks are 0 in B and A and stay so, so that they need not be computed."""
        return None

    def start_from_gradient(self, size: Size, gradient: Tensor) -> dict[str, Tensor]:
        """First values of the `from_gradient` tensors from the gradient (out, into) of the base weight, float32."""
        raise NotImplementedError

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """Which ranks the method has not pruned, a boolean (…, r)."""
        rows = t["A"]
        return torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)

    def norm_bound(self, size: Size, weight: Callable[[], Tensor]) -> float | None:
        """What ‖ΔW‖_F cannot exceed, however it is trained; None if nothing in its construction bounds it."""
        return None

    def needs(self, step: Step) -> tuple[str, str] | None:
        """An argument the method cannot run without and was not given, as ("name=example", "its meaning")."""
        return None

    def advice(self, stacks: Sequence[Stack], step: Step) -> str | None:
        """A sentence of warning for a run that cannot do what the method is for, asked at the first step."""
        return None

    def reads_back(self, step: Step) -> bool:
        """Whether the rules of a step read numbers of the device, so that the host may as well ask for one more."""
        return False

    def ratio(self, tensor: str, peak: float, step: Step) -> float:
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

    def final_step(self, total: int | None, epoch: int | None = None) -> int | None:
        """The step from which the kept ranks no longer change; None for a method without such a step."""
        return None

    def budget(self, sizes: Sequence[Size], total: int | None) -> CubicBudget | None:
        """The schedule of ranks over all layers in a run of `total` steps; None for a method without one."""
        return None

    def finalize(self, stacks: Sequence[Stack]) -> Updates:
        """The final budget applied now, for a run that stopped before its schedule ended."""
        return []

    def close_again(self, stacks: Sequence[Stack]) -> Updates:
        """Closed ranks closed in the parameters too, where something outside of the optimiser's step has moved them."""
        closing = self.closing_values.items()
        return [{name: layers[name].masked_fill(layers[CLOSED], value) for name, value in closing} for layers in stacks]


def kaiming_uniform(rows: int, columns: int) -> Tensor:
    """PEFT's start of LoRA's A: uniform on ±1/√columns (Kaiming with a = √5)."""
    return torch.nn.init.kaiming_uniform_(torch.empty(rows, columns, dtype=torch.float32), a=math.sqrt(5))


def gaussian(*shape: int) -> Tensor:
    """N(0, 1) in float32, whatever torch's default dtype is."""
    return torch.randn(shape, dtype=torch.float32)
