"""Classes: what classifying texts and images shares, and the classification of texts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.compare.sections import Count, as_tuple, broken_rule, distinct, known_names, rule
from rankwise.compare.tasks.base import Data, DataSection, Examples, Splits
from rankwise.compare.tasks.prediction import PredictionTask
from rankwise.compare.tasks.sequence import SequenceTask, TextData
from rankwise.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from transformers import Trainer

Metric = Literal["accuracy", "macro_f1", "f1", "matthews"]
Metrics = Annotated[
    tuple[Metric, ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    AfterValidator(distinct),
    rule("be a list of different metrics among accuracy, macro_f1, f1, matthews"),
    known_names(Metric, "metrics of the task"),
]


class LabelledData(Data):
    """Examples with labels, names or whole numbers."""

    per_label: Count | None = None
    """How many training examples of each label to keep, for studies with few; left out, all."""

    @model_validator(mode="after")
    def _one_draw(self) -> LabelledData:
        if self.samples is not None and self.per_label is not None:
            broken_rule("be left out where data.samples is given", key="per_label", seen=self.per_label)
        return self

    @property
    def examples_per_group(self) -> int | None:
        """A group is a label."""
        return self.per_label


class ClassificationData(TextData, LabelledData):
    """A text, or two, and its label: a name or a whole number."""


class LabelTask(PredictionTask):
    """One label for each example, which is in the column `label`."""

    metrics: Metrics = ("accuracy", "macro_f1")
    """What is measured; the first one ranks: accuracy, macro_f1 (the mean over the labels), matthews (the correlation
    of CoLA) and, for two labels, f1 (of the second one, as MRPC and QQP have it)."""

    def target(self, value: Any, source: str, row: int) -> str:
        """The label's name."""
        if not isinstance(value, str | int) or value == "":
            raise DataError(f"{source} has a label in row {row} that is neither an integer nor a name: {value!r}")
        return str(value)

    def check(self, examples: Mapping[str, Examples]) -> None:
        """Training has two labels or more, and the other splits have no label that it lacks."""
        train = examples["train"]
        known = set(train["label"])
        if len(known) < 2:
            raise DataError(f"{train.source} has the single label {known.pop()!r}: classification needs two")
        if "f1" in self.metrics and len(known) != 2:
            rule_told = f"be without f1, which is of two labels, for the {len(known)} labels of {train.source}"
            raise ArgumentError("task.metrics", rule_told, list(self.metrics))
        for split in examples.values():
            for label in split["label"]:
                if label not in known:
                    raise DataError(f"{split.source} has the label {label!r}, which {train.source} never shows")

    def labels(self, train: Examples) -> list[str]:
        """The distinct names in order, which is that of the numbers where all of them are integers."""
        names = sorted(set(train["label"]))
        return sorted(names, key=int) if all(re.fullmatch("-?[0-9]+", name) for name in names) else names

    def groups(self, train: Examples) -> list[list[int]]:
        """The rows of each label."""
        rows: dict[str, list[int]] = defaultdict(list)
        for row, label in enumerate(train["label"]):
            rows[label].append(row)
        return list(rows.values())

    def config_changes(self, splits: Splits) -> dict[str, Any]:
        """The number of labels, and their names."""
        names = dict(enumerate(splits.labels or ()))
        return {"num_labels": len(names), "id2label": names, "label2id": {label: i for i, label in names.items()}}

    def targets(self, examples: Examples, splits: Splits) -> list[int]:
        """Each label's place among the names."""
        index = {name: i for i, name in enumerate(splits.labels or ())}
        return [index[label] for label in examples["label"]]

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """What the SPEC asks to measure, by scikit-learn."""
        from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

        truth = self.targets(examples, splits)
        guess = self.predictions(trainer, examples, splits).argmax(-1)
        ways: dict[str, Callable[[], Any]] = {
            "accuracy": lambda: accuracy_score(truth, guess),
            "macro_f1": lambda: f1_score(truth, guess, average="macro", zero_division=0),  # type: ignore[arg-type]  numbers are what it documents
            "f1": lambda: f1_score(truth, guess, zero_division=0),  # type: ignore[arg-type]
            "matthews": lambda: matthews_corrcoef(truth, guess),
        }
        return {name: float(ways[name]()) for name in self.metrics}


class Classification(LabelTask, SequenceTask):
    """One label for each text. Scores: accuracy and the mean F1 over the labels."""

    type: Literal["classification"] = "classification"

    data_section: ClassVar[DataSection] = ClassificationData
