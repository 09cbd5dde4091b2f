"""What an export must know of the base model: its modules, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.convolution import AdapterConv2d
from rankwise.adapters.embedding import AdapterEmbedding
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import base_name
from rankwise.adapters.tuner import PREFIX, kind_of
from rankwise.base_models import skeleton
from rankwise.errors import AdapterFileError, ArgumentError
from rankwise.export.lora_format import CONVOLUTION, EMBEDDING, LINEAR, LoraFormat

BOUNDED = "max_norm bounds the columns of A wherever they are looked up, and an export may hold another A"
INSIDE_WRAPPERS = (f".{PREFIX}", ".modules_to_save", ".original_module")
"""In the names of modules that adapters bring along."""


def told_base(base: str | Path | None, config: Mapping[str, Any], adapter: Path) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model: `base`, or what the adapter's config says.

    The config's revision belongs to the model that the config names.

    Raises:
        AdapterFileError: neither names one.
    """
    named = config.get("base_model_name_or_path")
    if not (base or named):
        raise AdapterFileError(f"{adapter} does not say its base model; pass `base`")
    name = str(base or named)
    return name, config.get("revision") if name == named else None


def trained_as(config: Mapping[str, Any]) -> str | None:
    """The class of the base model that PEFT noted in an adapter's config."""
    return (config.get("auto_mapping") or {}).get("base_model_class")


def opened_base(base: str | Path | nn.Module | None, config: Mapping[str, Any], adapter: Path) -> nn.Module:
    """The base model that an adapter was trained on, without its weights unless it was given as a model.

    Args:
        base: the base model, or where it is; by default where the adapter's config says.
        config: the adapter's, as its JSON holds it.
        adapter: the adapter's folder, for messages.

    Raises:
        AdapterFileError: no base model is named, or it does not open.
    """
    if isinstance(base, nn.Module):
        return base
    name, revision = told_base(base, config, adapter)
    try:
        return skeleton(name, config.get("task_type"), revision=revision, trained_as=trained_as(config))
    except ArgumentError as error:
        raise AdapterFileError(f"the base model {name!r} of {adapter} does not open; pass `base` ({error})") from error


def class_of(model: nn.Module) -> str:
    """The name of the base model's class, whatever wraps it."""
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def formats_of(model: nn.Module) -> tuple[dict[str, LoraFormat], tuple[str, ...]]:
    """The format of every module of a base model that can be adapted, and the names of all its modules."""
    formats: dict[str, LoraFormat] = {}
    names: list[str] = []
    for name, module in model.named_modules():
        if any(part in name for part in INSIDE_WRAPPERS):
            continue
        names.append(base_name(name))
        found = _format_of(module.get_base_layer() if isinstance(module, AdapterLayer) else module)
        if found is not None:
            formats.setdefault(base_name(name), found)
    return formats, tuple(dict.fromkeys(names))


def _format_of(root: Any) -> LoraFormat | None:
    """The format of a base layer; None for one that is not adapted."""
    layer_class = kind_of(root)
    if layer_class is None or layer_class.refusal(root):
        return None
    shape = layer_class.matrix_shape(root)
    if issubclass(layer_class, AdapterConv2d):
        kernel = (root.in_channels, *root.kernel_size)
        return LoraFormat(CONVOLUTION, shape, kernel=kernel, unlike=_unlike_convolution(root))
    if issubclass(layer_class, AdapterEmbedding):
        unlike = None if root.max_norm is None else BOUNDED
        return LoraFormat(EMBEDDING, shape, padding=root.padding_idx, unlike=unlike)
    return LoraFormat(LINEAR, shape, transposed=isinstance(root, Conv1D))


def _unlike_convolution(root: nn.Conv2d) -> str | None:
    if root.dilation != (1, 1):
        return f"PEFT's LoRA ignores a convolution's dilation, here {root.dilation}"
    if root.padding_mode != "zeros":
        return f"PEFT's LoRA pads a convolution's input with zeros, and the padding here is {root.padding_mode!r}"
    return None
