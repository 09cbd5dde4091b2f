"""An adapter of rankwise's to export: from a live model or from a saved folder, which give the same record."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.embedding import without_padding
from rankwise.adapters.lookup import adapted_layers, factors, ranks, reduced, trained_factors
from rankwise.adapters.progress import LENGTH, Progress, unfinished
from rankwise.adapters.tensors import ADDED_IN_FORMAT_2
from rankwise.adapters.tuner import PREFIX
from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.adapter import TrainedAdapter
from rankwise.export.base import class_of, formats_of, opened_base
from rankwise.export.keys import PEFT_PREFIX
from rankwise.export.lora_config import CONFIG, read_config
from rankwise.export.lora_format import EMBEDDING, LoraFormat
from rankwise.export.reader import TENSORS, read_tensors
from rankwise.update import Factors


def from_model(model: nn.Module, adapter: str) -> TrainedAdapter:
    """The adapter of a live model.

    Raises:
        ArgumentError: the model has no such adapter.
        RankwiseError: FSDP2 has it in pieces.
    """
    layers = adapted_layers(model, adapter)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise RankwiseError("FSDP2 has the model in pieces, on every process some: save it whole and export the folder")
    first = next(iter(layers.values()))
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    method: Any = first.methods[adapter]
    formats, names = formats_of(model)
    return TrainedAdapter(
        config=dict(vars(method)),
        updates=factors(model, adapter),
        others=_beside(state),
        formats=formats,
        names=names,
        method=method,
        progress=Progress.of(first.started(adapter).progress),
        trained=trained_factors(model, adapter),
        ranks=list(ranks(model, adapter).values()),
        base_class=class_of(model),
    )


def from_folder(folder: Path, base: str | Path | nn.Module | None) -> TrainedAdapter:
    """The adapter saved in `folder`.

    Args:
        folder: as written by `save_pretrained`.
        base: the base model, or where it is; by default where the adapter's config says.

    Raises:
        AdapterFileError: the folder holds no whole rankwise adapter, or its base model cannot be opened.
    """
    method = read_method(folder)
    state = read_tensors(folder / TENSORS)
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, found, name = key.removeprefix(PEFT_PREFIX).rpartition(f".{PREFIX}tensors.")
        if found:
            by_module.setdefault(module, {})[name] = tensor
    if not by_module:
        raise AdapterFileError(f"{folder / TENSORS} holds no tensor of a rankwise adapter")
    config = read_config(folder)
    model = opened_base(base, config, folder)
    formats, names = formats_of(model)
    for name in by_module.keys() & formats.keys():
        _check_same_base(name, state.get(f"{PEFT_PREFIX}{name}.base_layer.weight"), formats[name], folder)
        _check_whole(method, name, by_module[name], formats[name].shape, folder / TENSORS)
    updates = {
        name: _saved_update(method, name, by_module[name], form.padding)
        for name, form in formats.items()
        if name in by_module
    }
    if len(updates) < len(by_module):
        unknown = sorted(by_module.keys() - updates.keys())
        raise AdapterFileError(
            f"the base model has no module {unknown[0]!r}, which {folder} adapts: is it the right base?"
        )
    return TrainedAdapter(
        config=config,
        updates=updates,
        others=_beside(state),
        formats=formats,
        names=names,
        method=method,
        progress=Progress.of(next(iter(by_module.values()))["progress"]),
        trained={name: _saved_trained(method, name, by_module[name]) for name in updates},
        ranks=[int(method.ranks_left(by_module[name]).sum()) for name in updates],
        base_class=class_of(model),
    )


def from_folder_reduced(folder: Path, base: str | Path | nn.Module | None) -> TrainedAdapter:
    """The adapter saved in `folder`, without ranks that hold nothing; warns where its training stopped short.

    Raises:
        AdapterFileError: as `from_folder`.
    """
    adapter = from_folder(folder, base)
    left = unfinished(adapter.method, adapter.progress, adapter.ranks)
    if left:
        warnings.warn(f"{folder}: {left}", stacklevel=4)
    return dataclasses.replace(adapter, updates=reduced(adapter.updates, adapter.method))


def read_method(folder: Path) -> AdapterConfig:
    """The config of a saved rankwise adapter, which is its method.

    Raises:
        AdapterFileError: it is missing, broken, or of another kind.
    """
    config = opened_config(folder)
    if not isinstance(config, AdapterConfig):
        raise AdapterFileError(
            f"{folder} holds no rankwise adapter: {CONFIG} is {'missing' if config is None else 'of PEFT'}"
        )
    return config


def opened_config(folder: Path) -> PeftConfig | None:
    """The config in a folder as PEFT reads it; None where there is none.

    Raises:
        AdapterFileError: it is broken, of an unknown kind, or has entries that no loader can apply.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    read_config(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except RankwiseError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file} is not a whole adapter config ({type(error).__name__})") from error


def _beside(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that are none of rankwise's: modules trained in full."""
    return {key: tensor for key, tensor in state.items() if f".{PREFIX}" not in key}


def _check_same_base(name: str, saved: Tensor | None, form: LoraFormat, folder: Path) -> None:
    """Raise `AdapterFileError` where PEFT saved the frozen weight of an adapted embedding, and the base's is of another
    shape: the vocabulary was resized after the base model had been saved."""
    shape = form.shape[::-1] if form.kind == EMBEDDING else form.shape
    if saved is not None and saved.is_floating_point() and tuple(saved.shape) != shape:
        raise AdapterFileError(
            f"{folder} was trained on a base model whose {name!r} is {tuple(saved.shape)}, and this base model's is "
            f"{shape}: save the base model with its resized vocabulary and pass it as `base`"
        )


def _check_whole(
    method: AdapterConfig, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], file: Path
) -> None:
    """Raise `AdapterFileError` for a module that lacks a tensor of its method, or has one of another shape."""
    size = method.size_of(name, *shape)
    slots = method.slots(size)
    expected = {key: slot.shape for key, slot in slots.items()} | {"progress": (LENGTH,)}
    if method.rankwise_format == 1:
        expected = {key: wanted for key, wanted in expected.items() if key not in ADDED_IN_FORMAT_2}
    for key, wanted in expected.items():
        seen = tuple(tensors[key].shape) if key in tensors else None
        if seen != wanted:
            raise AdapterFileError(f"{file} must hold {key} of {name!r} with shape {wanted}; found {seen}")
        real = key in slots and slots[key].dtype.is_floating_point
        if real and not tensors[key].is_floating_point():
            raise AdapterFileError(f"{file} must hold {key} of {name!r} as real numbers; found {tensors[key].dtype}")


def _saved_update(method: AdapterConfig, name: str, tensors: dict[str, Tensor], padding: int | None) -> Factors:
    found = method.evaluation_factors(tensors, method.scale_of(name))
    return without_padding(Factors(*(t.detach() for t in found)), padding)


def _saved_trained(method: AdapterConfig, name: str, tensors: dict[str, Tensor]) -> Factors:
    found = method.moving_factors(tensors, method.scale_of(name))
    return Factors(*(t.detach() for t in found))
