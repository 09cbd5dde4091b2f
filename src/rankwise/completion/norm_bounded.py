"""Matrix completion within a ball of the spectral, Frobenius or nuclear norm.

    min ½‖Ω ⊙ (X − M)‖_F²   with ‖X‖ ≤ δ

Source: "Norm-Bounded Low-Rank Adaptation", arXiv 2501.19050, whose parameterisation reaches every such X and leaves
none out of the ball. `solver="nb"` trains it. The default differs on purpose: these balls have exact projections, so
that accelerated projected gradient finds the optimum, with a certificate. By convexity the loss at X exceeds the least
one by at most the duality gap

    ⟨X − M, X⟩_Ω + δ·‖Ω ⊙ (X − M)‖_dual.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from rankwise.checks import require_choice, require_int, require_number
from rankwise.completion.balls import dual_norm, onto_ball, values_onto_ball
from rankwise.completion.bounded_factors import Free, factors, free_of
from rankwise.completion.entries import Dense, Entries
from rankwise.completion.estimator import Completion
from rankwise.completion.inputs import plain
from rankwise.completion.misfit import misfit
from rankwise.completion.quasi_newton import EACH, quasi_newton
from rankwise.completion.starts import leading
from rankwise.errors import ArgumentError
from rankwise.linalg.norms import EXPONENTS

DENSE = 10**8
"""Entries of the largest matrix whose decompositions are taken."""
NUDGE = 0.05
"""What the parameters are moved by where training has come to rest away from the optimum."""
DOUBTFUL = 1e-4
"""The gap, as a share of the zero matrix's loss, above which the fit is called into doubt."""


class Iterate(NamedTuple):
    """A point on the way, within the ball: its decomposition, and its gap as a share of the zero matrix's loss."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    gap: float
    loss: float


class NormBoundedCompletion(Completion):
    """Fill a matrix by one whose norm is at most δ, as near the observed entries as that allows.

    min ½‖Ω ⊙ (X − M)‖_F² with ‖X‖ ≤ δ, at most `rank` ranks. The bound is in units of the data and there is no offset:
    subtract one first if the norm should not pay for it. Sparse entries are made dense (up to 10⁸ places) but by
    `solver="nb"` with a rank and a Frobenius or nuclear norm.

    Source: arXiv 2501.19050; the default solver is described above.

    Args:
        bound: δ.
        norm: "spectral", "frobenius" or "nuclear".
        rank: the most ranks. None: any, for which the default solver's optimum is certified.
        solver: "pg", accelerated projected gradient, or "nb", L-BFGS on NB-LoRA's parameters.
        max_iter: iterations.
        tol: the duality gap to end at, as a share of the zero matrix's loss ½‖Ω ⊙ M‖_F².
        random_state: of the perturbations by which "nb" leaves traps.
        verbose: print how it goes.
        device: where to compute. None: on a CUDA device where there is one.

    Attributes:
        factors_: `rankwise.update.Factors` B (m, r), s (r,), A (r, n), on the CPU: a thin singular value decomposition.
        A_free_, B_free_, z_: NB-LoRA's parameters (r, n), (r, m), (r,) of the same matrix.
        gap_: the duality gap as a share of the zero matrix's loss; of sparse entries with the nuclear norm an estimate,
            since it rests on the largest singular value of a sparse matrix.
        rank_, n_iter_, loss_curve_: r; iterations; ‖Ω ⊙ (X − M)‖_F/‖Ω ⊙ M‖_F as the fit went on.
        offset_: 0.

    >>> import numpy as np
    >>> M = np.array([[4.0, np.nan], [2.0, 1.0]])
    >>> model = NormBoundedCompletion(bound=3.0, norm="nuclear").fit(M)
    >>> bool(np.linalg.norm(model.reconstruct(), "nuc") <= 3.0 + 1e-12), bool(model.gap_ <= 1e-6)
    (True, True)
    """

    def __init__(
        self,
        bound: float = 1.0,
        *,
        norm: str = "nuclear",
        rank: int | None = None,
        solver: str = "pg",
        max_iter: int = 5000,
        tol: float = 1e-6,
        random_state: Any = None,
        verbose: bool | int = False,
        device: str | None = None,
    ) -> None:
        self.bound = bound
        self.norm = norm
        self.rank = rank
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose
        self.device = device

    def _check(self) -> None:
        """Raise unless every parameter keeps its rule."""
        require_number("bound", plain(self.bound), least=sys.float_info.min)
        require_choice("norm", self.norm, tuple(EXPONENTS))
        require_choice("solver", self.solver, ("pg", "nb"))
        if self.rank is not None:
            require_int("rank", plain(self.rank), least=1)
        require_int("max_iter", plain(self.max_iter), least=1)
        require_number("tol", plain(self.tol))

    def _fit(self, entries: Entries) -> None:
        """Set what fitting sets."""
        dtype, entries = entries.data.dtype, entries.exact()  # a gap of 1e-6 is a few roundings of float32
        largest = float(entries.data.abs().max()) or 1.0  # first, so that no square overflows or vanishes
        size = largest * (float(torch.linalg.vector_norm(entries.data / largest)) or 1.0)
        data = _readable(entries.with_data(entries.data / size), self.solver, self.norm, self.rank)
        bound = self.bound / size
        rank = min(self.rank or min(data.shape), *data.shape)
        self.loss_curve_ = []
        best: Iterate | None = None
        for spent, now in self._iterates(data, bound, rank):
            self.n_iter_ = spent
            self.loss_curve_.append((2 * now.loss) ** 0.5)
            self._say(f"{spent} iterations, relative error {self.loss_curve_[-1]:.2e}, gap {now.gap:.1e}")
            best = now if best is None or now.gap <= best.gap else best
            if now.gap <= self.tol or spent >= self.max_iter:
                break
        assert best is not None
        self.gap_ = best.gap
        if best.gap > max(self.tol, DOUBTFUL if self.solver == "nb" or self.rank else 0.0):
            warnings.warn(
                f"the fit may not be the nearest within the bound: after {self.n_iter_} iterations its duality gap is "
                f"{best.gap:.1e} of the zero matrix's loss",
                ConvergenceWarning,
                stacklevel=3,
            )
        self._encode(data, best, bound, size, dtype)

    def _encode(self, data: Entries, best: Iterate, bound: float, size: float, dtype: torch.dtype) -> None:
        """The matrix as its decomposition without zeros, and as NB-LoRA's parameters."""
        r = max(1, int((best.S > 0).sum()))
        U, S, Vh = best.U[:, :r], best.S[:r], best.Vh[:r]
        free = free_of(U, S, Vh, bound, self.norm)
        self.A_free_, self.B_free_, self.z_ = (part.to(dtype).cpu().numpy() for part in free)
        self._keep(data, (U * (S * size)).to(dtype), Vh.mT.to(dtype), 0.0)

    def _iterates(self, data: Entries, bound: float, rank: int) -> Iterator[tuple[int, Iterate]]:
        if self.solver == "nb":
            return _trained(data, bound, self.norm, rank, self._seed())
        assert isinstance(data, Dense)
        return enumerate(_projected(data, bound, self.norm, rank), 1)


def _projected(data: Dense, bound: float, norm: str, rank: int) -> Iterator[Iterate]:
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


def _trained(data: Entries, bound: float, norm: str, rank: int, seed: int) -> Iterator[tuple[int, Iterate]]:
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
    return float(leading(residual, 1, seed=0).s[0])


def _readable(data: Entries, solver: str, norm: str, rank: int | None) -> Entries:
    """The entries as the solver takes them: dense, which it decomposes, or as they are."""
    if isinstance(data, Dense):
        return data
    if solver == "nb" and norm != "spectral" and rank is not None:
        return data
    if data.shape[0] * data.shape[1] > DENSE:
        rule = f'have at most {DENSE:,} places, or go with solver="nb", a rank and a Frobenius or nuclear norm'
        raise ArgumentError("X", rule, data.shape)
    zeros = data.data.new_zeros(data.shape)
    return Dense(data.fill(zeros), data.with_data(data.ones).fill(zeros.clone()))
