"""From a SPEC's tables to its three splits, checked, set aside and drawn."""

from __future__ import annotations

import dataclasses
import heapq
import random

from sklearn.model_selection import train_test_split

from rankwise.compare.tables import read_tables
from rankwise.compare.tasks import Data, Examples, Splits, Task
from rankwise.errors import ArgumentError, DataError

_VALIDATION_PART = 0.1
_SEED = 0  # splits are a property of the data: the same for every method and every seed of a comparison


def load_splits(data: Data, task: Task) -> Splits:
    """Read the splits that `data` names, and check them for `task`.

    Without a validation split, a tenth of train becomes it, drawn with a fixed seed from each group of the task (in
    classification label by label: at least one example of every label that has two). `per_label`, where the task has
    it, then keeps that many training examples of each group (all, where there are fewer), also drawn with a fixed
    seed: it counts what is trained on, and nothing else.

    `samples` is checked here, and drawn for each seed by `draw`.

    Raises:
        DataError: a table cannot be read, or is not what the task needs.
        ArgumentError: `samples` is more than there are, or too few for every group.
    """
    examples = {split: task.read(table, data) for split, table in read_tables(data).items()}
    task.check(examples)
    if "validation" not in examples:
        examples["train"], examples["validation"] = _split(examples["train"], task)
    if data.examples_per_group is not None:
        examples["train"] = examples["train"].take(_few(examples["train"], task, data.examples_per_group))
    if data.samples is not None:
        _check_samples(data.samples, examples["train"], task)
    return Splits(**examples, labels=task.labels(examples["train"]))


def draw(splits: Splits, task: Task, samples: int | None, seed: int) -> Splits:
    """The splits with so many training examples, drawn for a seed: the same ones for every candidate.

    Each group of the task gets its share of them, and at least one; None draws nothing and keeps all.
    """
    if samples is None:
        return splits
    groups = task.groups(splits.train)
    shuffle = random.Random(seed).shuffle
    rows: list[int] = []
    for group, size in zip(groups, _shares([len(group) for group in groups], samples), strict=True):
        shuffled = sorted(group)
        shuffle(shuffled)
        rows += shuffled[:size]
    return dataclasses.replace(splits, train=splits.train.take(rows))


def _shares(sizes: list[int], samples: int) -> list[int]:
    """How many of `samples` places each group gets: one, and the others by Sainte-Laguë's rule.

    Each place in turn goes to the group with the largest size / (2 · its places + 1), which keeps shares nearest to the
    groups' own and never gives a group more than it holds.
    """
    places = [1] * len(sizes)
    queue = [(-size / 3, group) for group, size in enumerate(sizes)]
    heapq.heapify(queue)
    for _ in range(samples - len(sizes)):
        _, group = queue[0]
        places[group] += 1
        heapq.heapreplace(queue, (-sizes[group] / (2 * places[group] + 1), group))
    return places


def _check_samples(samples: int, train: Examples, task: Task) -> None:
    groups = len(task.groups(train))
    if not groups <= samples <= len(train):
        rule = f"be from {groups}, one for each label, to {len(train)}, the training examples of {train.source}"
        if groups == 1:
            rule = f"be at most {len(train)}, the training examples of {train.source}"
        raise ArgumentError("data.samples", rule, samples)


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
