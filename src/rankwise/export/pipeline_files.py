"""The file of a pipeline's LoRA as it lies there: as diffusers, kohya's scripts and ComfyUI write it.

Such a file holds updates of several components, a UNet or transformer and text encoders, whose names its keys begin
with. A scale is told in one of three ways: by a config for each component in the file's header (diffusers), by a
tensor beside each update that holds its alpha (kohya), or not at all, and then it is 1.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn

from rankwise.base_models import skeleton
from rankwise.errors import AdapterFileError
from rankwise.export.base import formats_of
from rankwise.export.known_base import KnownBase
from rankwise.export.reader import DIFFUSERS, METADATA, AdapterFiles, read_tensors

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "transformer_ref",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_conditioner",
    "connectors",
)
"""The components of pipelines that diffusers loads LoRAs into."""
KOHYA = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
"""What kohya's keys begin with."""
COMFYUI = ("diffusion_model.", "text_encoders.")
"""What ComfyUI's keys begin with."""
FACTOR = re.compile(
    r"(?P<module>.+?)(?P<link>\.lora_|\.lora\.|_lora\.|\.lora_linear_layer\.)(?P<part>A|B|down|up)\.weight"
)
"""A key of A (down) or B (up), as PEFT, kohya's scripts and older versions of diffusers write it."""
PARTS = {"A": "A", "down": "A", "B": "B", "up": "B"}
OLD_NAMES = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
"""What older versions of diffusers called the layers of attention in keys such as `to_q_lora.down.weight`."""


class Keys(NamedTuple):
    """The keys of a module's tensors in a pipeline's file."""

    A: str
    B: str

    @property
    def alpha(self) -> str:
        """The key that the module's alpha has, where the file holds alphas."""
        return f"{self.A.partition('.lora')[0]}.alpha"


@dataclass
class PipelineFiles(AdapterFiles):
    """The file of a pipeline's LoRA. Modules have their component's name before their own, as in the file."""

    file: Path = Path(DIFFUSERS)
    headers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The config of each component, as the file's header holds it; empty where it holds none."""
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    """The keys of A and B by module."""

    def __post_init__(self) -> None:
        for key, tensor in self.tensors.items():
            found = FACTOR.fullmatch(key)
            if found is not None:
                name = _name_today(found["module"], found["link"])
                part = PARTS[found["part"]]
                self.keys.setdefault(name, {})[part] = key
                self.modules.setdefault(name, {})[part] = tensor
            elif key.endswith(".alpha") and tensor.numel() == 1:
                self.alphas[key.removesuffix(".alpha")] = float(tensor)
            else:
                self.others[key] = tensor
        if self.spelling == "diffusers":
            self.without_prefix = [name for name in self.modules if component_of(name) not in COMPONENTS]

    @property
    def spelling(self) -> str:
        """Whose names the keys are."""
        return spelling_of(self.tensors)

    def kohya_components(self) -> list[str]:
        """What kohya's keys in it begin with."""
        return [start for start in KOHYA if any(name.startswith(start) for name in self.modules)]

    def lacks(self, name: str) -> bool:
        """Whether a module's component is known, and has no such module."""
        return self.base is not None and component_of(name) in self.base.components and name not in self.base.names

    def rank(self, name: str) -> int:
        """The rank that the header gives a module; without one, its tensors'."""
        config = self.headers.get(component_of(name))
        if config is None:
            return self.modules[name]["A"].shape[0]
        pattern = config.get("rank_pattern") or {}
        return pattern.get(get_pattern_key(list(pattern), own_name(name)), config.get("r", 8))

    def scale(self, name: str) -> float:
        """What the update of a module is multiplied by."""
        config = self.headers.get(component_of(name))
        rank = self.modules[name]["A"].shape[0]
        if config is None:
            return self.alphas.get(name, rank) / rank
        pattern = config.get("alpha_pattern") or {}
        alpha = pattern.get(get_pattern_key(list(pattern), own_name(name)), config.get("lora_alpha", 8))
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def component_of(name: str) -> str:
    """The component of a pipeline that a module belongs to, as the file calls it."""
    return name.partition(".")[0]


def own_name(name: str) -> str:
    """A module's name within its component."""
    return name.partition(".")[2]


def spelling_of(keys: Iterable[str]) -> str:
    """Whose names keys are: "kohya", "ComfyUI" or "diffusers"."""
    listed = list(keys)
    if any(key.startswith(KOHYA) for key in listed):
        return "kohya"
    return "ComfyUI" if any(key.startswith(COMFYUI) for key in listed) else "diffusers"


def _name_today(module: str, link: str) -> str:
    """A module's name, where older versions of diffusers named layers of attention in another way."""
    module = module.replace(".processor.", ".")
    if link != "_lora.":
        return module
    parent, _, own = module.rpartition(".")
    kind = "text_encoder" if module.startswith("text_encoder") else "unet"
    return f"{parent}.{OLD_NAMES[kind].get(own, own)}"


def pipeline_file(folder: Path) -> Path | None:
    """The file of a pipeline's LoRA: `folder` itself, or the file in it that has diffusers' name or is the only one.

    None where there is none, or where the folder holds PEFT's adapter.
    """
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder
    if (folder / "adapter_config.json").exists() or (folder / "adapter_model.safetensors").exists():
        return None
    if (folder / DIFFUSERS).is_file():
        return folder / DIFFUSERS
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return found[0] if len(found) == 1 else None


def read_pipeline_files(file: Path) -> PipelineFiles:
    """A pipeline's file.

    Raises:
        AdapterFileError: it is broken.
    """
    tensors = read_tensors(file)
    headers = _headers(file)
    return PipelineFiles(file.parent, {}, tensors, True, bool(headers), file=file, headers=headers)


def _headers(file: Path) -> dict[str, dict[str, Any]]:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise AdapterFileError(f"the header of {file} is not whole ({type(error).__name__})") from error
    headers: dict[str, dict[str, Any]] = {}
    for key, value in found.items() if isinstance(found, dict) else ():
        component, dot, entry = key.partition(".")
        if not dot:
            raise AdapterFileError(f"the header of {file} has an entry {key!r}, which names no component")
        headers.setdefault(component, {})[entry] = value
    return headers


# --- the base model, and the names that diffusers makes of others ---------------------------------------------------


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
        modules = PipelineFiles(files.folder, {}, tensors, True, False).modules
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
