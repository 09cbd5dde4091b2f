"""The names that the tensors of an adapter shall have: PEFT's, without wrappers, with today's names of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from rankwise.adapters.tuner import PREFIX
from rankwise.errors import AdapterFileError
from rankwise.export.keys import PEFT_PREFIX, clean_key, parsed_key
from rankwise.export.lora_config import CONFIG
from rankwise.export.names_today import files_today
from rankwise.export.reader import COPIES, AdapterFiles, check_names

PARAMETERS = ("lora_magnitude_vector", "trainable_tokens_delta")
"""Parts of a tensor's path behind which PEFT has the adapter's name, or nothing."""
CONTAINERS = ("lora_A", "lora_B", f"{PREFIX}tensors")
"""Parts behind which PEFT has the adapter's name and the tensor's own, or the latter alone."""


class Renamed(NamedTuple):
    """A tensor's name as it was, and as it shall be."""

    old: str
    new: str
    adapter: str
    """The adapter's name that was in it."""


def renamed_tensors(tensors: Mapping[str, Tensor], file: Path) -> list[Renamed]:
    """The name that each tensor shall have.

    Raises:
        AdapterFileError: two would have one name, or a wrapper is not known.
    """
    check_names(AdapterFiles(file.parent, {}, dict(tensors)), file)
    own_names = {parsed_key(key).module for key in tensors}
    found: dict[str, Renamed] = {}
    for key in tensors:
        told = parsed_key(key)
        if told.part:
            each = Renamed(key, clean_key(key), told.adapter)
        else:
            name, adapter = _without_adapter_name(told.module)
            if COPIES[1] in told.module and name in own_names:
                # A second copy, which PEFT writes where biases are trained beside the module.
                name = told.module.replace(f"{COPIES[1]}{adapter}.", COPIES[1], 1)
            each = Renamed(key, PEFT_PREFIX + name, adapter)
        first = found.setdefault(each.new, each)
        if first is not each:
            raise AdapterFileError(f"{file} holds one tensor under two names, {first.old!r} and {key!r}")
    return list(found.values())


def _without_adapter_name(name: str) -> tuple[str, str]:
    """The name of a tensor that is neither A nor B without the adapter's name, and that; as PEFT saves such tensors."""
    for part in (*PARAMETERS, *CONTAINERS):
        before, found, behind = f".{name}".rpartition(f".{part}.")
        adapter, _, own = behind.partition(".")
        if not found:
            continue
        if own and "." not in own:
            return f"{before}.{part}.{own}".removeprefix("."), adapter
        if part in PARAMETERS and adapter != "weight":
            return f"{before}.{part}".removeprefix("."), adapter
    # PEFT saves a module trained in full under the name that it has in the base model.
    before, found, behind = name.partition(COPIES[1])
    adapter, _, own = behind.partition(".")
    return (f"{before}.{own}", adapter) if found and own else (name, "")


def with_names_of(
    model: nn.Module, config: dict[str, Any], renamed: list[Renamed], folder: Path
) -> tuple[dict[str, Any], list[Renamed], list[str]]:
    """Config and names for the modules that the base model has today, and a sentence for each change.

    Raises:
        AdapterFileError: the adapter has one module under its old name and under its new one.
    """
    mended, today = files_today(model, config, [each.new for each in renamed], folder)
    if not today:
        return config, renamed, []
    found = [each._replace(new=today.get(each.new, each.new)) for each in renamed]
    old, new = next(iter(today.items()))
    in_keys = f"{len(today)} {'key' if len(today) == 1 else 'keys'}, as {new!r} for {old!r}"
    changes = [f"put the names that modules have today into {in_keys}"]
    for entry, value in mended.items():
        if value != config.get(entry):
            changes.append(f"made {entry} in {CONFIG} fit the names that modules have today")
    return mended, found, changes


def changes_of_names(renamed: Iterable[Renamed]) -> list[str]:
    """What is changed in the tensors' names, a sentence for each kind of change."""
    by_wrapper: dict[str, list[str]] = {}
    by_adapter: dict[str, list[str]] = {}
    without_prefix: list[str] = []
    for each in renamed:
        told = parsed_key(each.old)
        for wrapper in dict.fromkeys(told.wrappers):
            by_wrapper.setdefault(wrapper, []).append(each.old)
        if each.adapter:
            by_adapter.setdefault(each.adapter, []).append(each.old)
        if not told.prefix:
            without_prefix.append(each.old)
    return [
        *(f"took the wrapper's name {name!r} out of {_in_keys(keys)}" for name, keys in by_wrapper.items()),
        *(f"took the adapter's name {name!r} out of {_in_keys(keys)}" for name, keys in by_adapter.items()),
        *([f"put {PEFT_PREFIX} before {_in_keys(without_prefix)}"] if without_prefix else []),
    ]


def _in_keys(keys: list[str]) -> str:
    return f"{len(keys)} {'key' if len(keys) == 1 else 'keys'}, as {keys[0]!r}"
