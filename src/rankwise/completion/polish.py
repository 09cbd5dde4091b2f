"""Alternating least squares at a given rank: min ½‖Ω ⊙ (P·Qᵀ + μ − M)‖_F² over P and μ, then over Q and μ, and so on.

Every half step solves for all rows at once, and for the offset μ with them, as corrections of what is there: what
rounding spoils in one, the next mends, so that exact data end exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.completion.entries import Entries
from rankwise.completion.misfit import residual
from rankwise.precision import exact
from rankwise.update import Factors

RIDGE = 1e-10
"""Relative ridge that keeps rows with fewer entries than ranks at their previous value; at least a row's rounding."""
BLOCK = 1 << 25
"""How many numbers the Gram matrices of one block of rows may hold."""


class Fit(NamedTuple):
    """X = P·Qᵀ + μ, and ‖Ω ⊙ (X − M)‖_F."""

    P: Tensor
    Q: Tensor
    offset: Tensor
    error: float
    settled: bool
    """Whether it ended by itself."""
    done: int
    """Iterations."""

    def after(self, other: Fit) -> Fit:
        """With the iterations of the fit that it went on from counted in."""
        return self._replace(done=self.done + other.done)


def polish(
    entries: Entries, P: Tensor, Q: Tensor, *, center: bool, tol: float, max_iter: int, ridge: float = 0.0
) -> Fit:
    """Alternate until the error is rounding, or with its ridge falls by less than `tol` of itself in an iteration.

    Args:
        entries: Ω and M.
        P, Q: (m, k), (n, k), where it starts.
        center: whether there is an offset.
        tol: relative.
        max_iter: the most iterations.
        ridge: λ of ½λ(‖P‖² + ‖Q‖²), added to the loss.

    Returns:
        The fit, whose P is the exact solution for its Q.
    """
    least = 4 * torch.finfo(P.dtype).eps * float(torch.linalg.vector_norm(entries.data))
    offset = residual(entries, P, Q, center=center)[1]
    before, spent = math.inf, 0
    while True:
        held = ridge * float(P.square().sum() + Q.square().sum())
        P, offset, error = _half(entries, P, Q, offset, center, ridge)
        now = math.sqrt(error**2 + held)
        if spent == max_iter or now <= least or before - now <= tol * now:
            break
        before, spent = now, spent + 1
        Q, offset, _ = _half(entries.mT, Q, P, offset, center, ridge)
        P, Q = balanced(P, Q)
    values = entries.at(P, Q).sub_(entries.data).add_(offset * entries.ones)
    return Fit(P, Q, offset, float(torch.linalg.vector_norm(values)), spent < max_iter, spent)


def balanced(P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """P = U·√S and Q = V·√S of the same P·Qᵀ = U·S·Vᵀ, in P's dtype: the factors of least norm."""
    U, S, Vh = Factors(P, P.new_ones(P.shape[1]), Q.mT).orthogonal()
    return (U * S.sqrt()).to(P.dtype), (Vh.mT * S.sqrt()).to(P.dtype)


def rows_given(entries: Entries, Q: Tensor, offset: Tensor, *, ridge: float) -> Tensor:
    """P (m, k) of the least squares for each row of M given Q (n, k) and μ; 0 where a row has no entries."""
    P = entries.data.new_zeros(entries.shape[0], Q.shape[1])
    for _ in range(2):  # the second mends the first's rounding
        P, _, _ = _half(entries, P, Q, offset, False, ridge)
    return P


def _half(
    entries: Entries, P: Tensor, Q: Tensor, offset: Tensor, center: bool, ridge: float
) -> tuple[Tensor, Tensor, float]:
    """P and μ at their optimum given Q, and the error before.

    With R the residual of row i on Ω, G = Σ q_j·q_jᵀ over its entries, h = Σ R_j·q_j and g = Σ q_j, its correction is
    (G + λI)⁻¹(h − λp − Δμ·g), and Δμ is where the residuals that are left sum to 0.
    """
    moved, per_offset = torch.empty_like(P), torch.empty_like(P)
    error = spare = left = 0.0
    for block, rows in _blocks(entries, Q.shape[1]):
        R = rows.data - rows.at(P[block], Q) - offset * rows.ones
        h, g = rows.times(R, Q), rows.times(rows.ones, Q)
        both = torch.stack([h - ridge * P[block], g], dim=-1)
        solved = _solved(_grams(rows, Q), both, ridge)
        moved[block], per_offset[block] = solved[..., 0], solved[..., 1]
        error += float(exact(R).square().sum())
        spare += float(exact(R).sum() - exact(g * moved[block]).sum())
        left += rows.count - float(exact(g * per_offset[block]).sum())
    told = center and left > torch.finfo(P.dtype).eps ** 0.5 * entries.count
    step = spare / left if told else 0.0
    return P + moved - step * per_offset, offset + step, math.sqrt(error)


def _blocks(entries: Entries, k: int) -> Iterator[tuple[slice, Entries]]:
    """The entries by blocks of rows whose k × k matrices fit in memory."""
    each = max(1, BLOCK // max(1, k) ** 2)
    for start in range(0, entries.shape[0], each):
        block = slice(start, min(start + each, entries.shape[0]))
        yield block, entries if block == slice(0, entries.shape[0]) else entries.rows(block)


def _grams(rows: Entries, Q: Tensor) -> Tensor:
    """Σ q_j·q_jᵀ over the entries of each row, (m, k, k): each pair of columns once, as many at a time as fit."""
    k = Q.shape[1]
    i, j = torch.triu_indices(k, k, device=Q.device)
    gram = Q.new_empty(rows.shape[0], k, k)
    each = max(1, BLOCK // len(Q))
    for a, b in zip(i.split(each), j.split(each), strict=True):
        pairs = rows.times(rows.ones, Q[:, a] * Q[:, b])
        gram[:, a, b] = pairs
        gram[:, b, a] = pairs
    return gram


def _solved(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(G + λI)⁻¹ times the right-hand sides (rows, k, 2) of each row, in float64."""
    hold = max(RIDGE, 10 * gram.shape[-1] * torch.finfo(gram.dtype).eps)
    gram = exact(gram)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    own = diagonal.mean(-1, keepdim=True)
    diagonal += ridge + torch.where(own > 0, hold * own, 1.0)
    return torch.linalg.solve_ex(gram, exact(right)).result.to(right.dtype)
