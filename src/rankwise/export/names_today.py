"""Names that a model's modules had in older versions of transformers, and have no more.

Stock PEFT maps them while it loads an adapter, so such files work; but whoever compares the names of two adapters, or
writes a config that gives ranks by name, must use the names of today. PEFT's own mapping is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import try_to_load_from_cache
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn

from rankwise.base_models import locate
from rankwise.errors import AdapterFileError
from rankwise.export.adapter import Adapter
from rankwise.export.base import opened_base, told_base
from rankwise.export.lora_config import CHOOSING_MODULES
from rankwise.export.reader import PEFT_PREFIX, parsed_key


def base_at_hand(base: str | Path | nn.Module | None, config: Mapping[str, Any], folder: Path) -> nn.Module | None:
    """The base model without its weights, if it was named here or lies on this machine; nothing is downloaded for it.

    Raises:
        AdapterFileError: `base` was given and does not open.
    """
    if base is not None:
        return opened_base(base, config, folder)
    try:
        name, revision = told_base(None, config, folder)
        if not Path(locate(name)).is_dir() and not isinstance(_cached_config(name, revision), str):
            return None
        return opened_base(None, config, folder)
    except ValueError:  # no base model is named, or none by this name opens
        return None


def _cached_config(name: str, revision: str | None) -> Any:
    """The path of a hub model's config in the cache, if it is there."""
    return try_to_load_from_cache(name, "config.json", revision=revision)


def with_names_of(model: nn.Module, adapter: Adapter, folder: Path) -> Adapter:
    """A plain LoRA under the names that `model` has for its modules, as stock PEFT gives them on loading.

    Raises:
        AdapterFileError: several modules have become one, as the experts of a mixture have, whose joint update is none
            of a module; or two names have become one.
    """
    names = _names_today(model, adapter, folder)
    if all(old == new for old, new in names.items()):
        return adapter
    return dataclasses.replace(
        adapter,
        config=_config_for(adapter.config, list(names.values())),
        updates={names[old]: update for old, update in adapter.updates.items()},
        formats={names[old]: form for old, form in adapter.formats.items()},
        names=tuple(names.values()),
    )


def _names_today(model: nn.Module, adapter: Adapter, folder: Path) -> dict[str, str]:
    """What `model` calls each of an adapter's modules."""
    old_names = list(adapter.updates)
    # PEFT maps tensors. Each of these is the number of its module, so that the module is found again.
    numbers = {
        f"{PEFT_PREFIX}{name}.{adapter.formats[name].names[0]}": torch.full((1, 1), float(i))
        for i, name in enumerate(old_names)
    }
    mapped = convert_peft_adapter_state_dict_for_transformers(model, peft.LoraConfig(), numbers)
    found: dict[str, str] = {}
    for key, number in mapped.items():
        if number.numel() != 1:
            raise AdapterFileError(
                f"{folder} adapts modules that are one parameter in this version of transformers, {key!r}: "
                "their update is none of a module"
            )
        found[old_names[int(number)]] = parsed_key(key).module
    if len(set(found.values())) < len(old_names):
        raise AdapterFileError(f"{folder} holds updates of one module under its old name and under its new one")
    return {old: found[old] for old in old_names}


def _config_for(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The config with the choice of modules that it has, if that still fits; else with their names."""
    choice: dict[str, Any] = {entry: config.get(entry) for entry in CHOOSING_MODULES}
    chosen = peft.LoraConfig(**choice)
    if all(check_target_module_exists(chosen, name) for name in names):
        return dict(config)
    return {**config, **dict.fromkeys(CHOOSING_MODULES), "target_modules": sorted(names)}
