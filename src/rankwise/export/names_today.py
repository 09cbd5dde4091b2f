"""Names that a model's modules had in older versions of transformers, and have no more.

The files of a base model still have them, so that transformers maps them whenever it loads one, and its mapping is
asked here. Stock PEFT maps some on loading an adapter (a language model's inside of LLaVA), and none of others (ViT,
Qwen2.5-VL), whose updates it leaves out; nor does it map the config, or modules trained in full. Whoever compares the
names of two adapters, or writes a config that gives ranks by name, must use the names of today.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.embedded_models import EMBEDDED
from rankwise.errors import AdapterFileError
from rankwise.export.adapter import Adapter
from rankwise.export.keys import PEFT_PREFIX, parsed_key
from rankwise.export.lora_config import CHOOSING_MODULES, alpha_of, is_target, rank_of

WITHIN_MODULE = re.compile(r"\.(lora_|rankwise_|base_layer\.|token_adapter\.)")
"""What an adapter puts behind a module's name, in the name of a tensor of the adapter's own."""


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


def may_open(config: Mapping[str, Any]) -> bool:
    """Whether the base model that a config names is on this machine, or on the hub if that can be reached.

    Only the hub's client is asked, which fetches the model's config where it is missing: transformers, which would do
    the same, takes longer to import.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name:
        return False
    if name in EMBEDDED or _lies_here(name, revision):
        return True
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, "config.json", revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return False
    return True


def with_names_of(model: nn.Module, adapter: Adapter, folder: Path) -> Adapter:
    """A plain LoRA under the names that `model` has for its modules.

    Modules that have no name in this model keep theirs: experts that have become one parameter, or modules of another
    model.

    Raises:
        AdapterFileError: it has one module under its old name and under its new one; `folder` is what held it.
    """
    in_full = {_module_and_rest(key)[0] for key in adapter.others}
    modules = [*adapter.updates, *in_full]
    today = modules_today(model, modules, adapter.config)
    if not today:
        return adapter
    _check_one_name_each(modules, today, folder)
    return dataclasses.replace(
        adapter,
        config=config_today(adapter.config, adapter.updates, today),
        updates={today.get(name, name): update for name, update in adapter.updates.items()},
        others={key_today(key, today): tensor for key, tensor in adapter.others.items()},
        formats={today.get(name, name): form for name, form in adapter.formats.items()},
        names=tuple(today.get(name, name) for name in adapter.names),
    )


def files_today(
    model: nn.Module, config: Mapping[str, Any], keys: Iterable[str], folder: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The config and the keys of an adapter of any kind, under the names that `model` has for its modules.

    Args:
        model: the base model, with or without its weights.
        config: the adapter's, as its JSON holds it.
        keys: of its tensors, as PEFT writes them.
        folder: the adapter's, for messages.

    Returns:
        The config, and a new key for each key that changes.

    Raises:
        AdapterFileError: the adapter has one module under its old name and under its new one.
    """
    listed = list(keys)
    modules = [_module_and_rest(key)[0] for key in listed]
    today = modules_today(model, modules, config)
    if not today:
        return dict(config), {}
    _check_one_name_each(modules, today, folder)
    updated = dict.fromkeys(parsed_key(key).module for key in listed if parsed_key(key).part)
    renamed = {key: key_today(key, today) for key in listed}
    changed = {old: new for old, new in renamed.items() if old != new}
    return config_today(config, updated, today), changed


def key_today(key: str, today: Mapping[str, str]) -> str:
    """The name of a tensor of an adapter's, with the name of today for its module."""
    module, rest = _module_and_rest(key)
    return f"{PEFT_PREFIX}{today[module]}{rest}" if module in today else key


def _module_and_rest(key: str) -> tuple[str, str]:
    """The module of the base model that a tensor belongs to, and what follows the module's name in the tensor's."""
    name = key.removeprefix(PEFT_PREFIX)
    found = WITHIN_MODULE.search(name)
    end = found.start() if found else name.rfind(".")
    return (name[:end], name[end:]) if end > 0 else (name, "")


def modules_today(model: nn.Module, modules: Iterable[str], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What `model`, or the part of it without a head, calls those of some modules that it has under another name.

    Args:
        model: the base model, with or without its weights.
        modules: the names that an adapter gives.
        config: the adapter's, as its JSON holds it.
    """
    listed = list(modules)
    without_head = getattr(model, "base_model", model)
    if without_head is model or _is_of_headless(without_head, listed, config or {}):
        return _modules_of(without_head, listed)
    return _modules_of(model, listed) or _modules_of(without_head, listed)


def _is_of_headless(without_head: nn.Module, modules: list[str], config: Mapping[str, Any]) -> bool:
    """Whether an adapter was trained on AutoModel, and so names the modules of the model without its head.

    A name that a vision-language model without a head has today may also be what one with a head had of old, so that
    such an adapter must not be read as the latter.
    """
    names = _names_in(without_head)
    known = [name in names for name in modules]
    says_nothing = not (config.get("task_type") or config.get("auto_mapping"))
    return any(known) if config.get("task_type") == "FEATURE_EXTRACTION" else says_nothing and all(known)


def _names_in(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _check_one_name_each(modules: Iterable[str], today: Mapping[str, str], folder: Path) -> None:
    """Raise `AdapterFileError` where two of some modules are one module of the base model's."""
    given = set(modules)
    if len({today.get(name, name) for name in given}) < len(given):
        raise AdapterFileError(f"{folder} has one module under its old name and under its new one")


def _modules_of(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """What `model` calls those of some modules that it has under another name."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    here = _names_in(model)
    unknown = [name for name in modules if name not in here]
    if not unknown or not isinstance(model, PreTrainedModel):
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    found: dict[str, str] = {}
    for name in unknown:
        key, pattern = rename_source_key(f"{name}.weight", renamings, converters)
        new_name = key.removesuffix(".weight")
        # A weight that a converter takes is cut or joined with others, as experts are: its module has no name any more.
        if pattern is None and new_name in here:
            found[name] = new_name
    return found


def config_today(config: Mapping[str, Any], updated: Iterable[str], today: Mapping[str, str]) -> dict[str, Any]:
    """The config of an adapter under the names of today; what still fits stays as it is.

    Args:
        config: the adapter's, as its JSON holds it.
        updated: the modules that it updates, under their names in its file.
        today: the names of today, for every module that has another.
    """
    names = {old: today.get(old, old) for old in updated}
    changed = dict(config)
    if names:
        changed |= _choice_today(config, list(names.values()))
    for entry, value_of in (("rank_pattern", rank_of), ("alpha_pattern", alpha_of)):
        # A pattern may fit a module under its old name, and another one or none under the new name.
        if any(value_of(config, old) != value_of(config, new) for old, new in names.items()):
            usual = value_of(dict(config) | {entry: None}, "")
            values = {new: value_of(config, old) for old, new in names.items()}
            changed[entry] = {f"^{re.escape(name)}$": value for name, value in values.items() if value != usual}
    for entry in ("modules_to_save", "trainable_token_indices"):
        given = config.get(entry)
        if isinstance(given, list) and all(isinstance(name, str) for name in given):
            changed[entry] = [_ending_today(name, today) for name in given]
        elif isinstance(given, dict):
            changed[entry] = {_ending_today(name, today): value for name, value in given.items()}
    return changed


def _choice_today(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The entries that choose modules: those of the config where they choose these, else these by their names."""
    choice: dict[str, Any] = {entry: config.get(entry) for entry in CHOOSING_MODULES}
    if not choice["target_modules"]:
        return {}
    if all(is_target(choice, name) for name in names):
        return {}
    return dict.fromkeys(CHOOSING_MODULES) | {"target_modules": sorted(names)}


def _ending_today(ending: str, today: Mapping[str, str]) -> str:
    """The ending of modules' names, by which a config names modules; one that fits no more becomes the whole name."""
    for old, new in today.items():
        if f".{old}".endswith(f".{ending}") and not f".{new}".endswith(f".{ending}"):
            return new
    return ending
