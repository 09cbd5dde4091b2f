"""The kinds of task that can be trained and compared: one file each, all behind `Task`."""

from __future__ import annotations

from rankwise.compare.tasks.base import Data, Examples, Splits, Task
from rankwise.compare.tasks.causal_lm import CausalLm
from rankwise.compare.tasks.classification import Classification
from rankwise.compare.tasks.image_classification import ImageClassification
from rankwise.compare.tasks.multiple_choice import MultipleChoice
from rankwise.compare.tasks.regression import Regression
from rankwise.compare.tasks.seq2seq import Seq2Seq

__all__ = ["TASKS", "Data", "Examples", "Splits", "Task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "regression": Regression,
    "image_classification": ImageClassification,
    "causal_lm": CausalLm,
    "seq2seq": Seq2Seq,
    "multiple_choice": MultipleChoice,
}
"""Every kind of task, by its name in a SPEC."""
