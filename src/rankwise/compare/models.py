"""The base model that a SPEC names, with the head that its task needs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel

from rankwise.base_models import PLACES, locate, open_model, skeleton, weight_files
from rankwise.compare.tasks import Splits, Task
from rankwise.errors import ArgumentError

_MODEL_FILES = (".json", ".safetensors", ".txt", ".model")
"""Files of a model folder that hold its config, weights, vocabulary and tokenizer."""


def open_for(task: Task, name: str, splits: Splits, pad: int | None = None) -> PreTrainedModel:
    """The model that a task trains; a head that the pretrained model lacks is fresh.

    `pad` is the tokenizer's padding token, for models whose config names none.
    """
    padding: dict[str, Any] = {} if pad is None else {"pad_token_id": pad}
    return open_model(name, task.opens_as, argument="model", **task.config_changes(splits), **padding)


def skeleton_for(task: Task, name: str, splits: Splits) -> Any:
    """The same model without weights, on the meta device: enough to check what a config targets.

    Raises:
        ArgumentError: the model's config does not open, there is no model of its kind for the task, or a local folder
            holds no whole weights.
    """
    place = locate(name, argument="model")
    try:
        model = skeleton(place, task.opens_as, argument="model", **task.config_changes(splits))
    except ArgumentError as error:
        raise ArgumentError("model", f"{PLACES} that can be trained for {task.type}", name) from error
    if Path(place).is_dir():
        _check_weights(Path(place), name)
    return model


def identity(name: str) -> dict[str, str]:
    """What tells the model of a SPEC from every other: the revision of a hub model, the contents of a folder."""
    place = Path(locate(name, argument="model"))
    if not place.is_dir():
        return {"name": name, "revision": str(AutoConfig.from_pretrained(name)._commit_hash)}
    return {file.name: _fingerprint(file) for file in sorted(place.iterdir()) if file.suffix in _MODEL_FILES}


def _fingerprint(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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
