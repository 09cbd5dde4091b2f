"""Deep matrix factorisation: gradient descent on a deep product, at full width or in the subspace in which it moves.

Source: Yaras, Wang, Balzano and Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
arXiv 2406.04112, section 2:

    min ½‖f − M‖_F²   (2),   f = W_L ⋯ W_1   (1),   W_l(0) = ε·(orthogonal)   (3),
    W_l ← (1 − ηλ)·W_l − η·∂/∂W_l   (4).

For M of rank r̂ every W_l moves in subspaces of dimension 2r̂ that the start tells; all its other singular values stay
equal to one number ρ_l (theorem 2.1), which follows `repeated_singular_values`. The compressed product
U·(W_L ⋯ W_1)·Vᵀ (8) of 2r̂ × 2r̂ factors takes the same way up to (d − 2r̂)·∏ε² (proposition 2.2).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from rankwise.checks import require_choice, require_int, require_number
from rankwise.completion.descent import descent, sides
from rankwise.completion.entries import Dense
from rankwise.completion.inputs import device_of, plain
from rankwise.completion.starts import compressed_start, full_start
from rankwise.errors import ArgumentError
from rankwise.update import Factors


class Step(NamedTuple):
    """The factors before a step of gradient descent, from left to right, and ‖f − M‖_F/‖M‖_F there."""

    weights: list[np.ndarray]
    error: float


class DeepMatrixFactorization(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Factorise a full matrix as a deep product, by plain gradient descent.

    min ½‖M/‖M‖₂ − f‖_F² over f = W_L ⋯ W_1, or its compressed form f = U·(W_L ⋯ W_1)·Vᵀ with U and V fixed.
    Matrices with missing entries are `DeepMatrixCompletion`'s.

    Source: arXiv 2406.04112, equations 1 to 4, 8 and 9.

    Args:
        rank: r̂, what M's rank is at most; the compressed factors are 2r̂ × 2r̂, and r̂ components are kept.
        depth: L ≥ 2.
        width: "compressed", or "full" for factors of width max(m, n).
        init_scale: ε.
        learning_rate: η, for M of spectral norm 1. None: 1/L.
        weight_decay: λ, for M of spectral norm 1.
        max_iter: the most steps.
        tol: the relative error at which it ends.
        random_state: of the orthogonal start.
        verbose: print how it goes.
        device: where to compute. None: on a CUDA device where there is one.

    Attributes:
        weights_: the factors of f from left to right, W_L first; in the compressed form U and Vᵀ are the outer ones.
        scale_: ‖M‖₂, by which the product is multiplied.
        components_: (r̂, n), the leading right singular vectors of f, as rows.
        singular_values_: (r̂,), those of scale_·f.
        n_iter_: steps taken.
        loss_curve_: ‖f − M‖_F/‖M‖_F before each step.

    >>> rng = np.random.default_rng(0)
    >>> M = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 20))
    >>> model = DeepMatrixFactorization(rank=2, tol=1e-6).fit(M)
    >>> bool(np.linalg.norm(model.reconstruct() - M) < 1e-6 * np.linalg.norm(M)), model.transform(M).shape
    (True, (30, 2))
    """

    def __init__(
        self,
        rank: int = 10,
        *,
        depth: int = 3,
        width: str = "compressed",
        init_scale: float = 1e-2,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
        max_iter: int = 10_000,
        tol: float = 1e-4,
        random_state: Any = None,
        verbose: bool | int = False,
        device: str | None = None,
    ) -> None:
        self.rank = rank
        self.depth = depth
        self.width = width
        self.init_scale = init_scale
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state
        self.verbose = verbose
        self.device = device

    def fit(self, X: Any, y: object = None) -> Self:
        """Factorise X (m, n).

        Raises:
            ArgumentError: a parameter that breaks its rule, or X as (rows, columns, values).
            ValueError: NaN or infinities in X.
        """
        M = self._read(X, reset=True)
        self.loss_curve_, weights, error = [], [], math.inf
        for weights, error in self._descend(M):  # noqa: B007  the last are kept
            self.loss_curve_.append(error)
            if self.verbose and len(self.loss_curve_) % 100 == 1:
                print(f"{type(self).__name__}: {len(self.loss_curve_) - 1} steps, error {error:.2e}", flush=True)
            if error <= self.tol or len(self.loss_curve_) > self.max_iter:
                break
        self.n_iter_ = len(self.loss_curve_) - 1
        if error > self.tol:
            sentence = f"gradient descent was at a relative error of {error:.1e} after max_iter={self.max_iter} steps"
            warnings.warn(sentence, ConvergenceWarning, stacklevel=2)
        self._keep(weights, M)
        return self

    def iterate(self, X: Any) -> Iterator[Step]:
        """The weights before each step of gradient descent on X, without end: what the theory is about."""
        for weights, error in self._descend(self._read(X, reset=True)):
            yield Step([weight.cpu().numpy().copy() for weight in weights], error)

    def transform(self, X: Any) -> np.ndarray:
        """Coefficients (k, r̂) of rows X (k, n) in the learnt row space: the least-squares ones, X·components_ᵀ."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X @ self.components_.T

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Rows (k, n) of coefficients (k, r̂)."""
        check_is_fitted(self)
        return np.asarray(X) @ self.components_

    def reconstruct(self) -> np.ndarray:
        """The fitted matrix scale_·f (m, n)."""
        check_is_fitted(self)
        P, Q = sides([torch.from_numpy(weight) for weight in self.weights_])
        return (self.scale_ * P @ Q.mT).numpy()

    def _read(self, X: Any, *, reset: bool) -> Tensor:
        require_int("rank", plain(self.rank), least=1)
        require_int("depth", plain(self.depth), least=2)
        require_choice("width", self.width, ("compressed", "full"))
        require_number("init_scale", plain(self.init_scale), least=1e-10)
        if self.learning_rate is not None:
            require_number("learning_rate", plain(self.learning_rate), least=1e-10)
        require_number("weight_decay", plain(self.weight_decay))
        require_int("max_iter", plain(self.max_iter), least=1)
        require_number("tol", plain(self.tol))
        if isinstance(X, tuple):
            raise ArgumentError("X", "be a full matrix, not (rows, columns, values)", f"a tuple of {len(X)}")
        X = validate_data(self, X, reset=reset, dtype=[np.float64, np.float32], copy=True)
        return torch.from_numpy(X).to(device_of(self.device))

    def _descend(self, M: Tensor) -> Iterator[tuple[list[Tensor], float]]:
        data = M / _norm(M)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        entries = Dense(data, torch.ones_like(data))
        if self.width == "full":
            chain = full_start((data.shape[0], data.shape[1]), self.depth, self.init_scale, seed=seed, dtype=data.dtype)
            chain = [factor.to(data.device) for factor in chain]
        else:
            r = min(2 * self.rank, *data.shape)
            chain = compressed_start(entries, r, self.depth, self.init_scale, seed=seed)
        steps = descent(
            entries,
            chain,
            rate=self.learning_rate or 1 / self.depth,
            outer_ratio=None if self.width == "full" else 0.0,
            weight_decay=self.weight_decay,
        )
        whole = float(torch.linalg.matrix_norm(data)) or 1.0
        return ((weights, math.sqrt(2 * loss) / whole) for weights, loss in steps)

    def _keep(self, weights: Sequence[Tensor], M: Tensor) -> None:
        self.scale_ = _norm(M)
        P, Q = sides(weights)
        r = min(self.rank, *M.shape)
        _, S, Vh = Factors(P, P.new_ones(P.shape[1]), Q.mT).orthogonal()
        self.components_ = Vh[:r].to(M.dtype).cpu().numpy()
        self.singular_values_ = (self.scale_ * S[:r]).to(M.dtype).cpu().numpy()
        self.weights_ = [weight.cpu().numpy().copy() for weight in weights]

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "components_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


def repeated_singular_values(
    scales: Sequence[float], *, learning_rate: float, weight_decay: float = 0.0
) -> Iterator[tuple[float, ...]]:
    """ρ_1(t), …, ρ_L(t) for t = 0, 1, …: ρ_l ← ρ_l·(1 − ηλ − η·∏_{k≠l} ρ_k²), from ρ_l(0) = ε_l, without end.

    The value that d − 2r̂ singular values of every W_l share while M of rank r̂ is factorised at full width.
    Source: arXiv 2406.04112, equation 6.

    >>> from itertools import islice
    >>> [rho[0] for rho in islice(repeated_singular_values((0.5, 0.5), learning_rate=1.0), 2)]
    [0.5, 0.375]
    """
    rho = tuple(float(scale) for scale in scales)
    while True:
        yield rho
        others = [math.prod(r**2 for k, r in enumerate(rho) if k != layer) for layer in range(len(rho))]
        rho = tuple(
            r * (1 - learning_rate * weight_decay - learning_rate * other) for r, other in zip(rho, others, strict=True)
        )


def _norm(M: Tensor) -> float:
    return float(torch.linalg.matrix_norm(M, 2)) or 1.0
