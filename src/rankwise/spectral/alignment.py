"""How much two updates have in common with each other, and with the directions of the pretrained weight."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.spectral.inputs import finite, matrices
from rankwise.update import Factors


def subspace_alignment(U: Tensor, V: Tensor) -> Tensor:
    """‖UᵀV‖_F² / k, k the smaller number of columns: the mean squared cosine of the angles between two subspaces.

    1 where one subspace contains the other, 0 where they are orthogonal. Two random ones of dimensions k and l in ℝᵈ
    have l/d on average (k ≤ l).

    Args:
        U: (…, d, k), orthonormal columns.
        V: (…, d, l), orthonormal columns.

    Returns:
        (…), float64, dimensionless, in [0, 1].

    Raises:
        ArgumentError: a tensor is not a matrix, holds a NaN or infinity, or d differs.

    Source: Deep LoRA (arXiv 2406.04112), figure 1, middle.

    >>> subspace_alignment(torch.eye(4, 2), torch.eye(4, 3)).item()
    1.0
    """
    U, V = matrices("U", U), matrices("V", V)
    if U.shape[-2] != V.shape[-2]:
        raise ArgumentError("V", f"have as many rows as U, {U.shape[-2]}", V.shape[-2])
    return (U.mT @ V).square().sum((-2, -1)) / min(U.shape[-1], V.shape[-1])


def update_cosine(update: Factors, other: Factors) -> Tensor:
    """⟨ΔW, ΔW'⟩_F / (‖ΔW‖_F·‖ΔW'‖_F): 1 where two updates point the same way, 0 where they are orthogonal.

    From the factors: ⟨ΔW, ΔW'⟩ = tr(s A A'ᵀ s' B'ᵀ B), and the same for the norms. No dense matrix is formed.

    Args:
        update: B (…, out, r), s (…, r), A (…, r, in).
        other: of the same out and in; its rank may differ.

    Returns:
        (…), float64, dimensionless, in [−1, 1]; 0 where an update is zero.

    Raises:
        ArgumentError: a factor holds a NaN or infinity, or the shapes do not fit.

    >>> one = Factors(torch.eye(3, 1), torch.ones(1), torch.eye(1, 4))
    >>> update_cosine(one, Factors(-2 * torch.eye(3, 1), torch.ones(1), torch.eye(1, 4))).item()
    -1.0
    """
    shapes = [(f.B.shape[-2], f.A.shape[-1]) for f in (update, other)]
    if shapes[0] != shapes[1]:
        raise ArgumentError("other", f"be an update of the same shape, {shapes[0]}", shapes[1])
    mine, theirs = (Factors(*(finite(name, t) for name, t in zip("BsA", f, strict=True))) for f in (update, other))
    norms = (_inner(mine, mine).clamp_min(0) * _inner(theirs, theirs).clamp_min(0)).sqrt()
    return torch.where(norms > 0, _inner(mine, theirs) / torch.where(norms > 0, norms, 1), 0)


def _inner(left: Factors, right: Factors) -> Tensor:
    """⟨ΔW, ΔW'⟩_F of two updates of one shape."""
    of_B = (left.B * left.s.unsqueeze(-2)).mT @ (right.B * right.s.unsqueeze(-2))
    of_A = left.A @ right.A.mT
    return (of_B * of_A).sum((-2, -1))


def pretrained_lengths(W0: Tensor, update: Factors) -> Tensor:
    """|u_iᵀ W0 v_i|: how long the pretrained weight is along the singular directions of an update.

    Beside σ_i, the update's own length along u_i, v_i, it tells which directions were amplified: σ_i / |u_iᵀ W0 v_i|.

    Args:
        W0: the pretrained weight, (out, in).
        update: its update as `Factors.orthogonal` gives it: u_i in the columns of B, v_i in the rows of A.

    Returns:
        (r,), float64, in the units of W0.

    Raises:
        ArgumentError: a tensor holds a NaN or infinity, or the shapes do not fit.

    Source: NNM-LoRA, figure 1 (b) and (c); the amplification factor is LoRA's (arXiv 2106.09685), section 7.3.

    >>> W0 = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> pretrained_lengths(W0, Factors(torch.eye(3, 2), torch.ones(2), torch.eye(2, 3))).tolist()
    [3.0, 2.0]
    """
    W0, U, Vh = matrices("W0", W0), finite("B", update.B), finite("A", update.A)
    if tuple(W0.shape) != (U.shape[-2], Vh.shape[-1]):
        raise ArgumentError("update", f"fit the shape of W0, {tuple(W0.shape)}", (U.shape[-2], Vh.shape[-1]))
    return ((W0.mT @ U) * Vh.mT).sum(0).abs()
