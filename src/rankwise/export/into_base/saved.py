"""An adapter's files, as far as a merge into the base model can take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from torch import Tensor

from rankwise.adapters.configs import AdapterConfig
from rankwise.errors import AdapterFileError
from rankwise.export.adapter import key_not_finite
from rankwise.export.base import trained_as
from rankwise.export.lora_config import CONFIG, MORE_THAN_UPDATES, STARTS, saved_config
from rankwise.export.pipeline_files import pipeline_file
from rankwise.export.reader import TENSORS, read_clean_tensors
from rankwise.export.trained import opened_config

MERGEABLE = ("use_dora", "lora_bias", "trainable_token_indices", "target_parameters")
"""What PEFT merges although it is more than updates of modules."""


@dataclass(frozen=True)
class SavedAdapter:
    """The config and the tensors of an adapter."""

    folder: Path
    config: PeftConfig
    told: Mapping[str, Any]
    """The config as it lies in its file."""
    tensors: dict[str, Tensor]

    @property
    def trained_as(self) -> str | None:
        """The class of the model it was trained on, where it says one."""
        return trained_as(self.told)


def read_saved(folder: Path) -> SavedAdapter:
    """The adapter in a folder.

    Raises:
        AdapterFileError: it is missing, broken, not finite, no LoRA, or of a kind whose update no weight can hold.
    """
    config: Any = opened_config(folder)
    if config is None and pipeline_file(folder) is not None:
        raise AdapterFileError(f"{folder} holds the LoRA of a pipeline, which diffusers adds by pipeline.fuse_lora()")
    if config is None:
        raise AdapterFileError(f"{folder} holds no LoRA adapter: {CONFIG} is missing")
    if not isinstance(config, AdapterConfig):
        _check_plain(config, folder)
    tensors = read_clean_tensors(folder)
    broken = key_not_finite(tensors)
    if broken:
        raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in {broken!r}")
    if not tensors:
        raise AdapterFileError(f"{folder / TENSORS} holds no tensor")
    return SavedAdapter(folder, config, saved_config(folder), tensors)


def _check_plain(config: Any, folder: Path) -> None:
    if type(config) is not peft.LoraConfig:
        raise AdapterFileError(f"{folder} holds no LoRA adapter")
    for field in MORE_THAN_UPDATES:
        if field not in MERGEABLE and getattr(config, field, None):
            raise AdapterFileError(f"{folder} cannot be merged into a base model: its config has `{field}`")
    if config.init_lora_weights not in STARTS:
        raise AdapterFileError(
            f"{folder} started from {config.init_lora_weights!r}, which changes the base model: convert it first"
        )
