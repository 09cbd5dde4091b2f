"""The two ways to complete a matrix by a deep product, in units in which the matrix has a spectral norm of about 1."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rankwise.completion.descent import descent, sides
from rankwise.completion.entries import Entries, split
from rankwise.completion.misfit import misfit, residual
from rankwise.completion.plan import Plan
from rankwise.completion.polish import Fit, balanced, polish
from rankwise.completion.quasi_newton import EACH, quasi_newton
from rankwise.completion.ranks import CLEAR, RIDGES, TRIES, break_off, by_held_out
from rankwise.completion.standard import size
from rankwise.completion.starts import compressed_start, leading, spectral_start
from rankwise.completion.watch import LEFT, Fitted, Look, watched
from rankwise.update import Factors

STEPS = 100
"""Steps of gradient descent between two checks of the error."""
NEAR = 1e-2
"""The relative error at which L-BFGS has found the rank; the polish does the rest."""
FLAT = 0.05
"""L-BFGS has also found the rank once the error is below LEFT and falls by less than 5 % between two checks."""
FREEDOM = 1.2
"""Observed entries per degree of freedom, k·(m + n − k), below which a good fit proves nothing."""
EXACT, NOISY = 1e-5, 0.3
"""A rank is accepted at a relative error below the first; below the second, only with a clear gap in the spectrum."""
ROUNDINGS = 1e3
"""An exact fit has an error of at most so many roundings of the data."""
GROWN = 2.0
"""A fit may have at most so many times the nuclear norm of its start."""
POLISH, POLISHING = 1e-7, 1000
"""The relative fall of the error per iteration that ends the polish, and its most iterations."""


class Solution(NamedTuple):
    """X = P·Qᵀ + offset, and how it was come to."""

    P: Tensor
    Q: Tensor
    offset: float
    losses: list[float]
    done: int
    settled: bool
    held_error: float | None = None
    ridge: float = 0.0


def by_descent(data: Entries, plan: Plan) -> Solution:
    """Plain gradient descent on the compressed product (eq. 11), the loss divided by the share observed."""
    train, held = split(data, plan.share, seed=plan.seed) if plan.hold_out else (data, None)
    width = min(2 * plan.rank, *data.shape)
    chain = compressed_start(train, width, plan.depth, plan.scale, seed=plan.seed)
    share = train.count / (train.shape[0] * train.shape[1])
    steps = descent(train, chain, rate=plan.rate / share, outer_ratio=plan.outer_ratio, center=plan.center)

    fitted = watched(_looks(steps, train), lambda errors: errors[-1] <= plan.tol, train, held, plan)
    P, Q = balanced(*sides(fitted.chain))
    _, offset = residual(train, P, Q, center=plan.center)
    return Solution(P, Q, float(offset), fitted.losses, fitted.done, fitted.settled, fitted.held_error)


def _looks(steps: Iterator[tuple[list[Tensor], float]], train: Entries) -> Iterator[Look]:
    """Every STEPS-th step of a descent: its factors, its relative error, its number."""
    whole = size(train.data)
    for i, (factors, loss) in enumerate(itertools.islice(steps, 0, None, STEPS)):
        relative_error = math.sqrt(2 * loss) / whole
        yield Look(factors, relative_error, STEPS * i)


def by_polish(data: Entries, plan: Plan) -> Solution:
    """L-BFGS on the deep product, then the rank, then alternating least squares at that rank.

    The rank is where the singular values break off, if a fit of that rank leaves nothing or the break is clear; else
    ranks and ridge are what meets held-out entries best, of which none stay held out for the last fit unless asked.
    """
    train, held = split(data, plan.share, seed=plan.seed) if plan.hold_out else (data, None)
    fitted, P, Q = _product(train, held, plan)
    k, ratio = break_off(Factors(P, P.new_ones(P.shape[1]), Q.mT).singular_values(), P.shape[1] - 1)
    plan.say(f"singular values fall most after the first {k}, {ratio:.1f} times")
    if held is None:
        found = _by_break(data, fitted, P, Q, k, ratio, plan)
        if found is not None:
            return found
        train, held = split(data, plan.share, seed=plan.seed)
        start = _product(train, None, plan)[1:]
    else:
        start = P, Q
    choice = by_held_out(train, held, *start, also=k, center=plan.center)
    plan.say(f"{choice.rank} ranks, ridge {choice.ridge:.1e}: relative error {choice.error:.2e} of held-out entries")
    if choice.rank == 0:
        return nothing(data)._replace(losses=fitted.losses, done=fitted.done, held_error=choice.error)
    last = train if plan.hold_out else data
    ridge = choice.ridge * last.count / (last.shape[0] * last.shape[1])
    fit = _polished(last, P, Q, choice.rank, ridge, plan)
    if ridge == 0 and _ran_off(fit, P, choice.rank, last):
        ridge = RIDGES[0] * last.count / (last.shape[0] * last.shape[1])
        fit = _polished(last, P, Q, choice.rank, ridge, plan)
    if ridge == 0 and fit.error <= NEAR * size(last.data):
        fit = _with_faint_ranks(last, fit, plan)
    return _solution(fit, fitted, last)._replace(held_error=choice.error, ridge=ridge)


def _by_break(data: Entries, fitted: Fitted, P: Tensor, Q: Tensor, k: int, ratio: float, plan: Plan) -> Solution | None:
    """The fit at the rank where singular values break off, if it can be believed, or at all the ranks there are."""
    for rank in (k, P.shape[1]) if fitted.losses[-1] <= NEAR else (k,):
        if not _told_by(data, rank) and data.count > 1:
            continue
        fit = _polished(data, P, Q, rank, 0.0, plan)
        error = fit.error / size(data.data)
        if error <= EXACT or (rank == k and ratio >= CLEAR and error <= NOISY) or data.count == 1:
            fit = _without_the_offsets_rank(data, _with_faint_ranks(data, fit, plan), plan)
            return _solution(fit, fitted, data)
    return None


def _ran_off(fit: Fit, P: Tensor, k: int, data: Entries) -> bool:
    """Whether a fit that proves nothing has grown far beyond its start, balanced ones both.

    What too few entries do not tell, least squares may make as large as it likes.
    """
    grown = float(fit.P.square().sum()) > GROWN * float(P[:, :k].square().sum())
    return grown and fit.error > EXACT * size(data.data)


def nothing(data: Entries) -> Solution:
    """No ranks, and the offset that there is already."""
    P, Q = (data.data.new_zeros(side, 0) for side in data.shape)
    return Solution(P, Q, 0.0, [float(data.data.any())], 0, True)


def _product(train: Entries, held: Entries | None, plan: Plan) -> tuple[Fitted, Tensor, Tensor]:
    """L-BFGS from the spectral start: how it ended, and its balanced sides."""
    chain = spectral_start(train, plan.rank, plan.depth, plan.scale, seed=plan.seed)
    factors = [factor.contiguous().clone().requires_grad_() for factor in chain]
    losses = quasi_newton(factors, lambda: misfit(train, *sides(factors), center=plan.center))
    whole = size(train.data)
    in_place = [factor.detach() for factor in factors]  # the same memory: L-BFGS moves them

    def looks() -> Iterator[Look]:
        for i, loss in enumerate(losses, 1):
            relative_error = math.sqrt(2 * loss) / whole
            yield Look(in_place, relative_error, EACH * i)

    fitted = watched(looks(), _told, train, held, plan)
    P, Q = balanced(*sides(fitted.chain))
    return fitted, P, Q


def _told(errors: list[float]) -> bool:
    """Whether L-BFGS has told the rank."""
    flat = len(errors) > 1 and errors[-1] < LEFT and errors[-1] > (1 - FLAT) * errors[-2]
    return errors[-1] <= NEAR or flat


def _polished(data: Entries, P: Tensor, Q: Tensor, k: int, ridge: float, plan: Plan) -> Fit:
    """Alternating least squares from the k leading ranks of a balanced P·Qᵀ."""
    tol, most = POLISH if ridge == 0 else 1e3 * POLISH, POLISHING
    return polish(data, P[:, :k], Q[:, :k], center=plan.center, tol=tol, max_iter=most, ridge=ridge)


def _told_by(data: Entries, k: int) -> bool:
    """Whether there are entries enough for a good fit of k ranks to prove something."""
    return data.count >= FREEDOM * k * (sum(data.shape) - k)


def _with_faint_ranks(data: Entries, fit: Fit, plan: Plan) -> Fit:
    """Add ranks that were too faint for L-BFGS to find, as long as each one halves the error.

    One more rank that only fits noise takes little of the error away. A rank that is really there takes nearly all of
    it where the data is exact.
    """
    rounding = ROUNDINGS * torch.finfo(fit.P.dtype).eps * size(data.data)
    while fit.error > rounding and fit.P.shape[1] < plan.rank and _told_by(data, fit.P.shape[1] + 1):
        # The new rank starts at the leading singular triplet of what the fit leaves over.
        predicted = data.at(fit.P, fit.Q) + fit.offset * data.ones
        left_over = data.with_data(data.data - predicted)
        U, S, Vh = leading(left_over, 1, seed=plan.seed)
        wider_P = torch.cat([fit.P, U * S.sqrt()], dim=1)
        wider_Q = torch.cat([fit.Q, Vh.mT * S.sqrt()], dim=1)

        # A few iterations tell whether the rank is worth the rest.
        tried = polish(data, wider_P, wider_Q, center=plan.center, tol=POLISH, max_iter=TRIES).after(fit)
        if tried.error > 0.5 * fit.error:
            return fit
        fit = polish(data, tried.P, tried.Q, center=plan.center, tol=POLISH, max_iter=POLISHING).after(tried)
    return fit


def _without_the_offsets_rank(data: Entries, fit: Fit, plan: Plan) -> Fit:
    """An exact fit with a rank less, where there is one: a wrong offset takes one of its own."""
    k, exact = fit.P.shape[1], EXACT * size(data.data)
    if not plan.center or k < 2 or fit.error > exact:
        return fit
    P, Q = balanced(fit.P, fit.Q)
    fewer = polish(data, P[:, : k - 1], Q[:, : k - 1], center=True, tol=1e-3, max_iter=10 * TRIES).after(fit)
    if fewer.error > exact:
        return fit
    fewer = polish(data, fewer.P, fewer.Q, center=True, tol=POLISH, max_iter=POLISHING).after(fewer)
    rounding = ROUNDINGS * torch.finfo(fit.P.dtype).eps * size(data.data)
    return fewer if fewer.error <= max(10 * fit.error, rounding) else fit


def _solution(fit: Fit, fitted: Fitted, data: Entries) -> Solution:
    losses = [*fitted.losses, fit.error / size(data.data)]
    settled = fitted.settled and fit.settled
    return Solution(fit.P, fit.Q, float(fit.offset), losses, fitted.done + fit.done, settled)
