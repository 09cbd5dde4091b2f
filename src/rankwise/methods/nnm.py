"""NNM-LoRA: nuclear-norm maximisation, so that an adapter uses the whole subspace it has.

Liu et al., "Nuclear-Norm Maximization for Low-Rank Updates" (NNM-LoRA).

The loss is L + λR with R = −Σ_l ‖A_l‖_* / ‖A_l‖_F (eq. 9, 10). The Frobenius norm only scales: it is a
constant in differentiation, as the paper says under eq. 10. With A = U Σ Vᵀ,

    ∂R/∂A = −U Vᵀ / ‖A‖_F = −polar(A) / ‖A‖_F.

The paper differentiates a singular value decomposition per layer; `linalg.polar` needs the r × r Gram matrices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from rankwise.checks import require_bool, require_number
from rankwise.linalg.polar import polar
from rankwise.methods.base import Method, register
from rankwise.methods.stack import Penalty, Stack, Step


@register
@dataclass
class Nnm(Method):
    """LoRA with the nuclear norm of A maximised."""

    method: ClassVar[str] = "nnm"
    summary: ClassVar[str] = "fixed rank; nuclear-norm maximisation spreads the update over all r directions"
    suggested_rate: ClassVar[float] = 3e-3

    nuclear_weight: float = field(
        default=5.0, metadata={"help": "λ, weight of the penalty (paper: CLINC 5, MNLI 1, SWAG 10)"}
    )
    scale_by_frobenius: bool = field(
        default=True, metadata={"help": "divide by ‖A‖_F; False is the paper's ablation, −λ·UVᵀ"}
    )

    def check(self) -> None:
        """λ ≥ 0."""
        super().check()
        require_number("nuclear_weight", self.nuclear_weight)
        require_bool("scale_by_frobenius", self.scale_by_frobenius)

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """λR and −λ·polar(A)/‖A‖_F."""
        if self.nuclear_weight == 0:
            return None
        gradients, value = [], torch.zeros(())
        for layers in stacks:
            A = layers["A"].float()
            Q, nuclear = polar(A)
            norm = torch.linalg.matrix_norm(A)
            weight = torch.where(norm > 0, self.nuclear_weight / norm, 0)
            if not self.scale_by_frobenius:
                weight = torch.full_like(norm, self.nuclear_weight)
            gradients.append({"A": -weight[:, None, None] * Q})
            value = value.to(A.device) - (weight * nuclear).sum()
        return Penalty(value, gradients)
