"""What is known of a pipeline's components while a LoRA of it is checked, and what diffusers makes of its names."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.base_models import skeleton
from rankwise.errors import AdapterFileError
from rankwise.export.base import formats_of
from rankwise.export.known_base import KnownBase
from rankwise.export.pipeline_files import COMPONENTS, PipelineFiles, component_of

UNET_LOADERS = ("StableDiffusionLoraLoaderMixin", "StableDiffusionXLLoraLoaderMixin")
"""diffusers' loaders of LoRAs of a UNet."""
CANNOT_CONVERT = (ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""What diffusers' loaders raise for names that they do not know."""


def known_pipeline(base: str | Path | nn.Module | None) -> KnownBase | None:
    """What is known of the components of a pipeline: of its folder, or of one component, a model or a folder.

    Raises:
        ArgumentError: a base model was named, and does not open.
    """
    if base is None:
        return None
    found = dict(_components(base))
    names: set[str] = set()
    shapes: dict[str, tuple[int, int]] = {}
    for component, model in found.items():
        # Text encoders were once wrapped in `text_model`, which diffusers leaves out of older files' names.
        before = [component]
        if component.startswith("text_encoder") and not hasattr(model, "text_model"):
            before.append(f"{component}.text_model")
        formats, own_names = formats_of(model)
        names |= {f"{start}.{name}" for start in before for name in own_names}
        shapes |= {f"{start}.{name}": form.shape for start in before for name, form in formats.items()}
    unet_config = getattr(found.get("unet"), "config", None)
    return KnownBase(frozenset(names), shapes, components=frozenset(found), unet_config=unet_config)


def _components(base: str | Path | nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The components of a pipeline by name, without weights unless a model was given."""
    if isinstance(base, nn.Module):
        yield component_of_class(type(base).__name__), base
    elif (Path(base) / "model_index.json").is_file():
        for component in COMPONENTS:
            if (Path(base) / component / "config.json").is_file():
                yield component, skeleton(Path(base) / component)
    else:
        model = skeleton(base)
        yield component_of_class(type(model).__name__), model


def component_of_class(name: str) -> str:
    """What diffusers calls a component of this class; empty if it is none that it loads LoRAs into."""
    for part, component in (("UNet", "unet"), ("CLIPText", "text_encoder"), ("Transformer", "transformer")):
        if part in name:
            return component
    return ""


def unconverted_by_diffusers(files: PipelineFiles) -> str | None:
    """Why no loader of diffusers' turns kohya's or ComfyUI's names into names of the base model, in a sentence.

    diffusers' own loaders are asked. None where one does, or where diffusers is not installed.
    """
    try:
        loaders = importlib.import_module("diffusers.loaders")
    except ImportError:
        return None
    reason = "none of its loaders turns the names into those of the base model"
    # Those of Stable Diffusion know kohya's names, and would misread those of other pipelines only without a base.
    names = sorted(name for name in dir(loaders) if name.endswith("LoraLoaderMixin"))
    for name in sorted(names, key=lambda name: not name.startswith("StableDiffusion")):
        # SDXL's LoRAs may have the blocks' numbers of old, which depend on the UNet.
        unet_config = None if files.base is None else files.base.unet_config
        told = {"unet_config": unet_config} if name in UNET_LOADERS else {}
        try:
            converted = getattr(loaders, name).lora_state_dict(dict(files.tensors), **told)
        except CANNOT_CONVERT as error:
            if name.startswith("StableDiffusion"):
                reason = f"its loader cannot convert the names: {' '.join(str(error).split())[:120]}"
            continue
        tensors = converted[0] if isinstance(converted, tuple) else converted
        modules = PipelineFiles(files.folder, {}, tensors).modules
        if modules and all(_may_be_meant(module, files) for module in modules):
            return None
    return reason


def names_in_diffusers(modules: Iterable[str], unet_config: Any) -> dict[str, str]:
    """What diffusers calls the modules of a kohya LoRA of a UNet and text encoders, their component's name in front.

    Args:
        modules: by kohya's names.
        unet_config: the UNet's, since the numbers that blocks had of old depend on it.

    Raises:
        AdapterFileError: diffusers is not installed, or does not convert such names.
    """
    old_names = list(modules)
    # diffusers converts files. Each tensor of this one holds the number of its module, so that it is found again.
    numbers: dict[str, Tensor] = {}
    for i, name in enumerate(old_names):
        number = torch.full((1, 1), float(i))
        numbers |= {f"{name}.lora_down.weight": number, f"{name}.lora_up.weight": number}
    try:
        loader = importlib.import_module("diffusers.loaders").StableDiffusionXLLoraLoaderMixin
        converted, _ = loader.lora_state_dict(numbers, unet_config=unet_config)
    except ImportError as error:
        raise AdapterFileError("kohya's names are read with diffusers, which is not installed") from error
    except CANNOT_CONVERT as error:
        reason = " ".join(str(error).split())[:120]
        raise AdapterFileError(f"diffusers cannot convert kohya's names of this LoRA: {reason}") from error
    found: dict[str, str] = {}
    for name, parts in PipelineFiles(Path(), {}, converted).modules.items():
        found[old_names[int(parts["A"])]] = name
    for old in old_names:
        if old not in found:
            raise AdapterFileError(f"diffusers leaves out {old!r} where it converts kohya's names of this LoRA")
    return found


def _may_be_meant(module: str, files: PipelineFiles) -> bool:
    """Whether a module of a converted file is one of the base model's, as far as that is known."""
    component = component_of(module)
    if files.base is None or component in files.base.components:
        return component in COMPONENTS and not files.lacks(module)
    # A base that is a UNet or a transformer says what the image is made by; a text encoder says nothing of that.
    is_text = [known.startswith("text") for known in (component, *files.base.components)]
    return component in COMPONENTS and (is_text[0] or all(is_text[1:]))
