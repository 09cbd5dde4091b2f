"""Metrics by name: each is what its formula gives, the first one ranks, and unknown ones are refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.compare.tasks import Examples, Splits
from rankwise.compare.tasks.classification import Classification
from rankwise.compare.tasks.regression import Regression
from rankwise.errors import ArgumentError
from tiny_comparison import WriteSpec, write_rows

pytest_plugins = ["tiny_comparison"]


def scored(
    task: Any, truth: list[Any], outputs: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """What a task scores where the model gives `outputs`."""
    monkeypatch.setattr(type(task), "predictions", lambda *_: np.asarray(outputs))
    examples = Examples("data", {"text": ["x"] * len(truth), "label": truth})
    labels = sorted(set(truth)) if isinstance(truth[0], str) else None
    return task.score(None, examples, Splits(examples, examples, examples, labels))


def test_classification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three right of the second label, one missed, two false alarms, four right of the first label."""
    truth = ["b"] * 4 + ["a"] * 6
    outputs = [[0.0, 1.0]] * 3 + [[1.0, 0.0]] + [[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 4
    found = scored(Classification(metrics=("matthews", "f1", "macro_f1", "accuracy")), truth, outputs, monkeypatch)
    assert list(found) == ["matthews", "f1", "macro_f1", "accuracy"]
    tp, fn, fp, tn = 3, 1, 2, 4
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    f1, f1_of_first = 2 * tp / (2 * tp + fp + fn), 2 * tn / (2 * tn + fn + fp)
    assert list(found.values()) == pytest.approx([matthews, f1, (f1 + f1_of_first) / 2, 0.7])


def test_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, guess = [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 1.0, 9.0]
    task = Regression(metrics=("mse", "spearman", "pearson"))
    found = scored(task, truth, [[value] for value in guess], monkeypatch)
    assert task.lower_is_better
    assert not Regression().lower_is_better
    # Ranks of the guesses: 1, 3, 2, 4, so that Σd² = 2 and ρ = 1 − 6·2 / (4·15).
    assert found["mse"] == pytest.approx((1 + 0 + 4 + 25) / 4)
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1])


def test_the_first_metric_ranks(write_spec: WriteSpec, tiny: Path, tmp_path: Path) -> None:
    data = {name: str(tiny / f"pairs-{name}.jsonl") for name in ("train", "test")}
    path = write_spec(
        tmp_path,
        data=data | {"pair": "other_text", "label": "score"},
        task={"type": "regression", "metrics": ["mse", "pearson"]},
        training={"steps": 4},
    )
    (result,) = run_plan(make_plan(read_spec(path)), "a test")
    assert (result.metric, result.lower_is_better, set(result.extra_metrics)) == ("mse", True, {"pearson"})
    assert result.score > 0


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["acuracy"], r"`task.metrics` must name metrics of the task \(the nearest names are accuracy, .*'acuracy'"),
        (["pearson"], r"`task.metrics` must name metrics of the task \(the nearest .*; found 'pearson'"),
        ([], r"`task.metrics` must be a list of different metrics among accuracy, macro_f1, f1, matthews; found \[\]"),
        (["f1", "f1"], r"`task.metrics` must be a list of different metrics"),
        ("f1", r"`task.metrics` must be a list of different metrics"),
        (["accuracy", "f1"], r"`task.metrics` must be without f1, which is of two labels, for the 3 labels of .*train"),
    ],
)
def test_metrics_that_cannot_be_had(metrics: object, message: str, write_spec: WriteSpec, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_plan(read_spec(write_spec(tmp_path, task={"metrics": metrics})))


def test_f1_of_two_labels(write_spec: WriteSpec, tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "red", "intent": i % 2} for i in range(24)])
    data = {"train": "train.jsonl", "test": "test.jsonl"}
    path = write_spec(tmp_path, data=data, task={"metrics": ["f1"]}, training={"steps": 1})
    (result,) = run_plan(make_plan(read_spec(path)), "a test")
    assert result.metric == "f1"
    assert result.score in (0.0, pytest.approx(2 / 3))  # one text alone: all of one label or all of the other
