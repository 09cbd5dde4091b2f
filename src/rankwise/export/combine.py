"""Adapters of one base model, read from their folders, and their weighted sum."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from rankwise.adapters.lookup import reduced
from rankwise.adapters.progress import unfinished
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.layouts import Adapter
from rankwise.export.lora import TOLERANCE
from rankwise.export.plain import PlainLora, read_plain
from rankwise.export.source import Form, Source, finite, from_folder, opened_base, saved_config
from rankwise.update import Factors

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type")
"""Config fields that choose the modules, and the task, which PEFT chooses heads by."""
FROZEN = ".base_layer."
"""In the names of frozen weights that PEFT saves beside an adapted embedding."""


@dataclass(frozen=True)
class Merged:
    """The weighted sum of adapters, as `layouts` writes one."""

    config: PeftConfig
    updates: dict[str, Factors]
    others: dict[str, Tensor]
    forms: dict[str, Form]
    names: tuple[str, ...]


def given_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One weight per adapter, 1/n each where none are given."""
    if count == 0:
        raise ArgumentError("folders", "name at least one adapter", [])
    given = tuple(weights) if weights is not None else (1 / count,) * count
    if len(given) != count or not all(math.isfinite(w) for w in given) or not any(given):
        raise ArgumentError("weights", f"be {count} finite numbers, one per adapter, not all 0", weights)
    return given


def read_adapters(folders: Sequence[str | Path], base: str | Path | nn.Module | None) -> list[Source | PlainLora]:
    """The adapters in `folders`, plain or of rankwise, each found to hold nothing but finite updates and full modules.

    Raises:
        AdapterFileError: a folder holds no whole adapter.
        RankwiseError: it holds what cannot be merged.
    """
    ours = [str(saved_config(folder).get("peft_type")).startswith("RANKWISE_") for folder in folders]
    first_of_ours = next((Path(folder) for folder, own in zip(folders, ours, strict=True) if own), None)
    model = None if first_of_ours is None else opened_base(base, saved_config(first_of_ours), first_of_ours)
    found: list[Source | PlainLora] = []
    for folder, own in zip(folders, ours, strict=True):
        adapter = from_folder(Path(folder), model) if own else read_plain(Path(folder))
        _check_adapter(adapter, folder)
        if isinstance(adapter, Source):
            left = unfinished(adapter.config, adapter.progress, adapter.ranks)
            if left:
                warnings.warn(f"{folder}: {left}", stacklevel=3)
            adapter = dataclasses.replace(adapter, updates=reduced(adapter.updates, adapter.config))
        found.append(adapter)
    names = {adapter.config.base_model_name_or_path for adapter in found} - {None, ""}
    if len(names) > 1:
        warnings.warn(f"the adapters say different base models: {', '.join(sorted(map(str, names)))}", stacklevel=3)
    return found


def _check_adapter(adapter: Adapter, folder: str | Path) -> None:
    config: Any = adapter.config
    if config.bias != "none":
        raise RankwiseError(f"{folder} trains biases, which a merge cannot hold: `bias` is {config.bias!r}")
    if config.trainable_token_indices:
        raise RankwiseError(
            f"{folder} trains rows of an embedding (`trainable_token_indices`), which a merge cannot hold"
        )
    for name in adapter.updates:
        if adapter.forms[name].unlike:
            raise RankwiseError(f"the update of module {name!r} cannot be a plain LoRA: {adapter.forms[name].unlike}")
    broken = finite(adapter.updates) or next((k for k, t in adapter.others.items() if not t.isfinite().all()), None)
    if broken:
        raise RankwiseError(f"{folder} holds NaN or infinity in {broken!r}")


def combined(adapters: Sequence[Source | PlainLora], weights: Sequence[float]) -> Merged:
    """The weighted sum, its factors side by side.

    Raises:
        AdapterFileError: the adapters disagree on the shape or kind of a module.
        RankwiseError: modules trained in full cannot be averaged.
    """
    forms: dict[str, Form] = {}
    # those of rankwise first: they know the whole base model, and a plain adapter only what it adapts
    telling = sorted(adapters, key=lambda adapter: isinstance(adapter, PlainLora))
    for adapter in telling:
        for name, form in adapter.forms.items():
            known = forms.setdefault(name, form)
            if (known.shape, known.kernel, known.names) != (form.shape, form.kernel, form.names):
                raise AdapterFileError(
                    f"the adapters disagree on module {name!r}: {known.shape} and {form.shape}, {known.kind.__name__} "
                    f"and {form.kind.__name__}"
                )
    parts: dict[str, list[Factors]] = {}
    for w, adapter in zip(weights, adapters, strict=True):
        for name, f in adapter.updates.items():
            parts.setdefault(name, []).append(Factors(f.B.double(), w * f.s.double(), f.A.double()))
    updates = {
        name: Factors(torch.cat([f.B for f in fs], 1), torch.cat([f.s for f in fs]), torch.cat([f.A for f in fs]))
        for name, fs in parts.items()
    }
    names = tuple(dict.fromkeys(name for adapter in telling for name in adapter.names))
    return Merged(_config(adapters, updates), updates, _averaged(adapters, weights), forms, names)


def _averaged(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Modules trained in full, averaged; frozen weights that PEFT saves beside an adapted embedding, from one."""
    first = {key: t for adapter in reversed(adapters) for key, t in adapter.others.items()}
    trained = [key for key in first if FROZEN not in key]
    if trained and abs(sum(weights) - 1) > TOLERANCE:
        raise ArgumentError("weights", f"sum to 1, since {trained[0]!r} is trained in full: no update", list(weights))
    for key in trained:
        found = [adapter.others.get(key) for adapter in adapters]
        if any(t is None or t.shape != first[key].shape for t in found):
            raise RankwiseError(f"{key!r} is not trained in full, with one shape, in every adapter: it has no average")
        total = torch.stack([w * t.double() for w, t in zip(weights, found, strict=True) if t is not None]).sum(0)
        first[key] = total.to(first[key].dtype)
    return first


def _config(adapters: Sequence[Adapter], updates: Mapping[str, Factors]) -> PeftConfig:
    """A plain LoRA's where there is one, with the modules of all."""
    own = next((a.config for a in adapters if isinstance(a.config, peft.LoraConfig)), adapters[0].config)
    if isinstance(own, peft.LoraConfig) and any(a.updates.keys() != updates.keys() for a in adapters):
        return dataclasses.replace(own, target_modules=sorted(updates), **dict.fromkeys(TARGETS[1:4]))
    return own


def public_modules(adapters: Sequence[Adapter], forms: Mapping[str, Form]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module the common config adapts: told by config and base model, whatever the files hold."""
    config = common(adapters, TARGETS)
    modules = {name: form.shape for name, form in forms.items() if check_target_module_exists(config, name)}
    for adapter in adapters:
        for name in adapter.updates:
            if adapter.forms[name].shape != modules.get(name):
                raise RankwiseError(
                    f"an adapter holds an update of module {name!r} with shape {adapter.forms[name].shape}, and by its "
                    f"config and base model it should be {modules.get(name, 'none')}"
                )
    return modules


def common(adapters: Sequence[Adapter], fields: Sequence[str]) -> Any:
    """The first config, which agrees with the others on `fields`."""
    first: Any = adapters[0].config
    for adapter in adapters:
        for name in fields:
            one, other = (_comparable(getattr(config, name, None)) for config in (first, adapter.config))
            if one != other:
                raise RankwiseError(f"a private merge needs adapters of one config: `{name}` is {one!r} and {other!r}")
    return first


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, list | set | tuple) else value or None
