"""The base model of a SPEC is opened with the right head, and refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.compare.models import open_for, skeleton_for
from rankwise.compare.tasks import Examples, Splits
from rankwise.compare.tasks.classification import Classification
from rankwise.compare.tasks.regression import Regression
from rankwise.errors import ArgumentError

pytest_plugins = ["tiny_comparison"]

LABELS = ["colour", "food", "music"]
NOTHING = Examples("nothing", {})
LABELLED = Splits(NOTHING, NOTHING, NOTHING, LABELS)


@pytest.mark.parametrize("name", ["./no-such-model", "no/such/model"])
def test_a_model_that_does_not_exist(name: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"^`model` must be a folder, hub id or embedded model .*; found '{name}'$"
    ):
        skeleton_for(Classification(), name, LABELLED)


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "no-such-kind"}',
        '{"model_type": "vit"}',  # known, but it classifies no sequences
        '{"model_type": "bert"',
    ],
)
def test_a_config_that_makes_no_sequence_classifier(tiny: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(content)
    with pytest.raises(
        ArgumentError, match=r"^`model` must be .* that can be trained for classification; found '.*model'$"
    ):
        skeleton_for(Classification(), str(tmp_path / "model"), LABELLED)


def test_the_skeleton_has_the_models_modules_and_no_weights(tiny: Path) -> None:
    name = str(tiny / "model")
    skeleton, model = skeleton_for(Classification(), name, LABELLED), open_for(Classification(), name, LABELLED)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    shapes = [{key: p.shape for key, p in each.named_parameters()} for each in (skeleton, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("opener", [open_for, skeleton_for])
def test_the_head_fits_the_task(opener: Callable[..., Any], tiny: Path) -> None:
    model = opener(Classification(), str(tiny / "model"), LABELLED)
    assert model.classifier.weight.shape == (3, 32)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    model = opener(Regression(), str(tiny / "model"), Splits(NOTHING, NOTHING, NOTHING))
    assert model.classifier.weight.shape == (1, 32)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_code_that_comes_with_a_model_is_not_run(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match=r"^`model` must be .* that can be trained for classification"):
        skeleton_for(Classification(), str(folder), LABELLED)
    assert not (tmp_path / "ran").exists()
