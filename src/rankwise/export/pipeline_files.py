"""The file of a pipeline's LoRA as it lies there: as diffusers, kohya's scripts and ComfyUI write it.

Such a file holds updates of several components, a UNet or transformer and text encoders, whose names its keys begin
with. A scale is told in one of three ways: by a config for each component in the file's header (diffusers), by a
tensor beside each update that holds its alpha (kohya), or not at all, and then it is 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from safetensors import safe_open

from rankwise.errors import AdapterFileError
from rankwise.export.lora_config import CONFIG, rank_of, wrong_entry
from rankwise.export.reader import TENSORS, AdapterFiles, read_tensors

DIFFUSERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
"""Where the header of diffusers' file holds configs."""
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
NUMBERINGS = {
    "Stability AI": ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_"),
    "diffusers": ("lora_unet_down_blocks_", "lora_unet_mid_block_", "lora_unet_up_blocks_"),
}
"""What kohya's keys of a UNet's blocks begin with, by who numbered the blocks: kohya's scripts know both."""
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
        found = FACTOR.fullmatch(self.A)
        assert found is not None, "A's key is one of A or B"
        return f"{found['module']}.alpha"


@dataclass
class PipelineFiles(AdapterFiles):
    """The file of a pipeline's LoRA. Modules have their component's name before their own, as in the file."""

    is_of_pipeline: ClassVar[bool] = True
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

    def alpha_name(self, name: str) -> str:
        """A module's name as its alpha's key has it."""
        return Keys(**self.keys[name]).alpha.removesuffix(".alpha")

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
        return rank_of(config, own_name(name))


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


def numberings_of(names: Iterable[str]) -> list[str]:
    """By whose numbers kohya's keys name a UNet's blocks."""
    listed = list(names)
    return [who for who, starts in NUMBERINGS.items() if any(name.startswith(starts) for name in listed)]


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

    None where there is none, or where the folder holds PEFT's adapter or a whole model.
    """
    if folder.is_file() and folder.suffix == ".safetensors":
        return folder
    if any((folder / name).exists() for name in (CONFIG, TENSORS, "config.json")):
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
    return PipelineFiles(file.parent, {}, tensors, file=file, headers=headers)


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
    for component, config in headers.items():
        wrong = wrong_entry(config)
        if wrong:
            raise AdapterFileError(f"the header of {file} {wrong}, for {component}")
    return headers
