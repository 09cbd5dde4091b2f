"""Where r × r Gram matrices are taken: float64, which costs nothing at that size and saves ill-conditioned factors."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """`x` in float64, or in float32 on a device without float64 (MPS: a condition number of 1e3 then costs 2 %)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
