"""SoRA: gates between the projections, closed one by one by a proximal step.

Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv 2311.11696.

z = W_u (g ⊙ (W_d x)) (eq. 9). W_d and W_u follow the optimiser; the gate takes its optimiser step and
then the proximal map of the L1 norm (eq. 10, 11):

    g ← T_{η_t·λ}(g),   T_ξ(x) = sign(x)·max(|x| − ξ, 0),

with η_t the gates' own learning rate at that step. The authors' code differs: it thresholds by a constant ξ, and
applies its three cases one after another in place, which zeroes every |x| < 2ξ. Here the equation holds.

Over a run of T steps a gate without gradients shrinks by Σ η_t·λ, which is λ·η·T/2 under a linear or cosine decay from
the peak η to 0, whatever its warm-up. The authors' ξ = 3e-4 at η = 8e-4 adds up to ξ·T: as much at λ = 2ξ/η = 0.75.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_choice, require_number
from rankwise.linalg.prox import soft_threshold
from rankwise.methods.base import Method, gaussian, register
from rankwise.methods.stack import CLOSED, Penalty, Size, Slot, Stack, Step, Updates, closed_slot
from rankwise.update import Factors, Parts


@register
@dataclass
class Sora(Method):
    """LoRA with a gate per rank, thresholded towards exactly 0 after each step."""

    method: ClassVar[str] = "sora"
    config_name: ClassVar[str] = "SoraConfig"
    summary: ClassVar[str] = "falls from r as a proximal step closes gates to exactly 0"
    suggested_rate: ClassVar[float] = 1e-3
    closing_values: ClassVar[Mapping[str, float]] = {"g": 0.0}

    sparse_weight: float = field(
        default=0.75,
        metadata={"help": "λ; each step shrinks the gates by learning rate × λ (0.75: in all as much as the authors')"},
    )
    gate_lr: float | None = field(
        default=None, metadata={"help": "peak learning rate of the gates; None: the optimiser's own"}
    )
    sparse_penalty: float = field(
        default=0.0, metadata={"help": "weight of mean |g| added to the loss, as the authors' code does with 10"}
    )
    gate_init: str = field(default="normal", metadata={"help": '"normal" (N(0, 1), the authors\' start) or "ones"'})

    def check(self) -> None:
        """Weights ≥ 0, a positive rate, a known start."""
        super().check()
        require_number("sparse_weight", self.sparse_weight)
        require_number("sparse_penalty", self.sparse_penalty)
        require_choice("gate_init", self.gate_init, ("normal", "ones"))
        if self.gate_lr is not None:
            require_number("gate_lr", self.gate_lr, least=1e-30)

    @property
    def uses_rate(self) -> bool:  # type: ignore[override]  a question of the fields here
        """Whether gates are thresholded, or have a rate of their own."""
        return self.sparse_weight > 0 or self.gate_lr is not None

    def slots(self, size: Size) -> dict[str, Slot]:
        """A (r, in), B (out, r), the gate g (r), and which gates the last proximal step left at 0."""
        return super().slots(size) | {"g": Slot((size.r,), exact=True)} | closed_slot(size)

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """As LoRA, with random or open gates."""
        g = gaussian(size.r) if self.gate_init == "normal" else torch.ones(size.r)
        return super().start(size, weight, zero=zero) | {"g": g}

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """B·diag(g)·A."""
        return Parts(t["B"], t["g"], t["A"])

    def take_up(self, size: Size, update: Factors, scale: float, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As LoRA, with open gates."""
        return super().take_up(size, update, scale, t) | {"g": torch.ones(size.r)}

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """Gates that are not 0 (eq. 12)."""
        return t["g"] != 0

    def ratio(self, tensor: str, peak: float, step: Step) -> float:
        """gate_lr / peak for the gates."""
        return self.gate_lr / peak if tensor == "g" and self.gate_lr is not None and peak > 0 else 1.0

    def advice(self, stacks: Sequence[Stack], step: Step) -> str | None:
        """Says when the whole run cannot shrink a gate as far as the smallest one is from 0."""
        if step.total is None or step.rate_estimated or self.sparse_weight == 0:
            return None
        peaks = [float(peak) for layers in stacks for peak in layers.peak("g")]
        reaches = [peak * self.ratio("g", peak, step) * self.sparse_weight * step.total for peak in peaks]
        smallest = [float(g) for layers in stacks for g in layers["g"].abs().amin(-1)]
        reach, gate = max(zip(reaches, smallest, strict=True), key=lambda pair: pair[0] - pair[1])
        if reach >= gate:
            return None
        return (
            f"no gate can close in this run: {step.total} steps shrink a gate by at most {reach:.2g} and the nearest "
            f"to 0 is {gate:.2g}; raise `sparse_weight` ({self.sparse_weight}), `gate_lr` or the number of steps"
        )

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """sparse_penalty · mean |g| over all gates."""
        if self.sparse_penalty == 0:
            return None
        gates = [layers["g"] for layers in stacks]
        weight = self.sparse_penalty / sum(g.numel() for g in gates)
        value = weight * torch.stack([g.abs().sum() for g in gates]).sum()
        return Penalty(value, [{"g": weight * g.sign()} for g in gates])

    def after_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """The proximal step, with threshold η_t·λ."""
        gates = [soft_threshold(layers["g"], layers.rate("g") * self.sparse_weight) for layers in stacks]
        return [{"g": g, CLOSED: g == 0} for g in gates]
