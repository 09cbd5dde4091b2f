"""Trackers are told what the Trainer logs, ranks and spectra by module, and the scores; all without a network."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from rankwise.compare.plan import make_plan
from rankwise.compare.results import Result
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.compare.tracking import FOLDER
from rankwise.errors import ArgumentError
from rankwise.spectral import effective_rank
from tiny_comparison import WriteSpec

pytest_plugins = ["tiny_comparison"]

SPECTRA = ("effective_rank", "subspace_use", "update_norm")
"""What is told of each module beside its rank."""


def tracked(write_spec: WriteSpec, folder: Path, tracker: str) -> Result:
    """A run of SoRA, and the head alone as another one, told to a tracker."""
    spec = read_spec(
        write_spec(folder, methods=["sora", "head"], training={"steps": 4, "evaluations": 2}, tracker=tracker)
    )
    plan = make_plan(spec)
    return next(result for result in run_plan(plan, "a test") if result.method == "sora")


def test_tensorboard_has_losses_ranks_and_scores(write_spec: WriteSpec, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = tracked(write_spec, tmp_path, "tensorboard")
    (folder,) = (tmp_path / "out" / FOLDER).glob("sora--*")
    events = EventAccumulator(str(folder))
    events.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train/loss")]
    assert losses == result.train_loss
    curve = [(event.step, pytest.approx(event.value)) for event in events.Scalars("validation/score")]
    assert len(curve) == 2
    assert curve == result.validation_curve
    for module, rank in result.ranks.items():
        assert events.Scalars(f"rank/{module}")[-1].value == rank
        spectrum = torch.tensor(result.singular_values[module])
        told = {kind: events.Scalars(f"{kind}/{module}")[-1].value for kind in SPECTRA}
        assert told["effective_rank"] == pytest.approx(float(effective_rank(spectrum)), rel=1e-4)
        assert told["update_norm"] == pytest.approx(float(spectrum.norm()), rel=1e-4)
        assert 0 < told["subspace_use"] <= 1
    assert {"ranks", "spectra"} <= set(events.Tags()["images"])
    (image, *_) = events.Images("ranks")
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)
    assert events.Scalars("test/accuracy")[-1].value == pytest.approx(result.score)
    assert events.Scalars("validation/accuracy")[-1].value == pytest.approx(result.validation_score)


def test_wandb_keeps_a_run_of_its_own_for_each(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = tracked(write_spec, tmp_path, "wandb")
    runs = list((tmp_path / "out" / FOLDER / "wandb").glob("offline-run-*"))
    assert {run.name.rpartition("-")[0] for run in runs} != set()
    assert len(runs) == 2
    sora = next(run for run in runs if "sora--" in run.name and run.name.endswith(f"seed{result.seed}"))
    images = {file.name.split("_")[0] for file in (sora / "files" / "media" / "images").iterdir()}
    assert images == {"ranks", "spectra"}


def test_trackio_stores_the_run(write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    result = tracked(write_spec, tmp_path, "trackio")
    logs = sqlite_storage.SQLiteStorage.get_logs(
        "out", next(run for run in sqlite_storage.SQLiteStorage.get_runs("out") if run.startswith("sora--"))
    )
    told = {name: value for log in logs for name, value in log.items()}
    assert told["test/accuracy"] == pytest.approx(result.score)
    assert {f"rank/{module}" for module in result.ranks} <= told.keys()
    assert {f"{kind}/{module}" for module in result.ranks for kind in SPECTRA} <= told.keys()
    assert {told[name]["_type"] for name in ("ranks", "spectra")} == {"trackio.image"}


def test_a_tracker_that_is_not_installed_is_named(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    spec = read_spec(write_spec(tmp_path, tracker="wandb"))
    with pytest.raises(ArgumentError, match=r"`tracker` must be installed \(pip install wandb\); found 'wandb'"):
        make_plan(spec)


def test_a_tracker_makes_no_other_run(write_spec: WriteSpec, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = make_plan(read_spec(write_spec(tmp_path / "a")))
    told = make_plan(read_spec(write_spec(tmp_path / "b", tracker="tensorboard")))
    assert json.dumps([run.key for run in plain.runs]) == json.dumps([run.key for run in told.runs])
