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
from rankwise.methods.base import Method, Penalty, Size, Slot, Stack, Step, register
from rankwise.update import Factors

logger = logging.getLogger(__name__)


@register
@dataclass
class Sorsa(Method):
    """Principal singular values and orthonormally regularised singular vectors."""

    method: ClassVar[str] = "sorsa"
    summary: ClassVar[str] = "fixed rank; trains the base weight's own leading singular triplets"
    scaled: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = True
    cancels: ClassVar[bool] = True

    orth_reg_weight: float = field(default=4e-4, metadata={"help": "γ; the penalty's weight is γ / peak learning rate"})
    orth_reg_form: str = field(
        default="mean", metadata={"help": '"mean" over the 2L matrices (the authors\' code) or "sum" (eq. 8)'}
    )
    svd: str = field(default="randomized", metadata={"help": '"randomized" subspace iteration or "full"'})
    svd_iterations: int = field(default=12, metadata={"help": "most iterations of the randomised start"})

    def check(self) -> None:
        """γ ≥ 0, known choices, at least one iteration."""
        super().check()
        require_number("orth_reg_weight", self.orth_reg_weight)
        require_choice("orth_reg_form", self.orth_reg_form, ("mean", "sum"))
        require_choice("svd", self.svd, ("randomized", "full"))
        require_int("svd_iterations", self.svd_iterations, least=1)

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

    def factors(self, t: Mapping[str, Tensor], scale: float) -> Factors:
        """[U U⁰]·diag(S, −S⁰)·[Vh; Vh⁰]: rank 2r. The start follows the parameters' dtype, so that it cancels them."""
        U0, Vh0, S0 = t["U0"].to(t["U"].dtype), t["Vh0"].to(t["Vh"].dtype), t["S0"].to(t["S"].dtype)
        return Factors(torch.cat([t["U"], U0], -1), torch.cat([t["S"], -S0], -1), torch.cat([t["Vh"], Vh0], -2))

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """All r triplets."""
        return torch.ones_like(t["S"], dtype=torch.bool)

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """γ/η_d · (‖UᵀU − I‖_F + ‖VᵀV − I‖_F), averaged over the 2L matrices or summed."""
        if self.orth_reg_weight == 0:
            return None
        matrices = 2 * sum(len(layers) for layers in stacks) if self.orth_reg_form == "mean" else 1
        gradients, values = [], []
        for layers in stacks:
            (in_U, dU), (in_V, dV) = (
                orthonormality_gap(layers["U"].float()),
                orthonormality_gap(layers["Vh"].float().mT),
            )
            weight_U, weight_V = self._weight(layers.peak("U")) / matrices, self._weight(layers.peak("Vh")) / matrices
            gradients.append({"U": weight_U.unsqueeze(2) * dU, "Vh": weight_V.unsqueeze(2) * dV.mT})
            values.append((weight_U.squeeze(1) * in_U + weight_V.squeeze(1) * in_V).sum())
        return Penalty(sum(value.to(values[0].device) for value in values), gradients)  # type: ignore[arg-type]

    def _weight(self, peak: Tensor) -> Tensor:
        """γ/η_d; 0 where the peak rate is 0, since nothing moves there."""
        return torch.where(peak > 0, self.orth_reg_weight / peak, 0)
