"""NNM-LoRA: nuclear-norm maximisation, so that an adapter uses the whole subspace it has.

Liu et al., "Nuclear-Norm Maximization for Low-Rank Updates" (NNM-LoRA).

The loss is L + λR with R = −Σ_l ‖A_l‖_* / ‖A_l‖_F (eq. 9, 10). With A = U Σ Vᵀ its gradient is

    ∂R/∂A = −U Vᵀ / ‖A‖_F + ‖A‖_* · A / ‖A‖_F³.

The paper contradicts itself about the second term. Under eq. 10 it says that ‖A‖_F "does not directly affect the
differentiation process", which leaves −U Vᵀ / ‖A‖_F. Its Fig. 2(b) and the text below Table 3 say that the norm makes
the spectrum more uniform and keeps ‖A‖_* from growing, and only the whole gradient does so: it is orthogonal to A, and
it is 0 exactly where all singular values are equal. `frobenius` chooses.

The paper differentiates a singular value decomposition per layer; `linalg.polar` needs the r × r Gram matrices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_bool, require_choice, require_number
from rankwise.errors import ArgumentError
from rankwise.linalg.polar import inverse_root
from rankwise.methods.base import Method, register
from rankwise.methods.stack import Penalty, Stack, Step
from rankwise.precision import exact


@register
@dataclass
class Nnm(Method):
    """LoRA with the nuclear norm of A maximised."""

    method: ClassVar[str] = "nnm"
    config_name: ClassVar[str] = "NnmLoraConfig"
    summary: ClassVar[str] = "fixed rank; nuclear-norm maximisation spreads the update over all r directions"
    suggested_rate: ClassVar[float] = 3e-3

    nuclear_weight: float = field(
        default=5.0, metadata={"help": "λ, weight of the penalty (paper: CLINC 5, MNLI 1, SWAG 10)"}
    )
    frobenius: str = field(
        default="differentiated",
        metadata={
            "help": 'the division by ‖A‖_F: "differentiated" like the rest, "held" constant, or "none" (an ablation)'
        },
    )
    scale_by_frobenius: bool | None = field(
        default=None, metadata={"help": 'older spelling: True means frobenius="held", False means frobenius="none"'}
    )

    def check(self) -> None:
        """λ ≥ 0, and a known form of the penalty under either spelling."""
        super().check()
        require_number("nuclear_weight", self.nuclear_weight)
        require_choice("frobenius", self.frobenius, ("differentiated", "held", "none"))
        if self.scale_by_frobenius is not None:
            require_bool("scale_by_frobenius", self.scale_by_frobenius)
            meant = "held" if self.scale_by_frobenius else "none"
            if self.frobenius not in (Nnm.frobenius, meant):
                raise ArgumentError("scale_by_frobenius", "be left out beside frobenius", self.scale_by_frobenius)
            self.frobenius, self.scale_by_frobenius = meant, None

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """λR and its gradient, in the form that `frobenius` names."""
        if self.nuclear_weight == 0:
            return None
        gradients, values = [], []
        for layers in stacks:
            A = layers["A"].float()
            share, gradient = self._share_of_nuclear_norm(exact(A))
            gradients.append({"A": -self.nuclear_weight * gradient.to(A.dtype)})
            values.append(-self.nuclear_weight * share.sum())
        return Penalty(sum(value.to(values[0].device) for value in values), gradients)  # type: ignore[arg-type]

    def _share_of_nuclear_norm(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """‖A‖_* / ‖A‖_F of each matrix (n,) and its gradient (n, r, into); ‖A‖_* and U Vᵀ where nothing divides.

        Both terms of the gradient are one r × r matrix times A. It is formed in float64, because the two nearly cancel
        where the singular values are nearly equal.
        """
        root, singular_values = inverse_root(A)  # root @ A is U Vᵀ
        nuclear = singular_values.sum(-1)
        if self.frobenius == "none":
            return nuclear, root @ A
        norm = torch.linalg.matrix_norm(A)
        inverse_norm = torch.where(norm > 0, 1 / norm, 0)  # a matrix of zeros has no direction to strengthen
        share = nuclear * inverse_norm
        left = root * inverse_norm[:, None, None]
        if self.frobenius == "differentiated":
            left.diagonal(dim1=-2, dim2=-1).sub_((share * inverse_norm.square()).unsqueeze(-1))
        return share, left @ A
