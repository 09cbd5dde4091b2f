"""Deep matrix completion: the rank from a deep product's bias, then exact.

Source: Yaras, Wang, Balzano and Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
arXiv 2406.04112, section 3. Gradient descent on a deep product of overestimated rank from a small start,

    min ½‖Ω ⊙ (f − M)‖_F²   (10),   f = U·(W_L ⋯ W_1)·Vᵀ   (11),   W_l(0) = ε·I,

finds few ranks by itself. That is `solver="gd"`, the paper's, whose error ends near ε^L after some 1/ε steps. The
default differs on purpose: L-BFGS keeps the bias and needs some 50 iterations, then the rank is read off, and
alternating least squares at that rank end exact where the data are. Adam loses the bias, and alternating least
squares at an overestimated rank overfit: neither is offered.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning

from rankwise.checks import require_bool, require_choice, require_int, require_number
from rankwise.completion.entries import Entries
from rankwise.completion.estimator import Completion
from rankwise.completion.inputs import plain
from rankwise.completion.plan import Plan
from rankwise.completion.solve import Solution, by_descent, by_polish, nothing
from rankwise.completion.standard import standardised

MOST = 50
"""Ranks looked among by default."""
ROUGH = 0.3
"""The relative error of held-out entries above which a fit is called into doubt."""


class DeepMatrixCompletion(Completion):
    """Fill a matrix by a low rank that it finds itself.

    min ½‖Ω ⊙ (U·W_L ⋯ W_1·Vᵀ + μ − M)‖_F² in units of the data, so that fit(c·M + b) = c·fit(M) + b; with the
    default solver the fit then ends at the rank found, by alternating least squares. Where the singular values do not
    break off, ranks and a ridge are chosen by held-out entries and the fit repeated with all.

    Source: arXiv 2406.04112, equations 10 and 11; `solver="gd"` is the paper's, the default is described above.

    Args:
        rank: the most ranks; overestimate it. None: 50, or the smaller side.
        depth: L ≥ 2.
        solver: "lbfgs", or "gd" for plain gradient descent.
        center: fit an offset μ beside the product.
        init_scale: ε. None: 0.1, for gd 3e-3.
        learning_rate: η of gd, the loss being divided by the share observed. None: 1/L.
        outer_lr_ratio: γ of gd, the rate of U and V relative to η.
        max_iter: iterations of L-BFGS, or steps of gd, rounded up to the next look. None: 500, for gd 10,000.
        tol: the relative error of the observed entries at which gd ends.
        early_stopping: fit without a share of the entries and stop when their error rises.
        validation_fraction: that share, in (0, 1); also of the entries that choose where the spectrum does not tell.
        n_iter_no_change: looks without a better held-out error before stopping: one in 5 iterations, 100 steps of gd.
        random_state: of sketches and of what is held out.
        verbose: print how it goes.
        device: where to compute. None: on a CUDA device where there is one.

    Attributes:
        factors_: `rankwise.update.Factors` B (m, r), s (r,), A (r, n), on the CPU: a thin singular value decomposition.
        offset_: μ.
        rank_: r.
        n_iter_: iterations that the fit took, those of its polish among them; tries that chose its rank are not.
        loss_curve_: ‖Ω ⊙ (X − M)‖_F / ‖Ω ⊙ (M − mean)‖_F as the fit went on, at its looks and at its end.
        validation_score_: relative error of held-out entries, where some were; else None.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> M = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 30)) + 5
    >>> X = np.where(rng.random(M.shape) < 0.6, M, np.nan)
    >>> model = DeepMatrixCompletion(rank=15)
    >>> bool(abs(model.fit_transform(X) - M).max() < 1e-8), model.rank_
    (True, 2)
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        depth: int = 3,
        solver: str = "lbfgs",
        center: bool = True,
        init_scale: float | None = None,
        learning_rate: float | None = None,
        outer_lr_ratio: float = 1.0,
        max_iter: int | None = None,
        tol: float = 1e-6,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        random_state: Any = None,
        verbose: bool | int = False,
        device: str | None = None,
    ) -> None:
        self.rank = rank
        self.depth = depth
        self.solver = solver
        self.center = center
        self.init_scale = init_scale
        self.learning_rate = learning_rate
        self.outer_lr_ratio = outer_lr_ratio
        self.max_iter = max_iter
        self.tol = tol
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state
        self.verbose = verbose
        self.device = device

    def _check(self) -> None:
        """Raise unless every parameter keeps its rule."""
        require_choice("solver", self.solver, ("lbfgs", "gd"))
        require_int("depth", plain(self.depth), least=2)
        for name in ("rank", "max_iter"):
            if getattr(self, name) is not None:
                require_int(name, plain(getattr(self, name)), least=1)
        for name in ("init_scale", "learning_rate"):
            if getattr(self, name) is not None:
                require_number(name, plain(getattr(self, name)), least=1e-10)
        require_number("outer_lr_ratio", plain(self.outer_lr_ratio))
        require_number("tol", plain(self.tol))
        require_bool("center", plain(self.center))
        require_bool("early_stopping", plain(self.early_stopping))
        require_number("validation_fraction", plain(self.validation_fraction), least=1e-6, below=1.0)
        require_int("n_iter_no_change", plain(self.n_iter_no_change), least=1)

    def _fit(self, entries: Entries) -> None:
        """Set what fitting sets."""
        plan = self._plan(entries)
        data, units = standardised(entries, center=self.center, seed=plan.seed)
        constant = not bool(data.data.any())
        solution = nothing(data) if constant else (by_descent if self.solver == "gd" else by_polish)(data, plan)
        doubts = _doubts(solution, plan)
        if not constant and self.solver == "lbfgs":
            doubts += _doubts_of_rank(solution, data)
        for sentence in doubts:
            warnings.warn(sentence, ConvergenceWarning, stacklevel=3)
        self._keep(data, solution.P * units.scale, solution.Q, units.scale * solution.offset + units.offset)
        self._ridge = solution.ridge * units.scale
        self.loss_curve_, self.n_iter_ = solution.losses, solution.done
        self.validation_score_ = solution.held_error

    def _plan(self, entries: Entries) -> Plan:
        gd = self.solver == "gd"
        return Plan(
            rank=min(self.rank or MOST, *entries.shape),
            depth=self.depth,
            scale=self.init_scale or (3e-3 if gd else 0.1),
            rate=self.learning_rate or 1 / self.depth,
            outer_ratio=self.outer_lr_ratio,
            most=self.max_iter or (10_000 if gd else 500),
            tol=self.tol,
            center=self.center,
            hold_out=self.early_stopping and entries.count > 1,
            share=self.validation_fraction,
            patience=self.n_iter_no_change,
            seed=self._seed(),
            say=self._say,
        )


def _doubts(solution: Solution, plan: Plan) -> list[str]:
    """What a user should know about how a fit ended, one sentence each."""
    if solution.settled:
        return []
    return [
        f"the fit had not settled after {solution.done} iterations (max_iter={plan.most}): its relative error on "
        f"observed entries is {solution.losses[-1]:.1e}"
    ]


def _doubts_of_rank(solution: Solution, data: Entries) -> list[str]:
    """What a user should know about the rank that was found, one sentence each."""
    (m, n), k, count, doubts = data.shape, solution.P.shape[1], data.count, []
    if k == 0:
        return [
            f"{count} observed entries of a {m} by {n} matrix tell no low rank: held-out ones are met best by a "
            "constant, which is what the fit is"
        ]
    if solution.held_error is not None and solution.held_error > ROUGH:
        doubts.append(
            f"held-out entries are met with a relative error of {solution.held_error:.2f} only: either the matrix is "
            "of no low rank, or too few entries tell it"
        )
    if solution.ridge:
        return doubts
    freedom = k * (m + n - k)
    if count < freedom:
        doubts.append(
            f"{count} observed entries cannot tell rank {k} of a {m} by {n} matrix, which has {freedom} degrees of "
            "freedom: missing entries are guesses"
        )
    counts = torch.cat([side.counts() for side in (data, data.mT)])
    few = int(((counts > 0) & (counts < k)).sum())
    if few:
        doubts.append(f"{few} rows or columns have fewer entries than the rank, {k}: the rest is guessed")
    return doubts
