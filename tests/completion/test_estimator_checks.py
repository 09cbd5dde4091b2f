"""scikit-learn's own checks of its estimators' contract."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from rankwise.completion import DeepMatrixCompletion, DeepMatrixFactorization, NormBoundedCompletion


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [
        DeepMatrixCompletion(5, random_state=0),
        DeepMatrixCompletion(5, solver="gd", max_iter=50, random_state=0),
        DeepMatrixFactorization(2, max_iter=50, random_state=0),
        NormBoundedCompletion(3.0, max_iter=50, random_state=0),
        NormBoundedCompletion(3.0, solver="nb", rank=2, max_iter=20, random_state=0),
    ],
)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)
