"""Names that a model's modules had in older versions of transformers, and have no more.

Stock PEFT maps them while it loads an adapter, so such files work; but whoever compares the names of two adapters, or
writes a config that gives ranks by name, must use the names of today. PEFT's own mapping is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.errors import AdapterFileError
from rankwise.export.adapter import Adapter
from rankwise.export.keys import PEFT_PREFIX, parsed_key
from rankwise.export.lora_config import CHOOSING_MODULES


def base_at_hand(base: str | Path | nn.Module | None, config: Mapping[str, Any], folder: Path) -> nn.Module | None:
    """The base model without its weights, if it was named or lies on this machine; nothing is downloaded unasked.

    Args:
        base: the base model, or where it is; by default where the adapter's config says.
        config: the adapter's, as its JSON holds it.
        folder: the adapter's.

    Raises:
        AdapterFileError: `base` was given and does not open.
    """
    if base is None and not _lies_here(config.get("base_model_name_or_path"), config.get("revision")):
        return None
    # PEFT and transformers take longer to import than most merges take in all.
    from rankwise.export.base import opened_base

    try:
        return opened_base(base, config, folder)
    except AdapterFileError:
        if base is not None:
            raise
        return None


def _lies_here(name: str | None, revision: str | None) -> bool:
    """Whether a name is that of a folder, or of a model of the hub whose config has been downloaded."""
    if not name:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:  # a folder that is no more
        return False


def with_names_of(model: nn.Module, adapter: Adapter, folder: Path) -> Adapter:
    """A plain LoRA under the names that `model` has for its modules, as stock PEFT gives them on loading.

    It stays as it is where PEFT has no name in this model for one of its modules: experts that have become one
    parameter, or modules of another model.

    Raises:
        AdapterFileError: it updates one module under its old name and under its new one; `folder` is what held it.
    """
    names = _names_today(model, adapter, folder)
    if names is None or all(old == new for old, new in names.items()):
        return adapter
    return dataclasses.replace(
        adapter,
        config=_config_for(adapter.config, list(names.values())),
        updates={names[old]: update for old, update in adapter.updates.items()},
        formats={names[old]: form for old, form in adapter.formats.items()},
        names=tuple(names.values()),
    )


def _names_today(model: nn.Module, adapter: Adapter, folder: Path) -> dict[str, str] | None:
    """What `model` calls each of an adapter's modules; None where it does not have one of them."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    here = {name for name, _ in model.named_modules()}
    old_names = list(adapter.updates)
    if here.issuperset(old_names):
        return None
    # PEFT maps tensors. Each of these holds the number of its module, so that the module is found again.
    numbers = {
        f"{PEFT_PREFIX}{name}.{adapter.formats[name].names[0]}": torch.full((1, 1), float(i))
        for i, name in enumerate(old_names)
    }
    mapped = convert_peft_adapter_state_dict_for_transformers(model, peft.LoraConfig(), numbers)
    if any(number.numel() != 1 for number in mapped.values()):
        return None
    if len(mapped) < len(numbers):
        raise AdapterFileError(f"{folder} updates one module under its old name and under its new one")
    found = {old_names[int(number)]: parsed_key(key).module for key, number in mapped.items()}
    if not here.issuperset(found.values()):
        return None
    return {old: found[old] for old in old_names}


def _config_for(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The config with the choice of modules that it has, if that still fits; else with their names."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    choice: dict[str, Any] = {entry: config.get(entry) for entry in CHOOSING_MODULES}
    chosen = peft.LoraConfig(**choice)
    if all(check_target_module_exists(chosen, name) for name in names):
        return dict(config)
    return {**config, **dict.fromkeys(CHOOSING_MODULES), "target_modules": sorted(names)}
