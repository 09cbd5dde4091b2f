"""From a SPEC's tables to its three splits, checked, set aside and drawn."""

from __future__ import annotations

import random

from sklearn.model_selection import train_test_split

from rankwise.compare.tables import read_tables
from rankwise.compare.tasks import Data, Examples, Splits, Task
from rankwise.errors import DataError

_VALIDATION_PART = 0.1
_SEED = 0  # splits are a property of the data: the same for every method and every seed of a comparison


def load_splits(data: Data, task: Task) -> Splits:
    """Read the splits that `data` names, and check them for `task`.

    Without a validation split, a tenth of train becomes it, drawn with a fixed seed from each group of the task (in
    classification label by label: at least one example of every label that has two). `per_label`, where the task has
    it, then keeps that many training examples of each group (all, where there are fewer), also drawn with a fixed
    seed: it counts what is trained on, and nothing else.

    Raises:
        DataError: a table cannot be read, or is not what the task needs.
    """
    examples = {split: task.read(table, data) for split, table in read_tables(data).items()}
    task.check(examples)
    if "validation" not in examples:
        examples["train"], examples["validation"] = _split(examples["train"], task)
    if data.examples_per_group is not None:
        examples["train"] = examples["train"].take(_few(examples["train"], task, data.examples_per_group))
    return Splits(**examples, labels=task.labels(examples["train"]))


def _few(train: Examples, task: Task, per_group: int) -> list[int]:
    """So many rows of each group, drawn."""
    order = list(range(len(train)))
    random.Random(_SEED).shuffle(order)
    place = {row: i for i, row in enumerate(order)}
    groups = [sorted(group, key=lambda row: place[row]) for group in task.groups(train)]
    return [row for group in groups for row in group[:per_group]]


def _split(train: Examples, task: Task) -> tuple[Examples, Examples]:
    """Train without its validation part, and that part."""
    aside = {row for group in task.groups(train) if len(group) > 1 for row in _aside(group)}
    if not aside:
        raise DataError(f"{train.source} has too few rows to set some aside: give `data.validation`")
    return train.take(set(range(len(train))) - aside), train.take(aside)


def _aside(group: list[int]) -> list[int]:
    size = max(1, round(_VALIDATION_PART * len(group)))
    return list(train_test_split(group, test_size=size, random_state=_SEED)[1])
