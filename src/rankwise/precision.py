"""How many digits are used where: in r × r Gram matrices all of them, in large products what the user has chosen."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """`x` in float64, or in float32 on a device without float64 (MPS: a condition number of 1e3 then costs 2 %).

    At the size of a Gram matrix that costs nothing, and saves ill-conditioned factors.
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def multiplied_whole(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products take all digits of a float32 or wider; torch can be told to take TF32's or bfloat16's."""
    if dtype.itemsize != 4:
        return dtype.itemsize > 4
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    chosen = getattr(getattr(backend, "matmul", None), "fp32_precision", None)  # from torch 2.9 on
    return torch.get_float32_matmul_precision() == "highest" if chosen is None else chosen in ("none", "ieee")
