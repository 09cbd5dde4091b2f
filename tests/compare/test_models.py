"""The base model of a SPEC is opened with the right head, and refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.compare.models import classifier_skeleton, open_classifier
from rankwise.errors import ArgumentError

pytest_plugins = ["tiny_comparison"]

LABELS = ["colour", "food", "music"]


@pytest.mark.parametrize("name", ["./no-such-model", "no/such/model"])
def test_a_model_that_does_not_exist(name: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"^`model` must be a folder, hub id or embedded model .*; found '{name}'$"
    ):
        classifier_skeleton(name, LABELS)


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
    with pytest.raises(ArgumentError, match=r"^`model` must be .* that can classify sequences; found '.*model'$"):
        classifier_skeleton(str(tmp_path / "model"), LABELS)


def test_the_skeleton_has_the_models_modules_and_no_weights(tiny: Path) -> None:
    name = str(tiny / "model")
    skeleton, model = classifier_skeleton(name, LABELS), open_classifier(name, LABELS)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    shapes = [{key: p.shape for key, p in each.named_parameters()} for each in (skeleton, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("opener", [open_classifier, classifier_skeleton])
def test_the_head_fits_the_task(opener: Callable[..., Any], tiny: Path) -> None:
    model = opener(str(tiny / "model"), LABELS)
    assert model.classifier.weight.shape == (3, 32)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: i for i, label in enumerate(LABELS)}
    model = opener(str(tiny / "model"), None)
    assert model.classifier.weight.shape == (1, 32)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_code_that_comes_with_a_model_is_not_run(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny / "model", folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match=r"^`model` must be .* that can classify sequences"):
        classifier_skeleton(str(folder), LABELS)
    assert not (tmp_path / "ran").exists()
