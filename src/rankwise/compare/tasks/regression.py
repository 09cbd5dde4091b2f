"""A number for each text, or for each pair of texts: similarity, quality, a rating."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankwise.compare.tasks.base import DataSection, Examples, Splits
from rankwise.compare.tasks.sequence import SequenceTask, TextData
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import Trainer


class Regression(SequenceTask):
    """One number for each text. Scores: Spearman's and Pearson's correlation with the truth."""

    type: Literal["regression"] = "regression"

    data_section: ClassVar[DataSection] = TextData

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is scored."""
        return ("spearman", "pearson")

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
        """Spearman's and Pearson's correlation."""
        from scipy.stats import pearsonr, spearmanr

        truth = examples["label"]
        guess = self.predictions(trainer, examples, splits).squeeze(-1)
        return {"spearman": _defined(spearmanr(truth, guess)[0]), "pearson": _defined(pearsonr(truth, guess)[0])}


def _defined(correlation: Any) -> float:
    """A correlation; 0 where it is undefined because the model predicts one value for all."""
    return float(correlation) if math.isfinite(correlation) else 0.0
