"""An adapter's files, as far as a merge into the base model can take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import Tensor

from rankwise.errors import AdapterFileError
from rankwise.export.adapter import key_not_finite
from rankwise.export.lora_config import CONFIG, ONLY_UPDATES, OURS, STARTS, read_config
from rankwise.export.reader import TENSORS, read_clean_tensors
from rankwise.export.trained import opened_config

MERGEABLE = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
"""Fields of PEFT's LoraConfig that make an adapter more than updates of modules, and that PEFT merges all the same."""


@dataclass(frozen=True)
class SavedAdapter:
    """The config and the tensors of an adapter."""

    folder: Path
    config: PeftConfig
    told: Mapping[str, Any]
    """The config as its JSON holds it."""
    tensors: dict[str, Tensor]
    """By PEFT's names for them."""


def read_saved(folder: Path) -> SavedAdapter:
    """The adapter in a folder.

    Raises:
        AdapterFileError: it is missing, broken, not finite, no LoRA, or of a kind whose update no weight can hold.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder} holds no LoRA adapter: {CONFIG} is missing")
    told = read_config(folder)
    if not str(told.get("peft_type")).startswith(OURS):
        _check_plain(told, folder)
    config: Any = opened_config(folder)  # there is one, and it has been read as JSON
    tensors = read_clean_tensors(folder, told)
    broken = key_not_finite(tensors)
    if broken:
        raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in {broken!r}")
    if not tensors:
        raise AdapterFileError(f"{folder / TENSORS} holds no tensor")
    return SavedAdapter(folder, config, told, tensors)


def _check_plain(told: Mapping[str, Any], folder: Path) -> None:
    """Raise `AdapterFileError` for an adapter that is no LoRA, or does more than can be put into weights."""
    if told.get("peft_type") != "LORA":
        raise AdapterFileError(f"{folder} holds no LoRA adapter: its peft_type is {told.get('peft_type')!r}")
    for field, value in told.items():
        if value and field not in ONLY_UPDATES + MERGEABLE:
            raise AdapterFileError(f"{folder} cannot be merged into a base model: its config has `{field}`")
    start = told.get("init_lora_weights", True)
    if start not in STARTS:
        raise AdapterFileError(f"{folder} started from {start!r}, which changes the base model: convert it first")
