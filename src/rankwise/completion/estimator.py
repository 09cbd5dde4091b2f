"""What the completions share as scikit-learn estimators: how they read, fill and tell."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Self

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from rankwise.completion.entries import Entries
from rankwise.completion.inputs import device_of, observed
from rankwise.completion.polish import rows_given
from rankwise.errors import ArgumentError
from rankwise.update import Factors


class Completion(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """A low-rank matrix X = B·diag(s)·A + offset that fits observed entries and tells the missing ones."""

    factors_: Factors
    offset_: float
    rank_: int
    n_iter_: int
    loss_curve_: list[float]
    random_state: Any
    device: str | None
    verbose: bool | int
    _ridge = 0.0

    def fit(self, X: Any, y: object = None) -> Self:
        """Fit the observed entries of X.

        Args:
            X: an (m, n) array in which NaN is missing; or a scipy sparse matrix, or a tuple (rows, columns, values),
                whose absent entries are missing.
            y: ignored.

        Raises:
            ArgumentError: a parameter that breaks its rule, nothing observed, an entry given twice.
            ValueError: infinities in X.
        """
        self._check()
        entries = observed(self, X, reset=True)
        if entries.count == 0:
            raise ArgumentError("X", "hold at least one entry that is not missing", "none")
        empty = sum(int((side.counts() == 0).sum()) for side in (entries, entries.mT))
        if empty:
            sentence = f"{empty} rows or columns have no observed entry: they are filled with the offset"
            warnings.warn(sentence, ConvergenceWarning, stacklevel=2)
        self._fit(entries.to(device_of(self.device)))
        return self

    def fit_transform(self, X: Any, y: object = None) -> np.ndarray:  # type: ignore[override]
        """Fit the array X, and fill its missing entries by the fit; the observed ones stay as they are.

        Raises:
            ArgumentError: X is sparse: the dense matrix is formed by `reconstruct()` alone.
        """
        if isinstance(X, tuple) or sparse.issparse(X):
            raise ArgumentError("X", "be an array here; of sparse ones take fit, then entries(rows, columns)", type(X))
        found = self.fit(X).reconstruct()
        return observed(self, X, reset=False).fill(torch.from_numpy(found)).numpy()

    def transform(self, X: Any) -> np.ndarray:
        """Rows X (k, n), new or not, with their missing entries filled; the observed ones stay as they are.

        Of each row the least-squares coefficients in the learnt row space are found from what is observed of it, those
        nearest to 0 where that does not tell them. A row with nothing observed is `offset_` throughout.
        """
        check_is_fitted(self)
        entries = observed(self, X, reset=False)
        _, s, A = self.factors_
        Q = (A.mT * s.sqrt()).to(entries.data.dtype)
        offset = torch.tensor(self.offset_, dtype=Q.dtype)
        P = rows_given(entries, Q, offset, ridge=self._ridge)
        return entries.fill(P @ Q.mT + offset).numpy()

    def reconstruct(self) -> np.ndarray:
        """The fitted matrix X (m, n) itself, dense."""
        check_is_fitted(self)
        return (self.factors_.delta() + self.offset_).numpy()

    def entries(self, rows: Any, columns: Any) -> np.ndarray:
        """X at the given rows and columns, two whole-number arrays of one length; no dense matrix is formed."""
        check_is_fitted(self)
        i, j = (torch.as_tensor(np.asarray(at), dtype=torch.int64) for at in (rows, columns))
        B, s, A = self.factors_
        P, Q = B * s, A.mT.contiguous()
        pieces = zip(i.split(PIECE), j.split(PIECE), strict=True)
        return torch.cat([(P[a] * Q[b]).sum(1) + self.offset_ for a, b in pieces]).numpy()

    def _keep(self, entries: Entries, P: Tensor, Q: Tensor, offset: float) -> None:
        """Keep X = P·Qᵀ + offset as what was learnt, with zero factors for rows and columns without observations."""
        dtype = P.dtype
        P, Q = (side * (seen.counts() > 0)[:, None] for side, seen in ((P, entries), (Q, entries.mT)))
        whole = Factors(P, P.new_ones(P.shape[1]), Q.mT).orthogonal()
        self.factors_ = Factors(*(part.to(dtype).cpu().contiguous() for part in whole))
        self.offset_, self.rank_ = offset, self.factors_.r

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _say(self, sentence: str) -> None:
        if self.verbose:
            print(f"{type(self).__name__}: {sentence}", flush=True)

    @abstractmethod
    def _check(self) -> None:
        """Raise unless every parameter keeps its rule."""

    @abstractmethod
    def _fit(self, entries: Entries) -> None:
        """Set what fitting sets."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


PIECE = 1 << 20
"""Entries told at a time."""
