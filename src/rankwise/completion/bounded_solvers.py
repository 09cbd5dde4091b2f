"""The two ways to fit a matrix within a ball: projected gradient, dense or thin, and training NB-LoRA's parameters.

All work on data of ‖Ω ⊙ M‖_F = 1, so that the zero matrix's loss is ½, and go on without end.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, svds
from torch import Tensor

from rankwise.completion.balls import dual_norm, onto_ball, values_onto_ball
from rankwise.completion.bounded_factors import Free, factors, free_of
from rankwise.completion.entries import Dense, Entries
from rankwise.completion.misfit import misfit
from rankwise.completion.quasi_newton import EACH, quasi_newton
from rankwise.completion.starts import SMALL, leading

NUDGE = 0.05
"""What the parameters are moved by where training has come to rest away from the optimum."""
EXTRA = 5
"""Singular vectors that thin iterates follow beside those that they keep."""
LANCZOS = 64
"""Vectors that its norm is found with."""
LOOK = 5
"""Thin iterations between looks at the gap, whose norm costs about as much as they do."""


class Iterate(NamedTuple):
    """A point on the way, within the ball: its decomposition, and its gap as a share of the zero matrix's loss."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    gap: float
    loss: float


def projected(data: Dense, bound: float, norm: str, rank: int) -> Iterator[Iterate]:
    """Accelerated projected gradient at the step 1 that the loss allows, its momentum given up where the loss rises."""
    X = torch.zeros_like(data.data)
    ahead, momentum, before = X, 1.0, float("inf")
    while True:
        U, S, Vh = onto_ball(ahead - (ahead * data.ones - data.data), bound, norm, rank=rank)
        new = (U * S) @ Vh
        found = _judged(data, U, S, Vh, bound, norm)
        yield found
        if found.loss > before:
            momentum = 1.0
        following = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = new + (momentum - 1) / following * (new - X)
        X, momentum, before = new, following, found.loss


class Point(NamedTuple):
    """X = P·Qᵀ and its values on Ω."""

    P: Tensor
    Q: Tensor
    values: Tensor

    def beyond(self, other: Point, share: float) -> Point:
        """X + share·(X − the other's)."""
        P, Q = torch.cat([(1 + share) * self.P, -share * other.P], 1), torch.cat([self.Q, other.Q], 1)
        return Point(P, Q, torch.lerp(other.values, self.values, 1 + share))


def projected_thin(data: Entries, bound: float, rank: int, *, seed: int) -> Iterator[tuple[int, Iterate]]:
    """`projected` onto a nuclear ball, with nothing dense: every iterate is of low rank, every gradient zero off Ω.

    The leading singular triplets of their sum, which are all that the projection keeps, come from subspace iteration
    that goes on from one iterate to the next.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    here = data.data.new_zeros
    X = ahead = Point(here(data.shape[0], 0), here(data.shape[1], 0), torch.zeros_like(data.data))
    block, momentum, before = X.Q, 1.0, float("inf")
    for spent in itertools.count(1):
        block, (U, S, Vh) = _projection(data, ahead, block, bound, rank, generator)
        new = Point(U * S, Vh.mT, data.at(U * S, Vh.mT))
        loss = float(0.5 * (new.values - data.data).square().sum())
        if spent % LOOK == 0:
            yield spent, _judged(data, U, S, Vh, bound, "nuclear")
        if loss > before:
            momentum = 1.0
        following = 0.5 * (1 + (1 + 4 * momentum**2) ** 0.5)
        ahead = new.beyond(X, (momentum - 1) / following)
        X, momentum, before = new, following, loss


def _projection(
    data: Entries, ahead: Point, block: Tensor, bound: float, rank: int, generator: torch.Generator
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The nearest matrix within the nuclear ball to `ahead` less the gradient there, and the vectors to go on from."""
    (P, Q, values), least = ahead, min(data.shape)
    residual = data.data - values

    def left(V: Tensor) -> Tensor:
        return torch.linalg.qr(P @ (Q.mT @ V) + data.times(residual, V)).Q

    def right(U: Tensor) -> Tensor:
        return Q @ (P.mT @ U) + data.transposed_times(residual, U)

    while True:
        more = max(0, min(max(2 * EXTRA, block.shape[1] + EXTRA), least) - block.shape[1])
        V = torch.cat([block, torch.randn(len(Q), more, generator=generator).to(block)], 1)
        U = left(right(left(V)))
        V, S, Uh = torch.linalg.svd(right(U), full_matrices=False)
        kept = values_onto_ball(S[:rank], bound, "nuclear")
        r = max(1, int((kept > 0).sum()))
        if r < V.shape[1] or r in (rank, least):
            return V[:, : r + EXTRA], (U @ Uh.mT[:, :r], kept[:r], V[:, :r].mT)
        block = torch.cat([V, torch.randn(V.shape, generator=generator).to(V)], 1)[:, :least]


def trained(data: Entries, bound: float, norm: str, rank: int, *, seed: int) -> Iterator[tuple[int, Iterate]]:
    """L-BFGS on Ã, B̃ and z from the projection of Ω ⊙ M over the share observed.

    Where it rests it is nudged and goes on, since z_j = 0 is a trap.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    U, S, Vh = leading(data, rank, seed=seed)
    S = values_onto_ball(S * (data.shape[0] * data.shape[1] / data.count), bound, norm)
    free = free_of(U, S, Vh, bound, norm)
    spent = 0
    while True:
        leaves = Free(*(part.contiguous().clone().requires_grad_() for part in free))
        last = float("inf")
        for loss in quasi_newton(leaves, lambda leaves=leaves: _loss(data, leaves, bound, norm)):
            spent += EACH
            with torch.no_grad():
                U, S, Vh = factors(leaves, bound, norm).orthogonal()
                yield spent, _judged(data, U, S, Vh, bound, norm)
            if last - loss <= 1e-9 * loss:
                break
            last = loss
        found = [leaves.A.detach(), leaves.B.detach(), leaves.z.detach().abs()]
        free = Free(*(part + NUDGE * torch.rand(part.shape, generator=generator).to(part) for part in found))


def _loss(data: Entries, free: Free, bound: float, norm: str) -> Tensor:
    B, s, A = factors(free, bound, norm)
    return misfit(data, B * s, A.mT, center=False)


def _judged(data: Entries, U: Tensor, S: Tensor, Vh: Tensor, bound: float, norm: str) -> Iterate:
    """With its loss and its gap; ‖Ω ⊙ M‖_F is 1 here, so that the zero matrix's loss is ½."""
    values = data.at(U * S, Vh.mT)
    residual = values - data.data
    gap = float((residual * values).sum()) + bound * _dual_norm(data.with_data(residual), norm)
    return Iterate(U, S, Vh, max(gap, 0.0) / 0.5, float(0.5 * residual.square().sum()))


def _dual_norm(residual: Entries, norm: str) -> float:
    """Of the residual, zero off Ω."""
    if isinstance(residual, Dense):
        return dual_norm(residual.data, norm)
    if norm == "frobenius":
        return float(torch.linalg.vector_norm(residual.data))
    return _largest_singular_value(residual)


def _largest_singular_value(entries: Entries) -> float:
    """In full or by Lanczos, to rounding: a few subspace iterations would certify what is not there.

    The largest of a residual at the optimum are equal but for rounding, hence many vectors, and where Lanczos gives up
    all the same, the Frobenius norm, which is no less.
    """
    frobenius, least = float(torch.linalg.vector_norm(entries.data)), min(entries.shape)
    if frobenius == 0 or least == 1:
        return frobenius
    if entries.shape[0] * entries.shape[1] <= SMALL**2:
        return float(torch.linalg.matrix_norm(entries.fill(entries.data.new_zeros(entries.shape)), 2))
    start = np.random.default_rng(0).normal(size=least)
    try:
        found: Any = svds(
            _Product(entries), 1, v0=start, ncv=min(LANCZOS, least), maxiter=least, return_singular_vectors=False
        )
    except ArpackNoConvergence:
        return frobenius
    return float(found[0])


class _Product(LinearOperator):
    """Ω ⊙ M as scipy takes it, one vector at a time."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        super().__init__(np.dtype(np.float64), entries.shape)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        data = self.entries.data
        return self.entries.times(data, torch.from_numpy(x.reshape(-1, 1)).to(data)).cpu().numpy()

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        data = self.entries.data
        return self.entries.transposed_times(data, torch.from_numpy(x.reshape(-1, 1)).to(data)).cpu().numpy()
