"""What an export reads: the updates, the modules trained beside them, and the shapes of the base model.

A live model and a saved folder give the same `Source`; everything after it knows only this.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.layer import AdapterLinear
from rankwise.adapters.lookup import adapted_layers, base_name, factors, ranks
from rankwise.adapters.progress import LENGTH, Progress
from rankwise.adapters.tuner import PREFIX
from rankwise.errors import AdapterFileError
from rankwise.update import Factors

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Source:
    """An adapter to export."""

    config: AdapterConfig
    updates: dict[str, Factors]
    """By module name in the base model, in model order."""
    others: dict[str, Tensor]
    """Modules trained in full (a classifier), by PEFT's names for them."""
    progress: Progress
    """How far training had come."""
    ranks: list[int]
    """What the method has not pruned, per module."""
    linear: dict[str, tuple[int, int]]
    """(out, in) of every linear module of the base model; a Conv1D counts."""
    names: tuple[str, ...]
    """Every module name of the base model."""
    transposed: bool
    """Whether the adapted modules are Conv1D, whose weight is (in, out)."""


def from_model(model: nn.Module, adapter: str) -> Source:
    """The adapter of a live model.

    Raises:
        ArgumentError: the model has no such adapter.
    """
    layers = adapted_layers(model, adapter)
    first = next(iter(layers.values()))
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    others = {key: t for key, t in state.items() if f".{PREFIX}" not in key}
    progress = Progress.of(first.started(adapter).progress)
    kept = list(ranks(model, adapter).values())
    return Source(first.methods[adapter], factors(model, adapter), others, progress, kept, *_shapes(model))  # type: ignore[arg-type]


def from_folder(folder: Path, base: str | Path | nn.Module | None) -> Source:
    """The adapter saved in `folder`.

    Args:
        folder: as written by `save_pretrained`.
        base: the base model, or where it is; by default where the adapter's config says.

    Raises:
        AdapterFileError: the folder holds no whole rankwise adapter, or its base model cannot be opened.
    """
    config = read_config(folder)
    state = read_tensors(folder / TENSORS)
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, found, name = key.removeprefix(PEFT_PREFIX).rpartition(f".{PREFIX}tensors.")
        if found:
            by_module.setdefault(module, {})[name] = tensor
    if not by_module:
        raise AdapterFileError(f"{folder / TENSORS} holds no tensor of a rankwise adapter")
    shapes = _shapes(base if isinstance(base, nn.Module) else skeleton(base or config.base_model_name_or_path, folder))
    for name in by_module.keys() & shapes[0].keys():
        _check_whole(config, name, by_module[name], shapes[0][name], folder / TENSORS)
    updates = {name: _saved_update(config, name, by_module[name]) for name in shapes[0] if name in by_module}
    if len(updates) < len(by_module):
        unknown = sorted(by_module.keys() - updates.keys())
        raise AdapterFileError(
            f"the base model has no module {unknown[0]!r}, which {folder} adapts: is it the right base?"
        )
    others = {key: tensor for key, tensor in state.items() if f".{PREFIX}" not in key}
    progress = Progress.of(next(iter(by_module.values()))["progress"])
    return Source(
        config, updates, others, progress, [int(config.kept(by_module[name]).sum()) for name in updates], *shapes
    )


def read_config(folder: Path) -> AdapterConfig:
    """The config of a saved rankwise adapter.

    Raises:
        AdapterFileError: it is missing, broken, or of another kind.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder)) if (folder / CONFIG).is_file() else None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder / CONFIG} is not a whole adapter config ({type(error).__name__})") from error
    if not isinstance(config, AdapterConfig):
        raise AdapterFileError(
            f"{folder} holds no rankwise adapter: {CONFIG} is {'missing' if config is None else 'of PEFT'}"
        )
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterFileError: it is missing or truncated.
    """
    if not file.is_file():
        raise AdapterFileError(f"{file} is missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is truncated or not safetensors") from error


def skeleton(base: str | Path | None, adapter: Path) -> nn.Module:
    """The base model's modules without its weights.

    Raises:
        AdapterFileError: no base model is named, or it does not open.
    """
    if not base:
        raise AdapterFileError(f"{adapter} does not say its base model; pass `base`")
    try:
        config = AutoConfig.from_pretrained(base)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        with init_empty_weights():
            return next((cls(config) for cls in named if cls), None) or AutoModel.from_config(config)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"the base model {str(base)!r} of {adapter} does not open; pass `base`") from error


def _check_whole(
    config: AdapterConfig, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], file: Path
) -> None:
    """Raise `AdapterFileError` for a module that lacks a tensor of its method, or has one of another shape."""
    size = config.size_of(name, *shape)
    expected = {key: slot.shape for key, slot in config.slots(size).items()} | {"progress": (LENGTH,)}
    for key, wanted in expected.items():
        seen = tuple(tensors[key].shape) if key in tensors else None
        if seen != wanted:
            raise AdapterFileError(f"{file} must hold {key} of {name!r} with shape {wanted}; found {seen}")


def _saved_update(config: AdapterConfig, name: str, tensors: dict[str, Tensor]) -> Factors:
    scale = config.scale_of(name)
    return Factors(*(t.detach() for t in config.factors(tensors, scale)))


def _shapes(model: nn.Module) -> tuple[dict[str, tuple[int, int]], tuple[str, ...], bool]:
    """`linear`, `names` and `transposed` of a Source."""
    linear: dict[str, tuple[int, int]] = {}
    names: list[str] = []
    transposed = False
    for name, module in model.named_modules():
        if f".{PREFIX}" in name or ".modules_to_save" in name or ".original_module" in name:
            continue
        names.append(base_name(name))
        if isinstance(module, AdapterLinear):
            linear[base_name(name)] = (module.out_features, module.in_features)
            transposed = module.fan_in_fan_out
        elif isinstance(module, nn.Linear):
            linear.setdefault(base_name(name), (module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            linear.setdefault(base_name(name), tuple(reversed(module.weight.shape)))  # type: ignore[arg-type]
    return linear, tuple(dict.fromkeys(names)), transposed


def finite(updates: dict[str, Factors]) -> str | None:
    """The name of the first update that holds NaN or infinity."""
    return next((name for name, f in updates.items() if not all(torch.isfinite(t).all() for t in f)), None)
