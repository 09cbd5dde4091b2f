"""What is known of a pipeline's components while a LoRA of it is checked, and what diffusers makes of its names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from rankwise.base_models import skeleton
from rankwise.export.base import formats_of
from rankwise.export.known_base import KnownBase
from rankwise.export.pipeline_files import COMPONENTS, PipelineFiles, component_of


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
    return KnownBase(frozenset(names), shapes, components=frozenset(found))


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
        try:
            converted = getattr(loaders, name).lora_state_dict(dict(files.tensors))
        except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            if name.startswith("StableDiffusion"):
                reason = f"its loader cannot convert the names: {' '.join(str(error).split())[:120]}"
            continue
        tensors = converted[0] if isinstance(converted, tuple) else converted
        modules = PipelineFiles(files.folder, {}, tensors).modules
        if modules and all(_may_be_meant(module, files) for module in modules):
            return None
    return reason


def _may_be_meant(module: str, files: PipelineFiles) -> bool:
    """Whether a module of a converted file is one of the base model's, as far as that is known."""
    component = component_of(module)
    if files.base is None or component in files.base.components:
        return component in COMPONENTS and not files.lacks(module)
    # A base that is a UNet or a transformer says what the image is made by; a text encoder says nothing of that.
    is_text = [known.startswith("text") for known in (component, *files.base.components)]
    return component in COMPONENTS and (is_text[0] or all(is_text[1:]))
