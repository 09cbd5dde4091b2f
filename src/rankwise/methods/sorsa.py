"""SORSA: train the principal singular triplets of the base weight, kept close to orthonormal.

Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation", arXiv 2409.00055.

W0 = U S Vᵀ; W_p holds its first r triplets, W_r the rest. y = W_r x + (U_p ⊙ S_p) V_pᵀ x (eq. 7), with the
penalty ‖U_pᵀU_p − I‖_F + ‖V_pᵀV_p − I‖_F (eq. 8) of weight γ/η_d, η_d the schedule's peak learning rate (eq. 10).

The base weight is never touched: the start is stored and subtracted, so that

    ΔW = U_p S_p V_pᵀ − U⁰ S⁰ V⁰ᵀ,

an update of rank 2r against the original W0, exactly 0 at the start. There is no lora_alpha / r scale.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_choice, require_int, require_number
from rankwise.linalg.orthonormality import orthonormality_gap
from rankwise.linalg.svd import leading_triplets, leading_triplets_full
from rankwise.methods.base import Method, register
from rankwise.methods.orthonormal import orthonormality_penalty
from rankwise.methods.stack import Penalty, Size, Slot, Stack, Step
from rankwise.update import Factors, Parts, joined_factors

logger = logging.getLogger(__name__)

HEAVIEST = 10.0
"""The penalty's weight up to which Prodigy's estimate of its rate was seen to grow: it did at 4, and not at 40."""


@register
@dataclass
class Sorsa(Method):
    """Principal singular values and orthonormally regularised singular vectors."""

    method: ClassVar[str] = "sorsa"
    config_name: ClassVar[str] = "SorsaConfig"
    summary: ClassVar[str] = "fixed rank; trains the base weight's own leading singular triplets"
    linear_only: ClassVar[bool] = True
    suggested_rate: ClassVar[float] = 3e-4
    refuses_updates: ClassVar[str | None] = "SORSA trains the base weight's own triplets"
    scaled: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = True
    cancels: ClassVar[bool] = True
    prepares_on_cpu: ClassVar[bool] = False

    orth_reg_weight: float = field(default=4e-4, metadata={"help": "γ; the penalty's weight is γ / peak learning rate"})
    orth_reg_form: str = field(
        default="mean", metadata={"help": '"mean" over the 2L matrices (the authors\' code) or "sum" (eq. 8)'}
    )
    svd: str = field(default="randomized", metadata={"help": '"randomized" subspace iteration or "full"'})
    svd_iterations: int = field(default=12, metadata={"help": "most iterations of the randomised start"})

    residual: str = field(
        default="offset",
        metadata={"help": '"offset" (subtract the start in each pass) or "cached" (keep W_r: memory for time)'},
    )

    def check(self) -> None:
        """γ ≥ 0, known choices, at least one iteration."""
        super().check()
        require_number("orth_reg_weight", self.orth_reg_weight)
        require_choice("orth_reg_form", self.orth_reg_form, ("mean", "sum"))
        require_choice("svd", self.svd, ("randomized", "full"))
        require_choice("residual", self.residual, ("offset", "cached"))
        require_int("svd_iterations", self.svd_iterations, least=1)

    @property
    def uses_rate(self) -> bool:  # type: ignore[override]  a question of the fields here
        """Whether there is a penalty, whose weight is γ over the peak rate."""
        return self.orth_reg_weight > 0

    def slots(self, size: Size) -> dict[str, Slot]:
        """U (out, r), S (r), Vh (r, in), and the start U0, S0, Vh0 as buffers."""
        shapes = {"U": (size.out, size.r), "S": (size.r,), "Vh": (size.r, size.into)}
        trained = {name: Slot(shape, exact=name == "S") for name, shape in shapes.items()}
        return trained | {
            f"{name}0": Slot(shape, trained=False, exact=True, start_of=name) for name, shape in shapes.items()
        }

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """The first r triplets of W0, from a fixed seed: the same base has the same start everywhere."""
        W = weight()
        full = self.svd == "full"
        found = (
            leading_triplets_full(W, size.r) if full else leading_triplets(W, size.r, iterations=self.svd_iterations)
        )
        logger.info("start from a %d × %d weight: %s", *W.shape, found.reached())
        U, S, Vh = found.factors
        start = {"U": U, "S": S, "Vh": Vh}
        offset = {f"{name}0": t for name, t in start.items()}
        return start | offset if zero else start | offset | {"S": S + 1 + torch.rand_like(S)}

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """[U U⁰]·diag(S, −S⁰)·[Vh; Vh⁰]: rank 2r. The start follows the parameters' dtype, so that it cancels them."""
        U0, Vh0, S0 = t["U0"].to(t["U"].dtype), t["Vh0"].to(t["Vh"].dtype), t["S0"].to(t["S"].dtype)
        return Parts(torch.cat([t["U"], U0], -1), torch.cat([t["S"], -S0], -1), torch.cat([t["Vh"], Vh0], -2))

    def frozen_part(self, t: Mapping[str, Tensor]) -> Factors | None:
        """−U⁰S⁰V⁰ᵀ, which makes W0 the residual weight W_r."""
        return Factors(t["U0"], t["minus_S0"] if "minus_S0" in t else -t["S0"], t["Vh0"])

    @property
    def prepared_from(self) -> tuple[str, ...]:  # type: ignore[override]  a question of the fields here
        """All tensors; none where W_r is kept, since U, S and Vh are enough then."""
        return () if self.caches_frozen_part else ("U", "S", "Vh", "U0", "S0", "Vh0")

    @property
    def caches_frozen_part(self) -> bool:  # type: ignore[override]  a question of the fields here
        """Whether W_r is kept."""
        return self.residual == "cached"

    def moving_part(self, t: Mapping[str, Tensor]) -> Parts:
        """U S Vh: rank r."""
        return Parts(t["US"], None, t["Vh"]) if "US" in t else Parts(t["U"], t["S"], t["Vh"])

    def prepare(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """U S, and the factors of both parts together, which inputs are multiplied by."""
        US = (t["U"] * t["S"].unsqueeze(-2)).to(t["U"].dtype)
        minus_S0 = -t["S0"]
        with torch.no_grad():  # gradients go to U S and Vh, by rank r
            left, right = joined_factors(US, t["Vh"], Factors(t["U0"], minus_S0, t["Vh0"]))
        return {"US": US, "minus_S0": minus_S0, "left": left, "right": right}

    def joined_with_frozen(self, t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """[U S, −U⁰S⁰] and [Vh; Vh⁰]."""
        return (t["left"], t["right"]) if "left" in t else None

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """All r triplets."""
        return torch.ones_like(t["S"], dtype=torch.bool)

    def advice(self, stacks: Sequence[Stack], step: Step) -> str | None:
        """Says when the penalty may hold down the rate that its own weight depends on."""
        if not step.rate_estimated:
            return None
        rate = min(float(peak) for layers in stacks for peak in layers.peak("U"))
        if rate == 0 or self.orth_reg_weight <= rate * HEAVIEST:
            return None
        return (
            f"the optimiser's first estimate of its learning rate is {rate:.1g}, at which the penalty's weight, "
            f"orth_reg_weight / rate, is {self.orth_reg_weight / rate:.0f} and can keep the estimate from growing: let "
            f"it start at {self.orth_reg_weight / HEAVIEST:.0e} or above (Prodigy's d0), or set `orth_reg_weight` to 0"
        )

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """γ/η_d · (‖UᵀU − I‖_F + ‖VᵀV − I‖_F), averaged over the 2L matrices or summed."""
        if self.orth_reg_weight == 0:
            return None
        matrices = 2 * sum(len(layers) for layers in stacks) if self.orth_reg_form == "mean" else 1
        return orthonormality_penalty(
            stacks, "U", "Vh", orthonormality_gap, lambda layers, name: self._weight(layers.peak(name)[:, 0]) / matrices
        )

    def _weight(self, peak: Tensor) -> Tensor:
        """γ/η_d; 0 where the peak rate is 0, since nothing moves there."""
        return torch.where(peak > 0, self.orth_reg_weight / peak, 0)
