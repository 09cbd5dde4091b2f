"""Proximal maps."""

from __future__ import annotations

from torch import Tensor


def soft_threshold(x: Tensor, threshold: Tensor | float) -> Tensor:
    """T_ξ(x) = sign(x)·max(|x| − ξ, 0), the proximal map of ξ‖·‖₁ (SoRA, eq. 11), entry by entry.

    `torch.nn.functional.softshrink` with a threshold that may differ from layer to layer.

    Args:
        x: any shape.
        threshold: ξ ≥ 0, a number or a tensor that broadcasts against x.
    """
    return x.sign() * (x.abs() - threshold).clamp_min(0)
