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
from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.adapter import key_not_finite
from rankwise.export.lora_config import CONFIG, MORE_THAN_UPDATES, STARTS, read_config, saved_config
from rankwise.export.reader import TENSORS, read_tensors

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
        return (self.told.get("auto_mapping") or {}).get("base_model_class")


def read_saved(folder: Path) -> SavedAdapter:
    """The adapter in a folder.

    Raises:
        AdapterFileError: it is missing, broken, not finite, no LoRA, or of a kind whose update no weight can hold.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder} holds no LoRA adapter: {CONFIG} is missing")
    read_config(folder)
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except RankwiseError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{folder / CONFIG} is not a whole adapter config ({type(error).__name__})") from error
    if not isinstance(config, AdapterConfig):
        _check_plain(config, folder)
    tensors = read_tensors(folder / TENSORS)
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
