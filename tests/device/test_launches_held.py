"""What a training step launches, reads and copies on a device does not grow unseen: `bench/results/launches.json`.

Where a count has fallen, `python bench/launches.py --json bench/results/launches.json` renews the file, and prints the
table for `docs/launches.md`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from launch_counts import LAYERS, MODELS, WAYS, Training, counts_of, table
from simulated import counted

pytest_plugins = ["on_device"]

ROOT = Path(__file__).resolve().parents[2]
KEPT: Any = json.loads((ROOT / "bench/results/launches.json").read_text(encoding="utf-8"))
OURS = [way for way in WAYS if not way.startswith("PEFT")]
RENEW = "python bench/launches.py --json bench/results/launches.json"

versions = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
of_these_libraries = pytest.mark.skipif(
    any(KEPT["machine"][name] != version for name, version in versions.items()),
    reason="the counts in the file are of other versions of torch, transformers or peft",
)


def test_the_file_has_every_way_of_training() -> None:
    assert list(KEPT["counts"]) == list(MODELS)
    for by_way in KEPT["counts"].values():
        assert list(by_way) == list(WAYS)
        assert all(list(by_layers) == [str(n) for n in LAYERS] for by_layers in by_way.values())


@pytest.mark.device
@of_these_libraries
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_no_count_has_grown(model: str, way: str, simulated_device: torch.device) -> None:
    """Of 24 layers no model is run: counts grow by the same number for every layer, as the next test sees to."""
    for layers in LAYERS[:2]:
        kept, found = KEPT["counts"][model][way][str(layers)], counts_of(model, way, layers)
        grown = {key: (kept[key], count) for key, count in found.items() if count > kept[key]}
        assert not grown, f"{layers} layers, (kept, now)"
        fallen = {key: (kept[key], count) for key, count in found.items() if count < kept[key]}
        assert not fallen, f"{layers} layers, (kept, now): fewer, so keep them by `{RENEW}`"


@pytest.mark.device
@pytest.mark.parametrize("way", ["lora", "nblora"])
def test_passes_that_accumulate_gradients_wait_for_nothing(way: str, simulated_device: torch.device) -> None:
    training = Training("bert", way, 2)
    training.step()
    with counted() as counts:
        for _ in range(3):
            training.model(**training.batch).loss.backward()
        training.step()
    assert (counts.reads, counts.copies) == (0, 1)


@pytest.mark.parametrize("way", OURS)
@pytest.mark.parametrize("model", MODELS)
def test_what_the_rules_cost_does_not_depend_on_the_number_of_layers(model: str, way: str) -> None:
    few, more, many = (KEPT["counts"][model][way][str(n)] for n in LAYERS)
    for key in ("rules", "optimizer", "reads", "copies"):
        assert few[key] == more[key] == many[key], key
    for key in ("forward", "backward", "first reads", "first copies"):
        per_layer = (more[key] - few[key]) / (LAYERS[1] - LAYERS[0])
        # Gradients of the first layers' inputs are wanted by nobody, so that the step from 2 to 6 is not quite exact.
        assert many[key] == pytest.approx(more[key] + per_layer * (LAYERS[2] - LAYERS[1]), rel=0.02), key


@pytest.mark.parametrize("model", MODELS)
def test_the_page_shows_the_file(model: str) -> None:
    assert table(KEPT["counts"][model]) in (ROOT / "docs/launches.md").read_text(encoding="utf-8")
