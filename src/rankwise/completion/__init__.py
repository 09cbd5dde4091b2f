"""Deep and norm-bounded matrix factorisation and completion, as scikit-learn estimators."""

from rankwise.completion.deep_completion import DeepMatrixCompletion
from rankwise.completion.deep_factorization import DeepMatrixFactorization, repeated_singular_values
from rankwise.completion.norm_bounded import NormBoundedCompletion

__all__ = [
    "DeepMatrixCompletion",
    "DeepMatrixFactorization",
    "NormBoundedCompletion",
    "repeated_singular_values",
]
