"""The penalty on factors that are not orthonormal, which AdaLoRA, SaLoRA and SORSA share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rankwise.linalg.orthonormality import orthonormality_gap, orthonormality_gap_squared
from rankwise.methods.stack import Penalty, Stack

Gap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""w·‖PᵀP − I‖_F of a stack, or of its square, with the gradient: see `linalg.orthonormality`."""


def orthonormality_penalty(
    stacks: Sequence[Stack], left: str, right: str, gap: Gap, weight: Callable[[Stack, str], Tensor]
) -> Penalty:
    """Σ over layers of w·gap(B) + w·gap(Aᵀ) for factors B (out, r), named `left`, and A (r, in), named `right`.

    `weight` gives w per layer, (n,), for one of the two.
    """
    gradients, values = [], []
    for layers in stacks:
        in_left, d_left = gap(layers[left].float(), weight(layers, left))
        in_right, d_right = gap(layers[right].float().mT, weight(layers, right))
        gradients.append({left: d_left, right: d_right.mT})
        values.append((in_left + in_right).sum())
    return Penalty(sum(value.to(values[0].device) for value in values), gradients)  # type: ignore[arg-type]


def penalty_of_form(stacks: Sequence[Stack], left: str, right: str, weight: float, form: str) -> Penalty | None:
    """`weight` times the "mean" of the gaps over the 2L matrices of L layers, or the "sum" of their squares."""
    if weight == 0:
        return None
    mean = form == "mean"
    share = weight / (2 * sum(len(layers) for layers in stacks)) if mean else weight
    gap = orthonormality_gap if mean else orthonormality_gap_squared
    return orthonormality_penalty(
        stacks, left, right, gap, lambda layers, name: layers[name].new_full((len(layers),), share)
    )
