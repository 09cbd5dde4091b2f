"""A number for each text, or for each pair of texts: similarity, quality, a rating."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rankwise.compare.sections import as_tuple, distinct, known_names, rule
from rankwise.compare.tasks.base import DataSection, Examples, Splits
from rankwise.compare.tasks.sequence import SequenceTask, TextData
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import Trainer

Metric = Literal["spearman", "pearson", "mse"]
Metrics = Annotated[
    tuple[Metric, ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    AfterValidator(distinct),
    rule("be a list of different metrics among spearman, pearson, mse"),
    known_names(Metric, "metrics of the task"),
]


class Regression(SequenceTask):
    """One number for each text. Scores: Spearman's and Pearson's correlation with the truth."""

    type: Literal["regression"] = "regression"
    metrics: Metrics = ("spearman", "pearson")
    """What is measured; the first one ranks: the two correlations (of STS-B), or mse, the mean squared error."""

    data_section: ClassVar[DataSection] = TextData

    def target(self, value: Any, source: str, row: int) -> float:
        """The target as a float; CSV files hold theirs as text."""
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{source} has a target in row {row} that is not a finite number: {value!r}")
        return number

    def config_changes(self, splits: Splits) -> dict[str, Any]:
        """One output, trained by the squared error."""
        return {"num_labels": 1, "problem_type": "regression"}

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """What the SPEC asks to measure, by SciPy and scikit-learn."""
        from scipy.stats import pearsonr, spearmanr
        from sklearn.metrics import mean_squared_error

        truth = examples["label"]
        guess = self.predictions(trainer, examples, splits).squeeze(-1)
        ways: dict[str, Callable[[], float]] = {
            "spearman": lambda: _defined(spearmanr(truth, guess)[0]),
            "pearson": lambda: _defined(pearsonr(truth, guess)[0]),
            "mse": lambda: float(mean_squared_error(truth, guess)),
        }
        return {name: ways[name]() for name in self.metrics}


def _defined(correlation: Any) -> float:
    """A correlation; 0 where it is undefined because the model predicts one value for all."""
    return float(correlation) if math.isfinite(correlation) else 0.0
