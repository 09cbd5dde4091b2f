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
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning

from rankwise.checks import require_choice, require_int, require_number
from rankwise.completion.bounded_factors import free_of
from rankwise.completion.bounded_solvers import Iterate, projected, projected_thin, trained
from rankwise.completion.entries import Dense, Entries
from rankwise.completion.estimator import Completion
from rankwise.completion.inputs import plain
from rankwise.errors import ArgumentError
from rankwise.linalg.norms import EXPONENTS

DENSE = 10**8
"""Places of the largest matrix that is formed."""
DOUBTFUL = 1e-4
"""The gap, as a share of the zero matrix's loss, above which the fit is called into doubt."""


class NormBoundedCompletion(Completion):
    """Fill a matrix by one whose norm is at most δ, as near the observed entries as that allows.

    min ½‖Ω ⊙ (X − M)‖_F² with ‖X‖ ≤ δ, at most `rank` ranks. The bound is in units of the data and there is no offset:
    subtract one first if the norm should not pay for it.

    Sparse entries stay sparse with the nuclear norm, and with the Frobenius norm where `solver="nb"` has a rank to keep
    to (it wants one for either). Else the optimum or its certificate is of full rank, and the matrix is formed, up to
    10⁸ places.

    Source: arXiv 2501.19050; the default solver is described above.

    Args:
        bound: δ.
        norm: "spectral", "frobenius" or "nuclear".
        rank: the most ranks. None: any, for which the default solver's optimum is certified.
        solver: "pg", accelerated projected gradient, or "nb", L-BFGS on NB-LoRA's parameters.
        max_iter: iterations, rounded up to the next look at the gap: one in 5 of sparse entries and of "nb".
        tol: the duality gap to end at, as a share of the zero matrix's loss ½‖Ω ⊙ M‖_F².
        random_state: of the perturbations by which "nb" leaves traps, and of sketches of sparse entries.
        verbose: print how it goes.
        device: where to compute. None: on a CUDA device where there is one.

    Attributes:
        factors_: `rankwise.update.Factors` B (m, r), s (r,), A (r, n), on the CPU: a thin singular value decomposition.
        A_free_, B_free_, z_: NB-LoRA's parameters (r, n), (r, m), (r,) of the same matrix.
        gap_: the duality gap as a share of the zero matrix's loss.
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
            return trained(data, bound, self.norm, rank, seed=self._seed())
        if isinstance(data, Dense):
            return enumerate(projected(data, bound, self.norm, rank), 1)
        return projected_thin(data, bound, rank, seed=self._seed())


def _readable(data: Entries, solver: str, norm: str, rank: int | None) -> Entries:
    """The entries as the solver takes them: dense, which it decomposes, or as they are."""
    if isinstance(data, Dense):
        return data
    thin = norm == "nuclear" if solver == "pg" else norm != "spectral" and rank is not None
    if thin:
        return data
    if data.shape[0] * data.shape[1] > DENSE:
        rule = f'have at most {DENSE:,} places where norm="{norm}" and solver="{solver}"'
        raise ArgumentError("X", rule, data.shape)
    zeros = data.data.new_zeros(data.shape)
    return Dense(data.fill(zeros), data.with_data(data.ones).fill(zeros.clone()))
