"""The one definition of an update: ΔW = B·diag(s)·A, with every scale folded into s.

Forward passes, merging, export and spectra all read an adapted layer through `Factors`, so that they cannot disagree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.precision import exact


class Parts(NamedTuple):
    """An update without the number that multiplies all of its ranks alike: ΔW = scale·B·diag(s)·A.

    A product can take such a number along, where a tensor would cost an operation of its own.
    """

    B: Tensor
    s: Tensor | None
    """None: 1 for every rank."""
    A: Tensor

    @property
    def r(self) -> int:
        """The number of columns of B, zero or not."""
        return self.A.shape[-2]

    def scaled(self, scale: float) -> Factors:
        """The update with the number folded in."""
        if self.s is None:
            return Factors(self.B, self.B.new_full(self.B.shape[:-2] + self.B.shape[-1:], scale), self.A)
        return Factors(self.B, self.s if scale == 1 else scale * self.s, self.A)


class Factors(NamedTuple):
    """ΔW = B·diag(s)·A of one layer, or of a stack of same-shaped layers.

    Shapes: B (…, out, r), s (…, r), A (…, r, in). No scale is left outside: `delta()` is what is added to the weight.

    >>> B, s, A = torch.ones(3, 1), torch.tensor([2.0]), torch.ones(1, 4)
    >>> Factors(B, s, A).delta().unique()
    tensor([2.])
    """

    B: Tensor
    s: Tensor
    A: Tensor

    @property
    def r(self) -> int:
        """The number of columns of B, zero or not."""
        return self.s.shape[-1]

    def delta(self) -> Tensor:
        """The dense update, (…, out, in)."""
        return (self.B * self.s.unsqueeze(-2)).to(self.A.dtype) @ self.A

    def add_to(self, result: Tensor, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """result + ΔW x for inputs x (…, in) and result (…, out), without forming ΔW.

        `gates` broadcasts against (…, r): factors on the ranks that may differ from sample to sample.
        """
        h = F.linear(x, self.A) * (self.s if gates is None else self.s * gates)
        return result + F.linear(h.to(self.B.dtype), self.B)

    def kept(self) -> Factors:
        """The same update (one layer, not a stack) without the ranks whose column of B·diag(s) or row of A is zero."""
        alive = ((self.B * self.s).ne(0).any(0) & self.A.ne(0).any(1)).nonzero().squeeze(1)
        return Factors(self.B[:, alive], self.s[alive], self.A[alive])

    def orthogonal(self) -> Factors:
        """The same update as a thin singular value decomposition, in float64.

        B gets orthonormal columns, A orthonormal rows and s the singular values, falling. Costs two QR decompositions
        and one SVD of an r × r matrix: never one of the dense (out, in) matrix.
        """
        B, s, A = (exact(t) for t in self)
        QB, RB = torch.linalg.qr(B * s.unsqueeze(-2))
        QA, RA = torch.linalg.qr(A.mT)
        U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False)
        return Factors(QB @ U, S, Vh @ QA.mT)

    def norm(self) -> float:
        """‖ΔW‖_F of one layer in float64, by two QR decompositions: right even where large factors cancel."""
        B, s, A = (exact(t.detach()) for t in self)
        RB, RA = torch.linalg.qr(B * s, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
        return float((RB @ RA.mT).norm())

    def rounding(self) -> float:
        """How far the update of one layer can be off by cancellation in float64: 1e-14 of its uncancelled size."""
        B, s, A = (exact(t.detach()) for t in self)
        return 1e-14 * float((B.norm(dim=0) * s.abs() * A.norm(dim=1)).sum())

    def singular_values(self) -> Tensor:
        """The min(r, out, in) leading singular values of ΔW, falling, in float64."""
        return self.orthogonal().s


def joined_factors(left: Tensor, A: Tensor, frozen: Factors) -> tuple[Tensor, Tensor]:
    """The sum of two updates as one of the ranks of both: its left and its right factor, of one layer or of a stack.

    Args:
        left: B·diag(s) of the one, (…, out, r).
        A: of the one, (…, r, in).
        frozen: the other. It is cast to the dtypes of the one first, so that equal ones cancel in any precision.
    """
    B, s, _ = frozen
    frozen_left = (B.to(left.dtype) * s.unsqueeze(-2)).to(left.dtype)
    return torch.cat([left, frozen_left], -1), torch.cat([A, frozen.A.to(A.dtype)], -2)
