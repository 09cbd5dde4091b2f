"""What users hand over as a matrix with missing entries: NaN in an array, a sparse matrix, or triplets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.validation import validate_data

from rankwise.completion.entries import Dense, Entries, Sparse
from rankwise.errors import ArgumentError


def observed(estimator: Any, X: Any, *, reset: bool) -> Entries:
    """The observed entries of X, float32 where X is and float64 else.

    Observed are the entries of an array that are not NaN; those that a scipy sparse matrix stores, zeros among them;
    the values of three equally long sequences (rows, columns, values). A stored NaN is missing, too.

    Raises:
        ArgumentError: triplets that are none, an entry given twice.
        ValueError: from scikit-learn, for infinities, other than two dimensions or another number of columns than in
            `fit`.
    """
    if isinstance(X, tuple):
        X = _from_triplets(X, None if reset else estimator.n_features_in_)
    if sparse.issparse(X):
        X = sparse.coo_array(X)
        if X.ndim != 2:
            raise ArgumentError("X", "have two dimensions", X.shape)
        _refuse_repeated(X)
    X = validate_data(
        estimator,
        X,
        reset=reset,
        dtype=[np.float64, np.float32],
        ensure_all_finite="allow-nan",
        accept_sparse="coo",
    )
    return _sparse(X) if sparse.issparse(X) else _dense(X)


def plain(value: object) -> object:
    """A number of numpy's, as searches over parameters give them, as Python's; all else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def device_of(given: str | None) -> torch.device:
    """The device asked for; None: a CUDA device where torch has one, else the CPU."""
    return torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))


def _dense(X: np.ndarray) -> Dense:
    seen = ~np.isnan(X)
    return Dense(torch.from_numpy(np.where(seen, X, 0)), torch.from_numpy(seen.astype(X.dtype)))


def _sparse(X: Any) -> Sparse:
    seen = ~np.isnan(X.data)
    rows, columns = (torch.from_numpy(at[seen].astype(np.int64)) for at in X.coords)
    return Sparse(rows, columns, torch.from_numpy(X.data[seen]), X.shape)


def _from_triplets(X: tuple[Any, ...], width: int | None) -> Any:
    """The matrix that (rows, columns, values) tell, as large as they say, or of that many columns."""
    parts = [np.asarray(part) for part in X]
    if len(parts) != 3 or any(part.ndim != 1 or len(part) != len(parts[0]) for part in parts):
        shapes = tuple(part.shape for part in parts)
        raise ArgumentError("X", "be an array, a sparse matrix, or three equally long rows, columns, values", shapes)
    rows, columns, values = parts
    whole = all(np.issubdtype(at.dtype, np.integer) for at in (rows, columns))
    if not whole or len(rows) == 0 or min(rows.min(), columns.min()) < 0:
        raise ArgumentError("X", "have whole numbers ≥ 0 for rows and columns", (rows[:3], columns[:3]))
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    shape = None if width is None else (int(rows.max()) + 1, max(width, int(columns.max()) + 1))
    return sparse.coo_array((values, (rows, columns)), shape=shape)


def _refuse_repeated(X: Any) -> None:
    """Neither their sum, as scipy takes them, nor their mean need be what is meant."""
    places = np.sort(X.coords[0].astype(np.int64) * X.shape[1] + X.coords[1])
    repeated = places[:-1][places[1:] == places[:-1]]
    if len(repeated):
        where = tuple(int(at) for at in divmod(repeated[0], X.shape[1]))
        raise ArgumentError("X", "hold each entry once: add up or average those of one place first", where)
