"""Convolutions: the weight (out, in, kh, kw) is the matrix (out, in·kh·kw), so that an update is two convolutions.

A, seen as (r, in, kh, kw), runs over the input exactly as the base weight does; B is a 1×1 convolution.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rankwise.adapters.layer import AdapterLayer, NotPerSampleError, check_samples
from rankwise.update import Factors


class AdapterConv2d(AdapterLayer):
    """A Conv2d of one group, of any stride, padding and dilation, with low-rank updates added to it."""

    wraps = (nn.Conv2d,)

    @staticmethod
    def matrix_shape(root: Any) -> tuple[int, int]:
        """(out, in·kh·kw)."""
        kh, kw = root.kernel_size
        return root.out_channels, root.in_channels * kh * kw

    @staticmethod
    def refusal(root: Any) -> tuple[str, str] | None:
        """Several groups have no matrix; a subclass may do anything to its weight or input."""
        if root.groups != 1:
            return "name convolutions with groups=1", f"groups={root.groups}"
        kind = type(root)
        if kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward:
            return "name convolutions that compute what torch's Conv2d does", kind.__name__
        return None

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Flattened but for the output channels."""
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(out, in, kh, kw)."""
        root: Any = self.get_base_layer()
        return matrix.unflatten(1, (root.in_channels, *root.kernel_size))

    def _add(self, adapter: str, factors: Factors, result: Tensor, x: Tensor) -> Tensor:
        B, s, A = factors
        gates = self.gates.get(adapter)
        if gates is not None and gates.dim() > 1:
            if x.dim() != 4:
                raise NotPerSampleError(f"a convolution's input of shape {tuple(x.shape)} has no samples")
            check_samples(gates, x)
        s = s if gates is None else s * gates
        root: Any = self.get_base_layer()
        h = root._conv_forward(self._dropped(adapter, x, A.dtype), self.as_weight(A), None) * s[..., None, None]
        return result + F.conv2d(h.to(B.dtype), B[..., None, None])
