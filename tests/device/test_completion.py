"""`rankwise.completion` with `device=…` finds what it finds on the CPU, and gives arrays of the host."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from planted import planted, relative_error
from rankwise.completion import DeepMatrixCompletion, DeepMatrixFactorization, NormBoundedCompletion

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device

M, X = planted(40, 30, 2, 0.6, 0)


def as_sparse(array: np.ndarray) -> Any:
    """The observed entries alone."""
    rows, columns = np.nonzero(~np.isnan(array))
    return sparse.coo_array((array[rows, columns], (rows, columns)), shape=array.shape)


@pytest.mark.parametrize("form", [lambda X: X, as_sparse], ids=["array", "sparse"])
def test_a_matrix_is_completed(form: Any, device: torch.device) -> None:
    model = DeepMatrixCompletion(8, random_state=0, device=str(device)).fit(form(X))
    assert model.rank_ == 2
    assert relative_error(model.reconstruct(), M) <= 1e-8
    assert all(part.device.type == "cpu" for part in model.factors_)
    row = X[:3].copy()
    assert relative_error(model.transform(row), M[:3]) <= 1e-6


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "nuclear"])
def test_a_matrix_is_completed_within_a_ball(norm: str, device: torch.device) -> None:
    order: Any = {"spectral": 2, "frobenius": "fro", "nuclear": "nuc"}[norm]
    bound = 0.6 * float(np.linalg.norm(M, order))
    found = []
    for where in ("cpu", str(device)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found.append(NormBoundedCompletion(norm=norm, bound=bound, random_state=0, device=where).fit(X))
    here, there = found
    assert float(np.linalg.norm(there.reconstruct(), order)) <= bound * (1 + 1e-6)
    assert relative_error(there.reconstruct(), here.reconstruct()) <= 1e-3


def test_a_matrix_is_factored(device: torch.device) -> None:
    found = []
    for where in ("cpu", str(device)):
        found.append(DeepMatrixFactorization(4, random_state=0, device=where).fit(M))
    here, there = found
    np.testing.assert_allclose(there.singular_values_, here.singular_values_, rtol=1e-4, atol=1e-6)
    assert all(isinstance(weight, np.ndarray) for weight in there.weights_)
