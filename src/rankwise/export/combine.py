"""Adapters of one base model, read from their folders, and their weighted sum."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.adapter import FROZEN, Adapter, check_adapter
from rankwise.export.layouts import TOLERANCE
from rankwise.export.lora_config import CHOOSING_MODULES, OURS, saved_config
from rankwise.export.lora_format import LoraFormat
from rankwise.export.names_today import base_at_hand, with_names_of
from rankwise.export.pipeline_lora import PipelineLora, read_any_lora
from rankwise.update import Factors


def given_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One weight per adapter, 1/n each where none are given."""
    if count == 0:
        raise ArgumentError("folders", "name at least one adapter", [])
    given = tuple(weights) if weights is not None else (1 / count,) * count
    if len(given) != count or not all(math.isfinite(w) for w in given) or not any(given):
        raise ArgumentError("weights", f"be {count} finite numbers, one per adapter, not all 0", weights)
    return given


def read_adapters(folders: Sequence[str | Path], base: str | Path | nn.Module | None) -> list[Adapter]:
    """The adapters in `folders`, plain or of rankwise, each found to hold nothing but finite updates and full modules.

    Raises:
        AdapterFileError: a folder holds no whole adapter.
        RankwiseError: it holds what cannot be merged.
    """
    paths = [Path(folder) for folder in folders]
    ours = [str(saved_config(path).get("peft_type")).startswith(OURS) for path in paths]
    model: nn.Module | None = None
    found: list[Adapter] = []
    for path, of_ours in zip(paths, ours, strict=True):
        if of_ours:
            # Only these need PEFT and the base model, whose import takes longer than a whole merge of plain ones.
            from rankwise.export.base import opened_base
            from rankwise.export.trained import from_folder_reduced

            model = model or opened_base(base, saved_config(path), path)
            adapter = from_folder_reduced(path, model)
        else:
            adapter = read_any_lora(path)
            if not isinstance(adapter, PipelineLora):
                # Adapters from before and after a change of names must agree on what they call a module.
                model = model or base_at_hand(base, adapter.config, path)
                adapter = adapter if model is None else with_names_of(model, adapter, path)
        check_adapter(adapter, str(path))
        found.append(adapter)
    warn_of_different_bases(adapter.config for adapter in found)
    return found


def warn_of_different_bases(configs: Iterable[Mapping[str, Any]]) -> None:
    """Say where adapters' configs name different base models, or different revisions of one."""
    named: set[str] = set()
    for config in configs:
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        if name:
            named.add(f"{name} at revision {revision}" if revision else str(name))
    if len(named) > 1:
        warnings.warn(f"the adapters say different base models: {', '.join(sorted(named))}", stacklevel=4)


def combined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum, its factors side by side.

    Raises:
        AdapterFileError: the adapters disagree on the shape or kind of a module.
        RankwiseError: modules trained in full cannot be averaged.
    """
    formats: dict[str, LoraFormat] = {}
    # Those of rankwise come first: they know the whole base model, and a plain one only what it adapts.
    telling = sorted(adapters, key=lambda adapter: adapter.is_plain)
    for adapter in telling:
        for name, form in adapter.formats.items():
            known = formats.setdefault(name, form)
            if (known.kind, known.shape, known.kernel) != (form.kind, form.shape, form.kernel):
                raise AdapterFileError(
                    f"the adapters disagree on module {name!r}: {known.shape} and {form.shape}, {known.kind} "
                    f"and {form.kind}"
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
    return Adapter(
        config=_config(adapters, updates),
        updates=updates,
        others=_averaged(adapters, weights),
        formats=formats,
        names=names,
        dtype=functools.reduce(torch.promote_types, (adapter.dtype for adapter in adapters)),
    )


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


def _config(adapters: Sequence[Adapter], updates: Mapping[str, Factors]) -> Mapping[str, Any]:
    """A plain LoRA's where there is one, with the modules of all."""
    own = next((adapter.config for adapter in adapters if adapter.is_plain), adapters[0].config)
    all_adapt_the_same = all(adapter.updates.keys() == updates.keys() for adapter in adapters)
    if own.get("peft_type") != "LORA" or all_adapt_the_same:
        return own
    return {**own, "target_modules": sorted(updates), **dict.fromkeys(CHOOSING_MODULES[1:])}
