"""How far training moved the singular values and the singular vectors of a weight (SORSA's analysis).

Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation", arXiv 2409.00055, section 3.2.
With W0 = U0 diag(σ0) V0ᵀ before and W_t = U_t diag(σ_t) V_tᵀ after t steps, both (m, n), and k = min(m, n):

    ΔΣ_t   = (1/k) Σ_i |σ_t^i − σ_0^i|                   (1)
    ΔU_t,i = |⟨u_t^i, u_0^i⟩|                            (2)
    ΔV_t,i = |⟨v_t^i, v_0^i⟩|                            (3)
    ΔD_t   = 1 − (1/2k) Σ_i (ΔU_t,i + ΔV_t,i)            (4)

The sums run over i = 1..k; eq. 4 is printed from i = 0, a term that does not exist and would give −1/k for W_t = W0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.checks import require_int
from rankwise.errors import ArgumentError
from rankwise.linalg.svd import settled_triplets
from rankwise.spectral.inputs import finite, matrices
from rankwise.update import Factors


class Drift(NamedTuple):
    """The drift of one matrix, or of each matrix of a stack (…)."""

    values: Tensor
    """ΔΣ_t (eq. 1), (…): a mean of singular values' moves, in the units of W; ≥ 0."""
    vectors: Tensor
    """ΔD_t (eq. 4), (…): 0 where no singular vector turned, 1 where each is orthogonal to what it was."""
    left: Tensor
    """ΔU_t,i (eq. 2), (…, k): |cosine| of the angle the i-th left singular vector turned by."""
    right: Tensor
    """ΔV_t,i (eq. 3), (…, k): the same of the right singular vectors."""


def weight_drift(W0: Tensor, Wt: Tensor) -> Drift:
    """ΔΣ_t and ΔD_t between a weight before and after training, over all k = min(m, n) singular triplets.

    Triplets are paired by their order (the i-th largest with the i-th largest), as the equations do: two singular
    values that change places count as two vectors turned by 90°. Vectors of repeated singular values, zeros included,
    are not unique, so ΔD_t means little where W0 or W_t is rank-deficient: use `weight_drift_top_k` there.
    Two full decompositions in float64.

    Args:
        W0: (m, n), or a stack (…, m, n), of any floating dtype.
        Wt: of the same m and n; the leading dimensions broadcast, so that one W0 serves a stack of steps.

    Raises:
        ArgumentError: a tensor is not a matrix, holds a NaN or infinity, or the shapes do not fit.

    Source: SORSA (arXiv 2409.00055), eq. 1–4.

    >>> W0 = torch.diag(torch.tensor([3.0, 1.0]))
    >>> drift = weight_drift(W0, torch.diag(torch.tensor([4.0, 1.0])))
    >>> float(drift.values), float(drift.vectors)
    (0.5, 0.0)
    >>> float(weight_drift(W0, W0.flip(0)).vectors)  # the left singular vectors change places, the right ones stay
    0.5
    """
    W0, Wt = _pair(W0, Wt)
    return _drift(W0, Wt, min(W0.shape[-2:]))


def weight_drift_top_k(W0: Tensor, Wt: Tensor, k: int) -> Drift:
    """`weight_drift` over the k largest singular triplets only: sums over i = 1..k, divided by this k.

    Args:
        W0: (…, m, n).
        Wt: (…, m, n).
        k: how many triplets, 1 ≤ k ≤ min(m, n).

    Raises:
        ArgumentError: as `weight_drift`, or k is out of its range.

    Source: SORSA (arXiv 2409.00055), eq. 1–4, truncated.

    >>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> Wt = torch.diag(torch.tensor([3.0, 2.0, 1.75]))
    >>> float(weight_drift(W0, Wt).values), float(weight_drift_top_k(W0, Wt, 2).values)
    (0.25, 0.0)
    """
    W0, Wt = _pair(W0, Wt)
    require_int("k", k, least=1)
    if k > min(W0.shape[-2:]):
        raise ArgumentError("k", f"be at most min(m, n) = {min(W0.shape[-2:])}", k)
    return _drift(W0, Wt, k)


class Pretrained:
    """A pretrained weight with its k leading singular triplets, to measure updates of it against.

    The triplets are found once, by subspace iteration in float64; each update then costs a few products with W0 of k
    columns, and W0 + ΔW is never formed.

    Args:
        W0: (m, n), of any floating dtype.
        k: how many triplets count, 1 ≤ k ≤ min(m, n).

    Raises:
        ArgumentError: W0 is no matrix, holds a NaN or infinity, or k is out of its range.

    >>> weight = Pretrained(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
    >>> e1 = torch.eye(3, 1)
    >>> drift = weight.drift(Factors(e1, torch.ones(1), e1.mT))  # 3 becomes 4
    >>> round(float(drift.values), 6), abs(round(float(drift.vectors), 6))
    (0.5, 0.0)
    """

    def __init__(self, W0: Tensor, k: int) -> None:
        W0 = matrices("W0", W0)
        if W0.ndim != 2:
            raise ArgumentError("W0", "be one matrix (m, n)", tuple(W0.shape))
        require_int("k", k, least=1)
        if k > min(W0.shape):
            raise ArgumentError("k", f"be at most min(m, n) = {min(W0.shape)}", k)
        self.W0, self.k = W0, k
        self.triplets = settled_triplets(W0, k)

    def drift(self, update: Factors) -> Drift:
        """`weight_drift_top_k` of W0 and W0 + ΔW.

        Raises:
            ArgumentError: a factor holds a NaN or infinity.
        """
        update = Factors(*(finite(name, t) for name, t in zip("BsA", update, strict=True)))
        moved = settled_triplets(self.W0, self.k, update=update, start=self.triplets.A.mT)
        return _drift_of(self.triplets, moved, self.k)


def _pair(W0: Tensor, Wt: Tensor) -> tuple[Tensor, Tensor]:
    W0, Wt = matrices("W0", W0), matrices("Wt", Wt)
    try:
        torch.broadcast_shapes(W0.shape[:-2], Wt.shape[:-2])
        fits = W0.shape[-2:] == Wt.shape[-2:]
    except RuntimeError:
        fits = False
    if not fits:
        raise ArgumentError("Wt", f"fit the shape of W0, {tuple(W0.shape)}", tuple(Wt.shape))
    return W0, Wt


def _drift(W0: Tensor, Wt: Tensor, k: int) -> Drift:
    before, after = (Factors(*torch.linalg.svd(W, full_matrices=False)) for W in (W0, Wt))
    return _drift_of(before, after, k)


def _drift_of(before: Factors, after: Factors, k: int) -> Drift:
    """The drift between two decompositions, over their k first triplets."""
    (U0, S0, Vh0), (Ut, St, Vht) = before, after
    left = (Ut[..., :k] * U0[..., :k]).sum(-2).abs().clamp_max(1)
    right = (Vht[..., :k, :] * Vh0[..., :k, :]).sum(-1).abs().clamp_max(1)
    values = (St[..., :k] - S0[..., :k]).abs().mean(-1)
    return Drift(values, 1 - (left + right).mean(-1) / 2, left, right)
