"""An adapter as it lies in a folder, before anything is believed of it: what `check_export` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.known_base import KnownBase
from rankwise.export.plain import PARTS
from rankwise.export.source import CONFIG, PEFT_PREFIX, TENSORS, read_tensors, wrong_entry

DIFFUSERS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
COMPONENTS = ("unet.", "transformer.")


@dataclass
class Shipped:
    """The files of an adapter: a config and tensors, neither checked against the other."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    is_diffusers: bool
    has_metadata: bool
    base: KnownBase | None = None
    """What is known of the base model."""
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """A and B by module name in the base model, as far as they are there."""
    others: list[str] = field(default_factory=list)
    """Keys of tensors that are no A or B."""
    without_prefix: list[str] = field(default_factory=list)
    """Keys that lack the prefix their kind of file needs."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Scales beside the tensors, as diffusers and others before it write them, by module name."""

    def __post_init__(self) -> None:
        for key, tensor in self.tensors.items():
            ending = next((ending for ending in PARTS if key.endswith(ending)), None)
            prefix = next((p for p in (*COMPONENTS, PEFT_PREFIX) if key.startswith(p)), "")
            if key.endswith(".alpha") and tensor.numel() == 1:
                self.alphas[key.removeprefix(prefix).removesuffix(".alpha")] = float(tensor)
                continue
            if ending is None:
                self.others.append(key.removeprefix(prefix))
                continue
            self.modules.setdefault(key.removeprefix(prefix).removesuffix(ending), {})[PARTS[ending]] = tensor
            if prefix not in (COMPONENTS if self.is_diffusers else (PEFT_PREFIX,)):
                self.without_prefix.append(key)

    @property
    def whole(self) -> dict[str, dict[str, Tensor]]:
        """The modules that have both A and B, of two dimensions or more."""
        return {n: p for n, p in self.modules.items() if len(p) == 2 and all(t.dim() > 1 for t in p.values())}

    @property
    def largest_rank(self) -> int:
        """The largest rank the config or a tensor asks for."""
        ranks = [r for r in (self.config.get("rank_pattern") or {}).values() if isinstance(r, int)]
        ranks += [] if self.is_diffusers else [self.config.get("r", 8)]
        return max([1, *ranks, *(parts["A"].shape[0] for parts in self.whole.values())])

    @cached_property
    def lora_config(self) -> peft.LoraConfig | None:
        """The config as PEFT reads it; None if it cannot."""
        known = peft.LoraConfig.__dataclass_fields__.keys() - {"peft_type"}
        try:
            return peft.LoraConfig(**{key: value for key, value in self.config.items() if key in known})
        except (TypeError, ValueError):
            return None

    def lacks(self, name: str) -> bool:
        """Whether the base model is known, and has no module of this name."""
        return self.base is not None and name not in self.base.names

    def is_target(self, name: str) -> bool:
        """Whether the config says that a module is adapted."""
        return self.lora_config is not None and bool(check_target_module_exists(self.lora_config, name))

    def is_of_parameters(self, name: str) -> bool:
        """Whether a module's tensors update parameters that the config names (`target_parameters`), as fused experts.

        PEFT wraps the module once for each of its parameters, so that names may end in `.base_layer`.
        """
        module = name.replace(".base_layer", "")
        targets = self.config.get("target_parameters") or ()
        return any(f".{module}".endswith(f".{target.rpartition('.')[0]}") for target in targets)

    def alpha(self, name: str) -> float | None:
        """The lora_alpha that the config gives a module."""
        pattern = self.config.get("alpha_pattern") or {}
        return pattern.get(get_pattern_key(list(pattern), name), self.config.get("lora_alpha", 8))

    def rank(self, name: str) -> int:
        """The rank that the config gives a module."""
        if self.is_diffusers and not self.has_metadata:
            return self.whole[name]["A"].shape[0]
        pattern = self.config.get("rank_pattern") or {}
        return pattern.get(get_pattern_key(list(pattern), name), self.config.get("r", 8))

    def scale(self, name: str) -> float:
        """What a reader that knows only tensors and their alphas would have to multiply the update by, against rank."""
        rank = self.whole[name]["A"].shape[0]
        return self.alphas.get(name, rank) / rank

    def not_finite(self) -> Iterator[str]:
        """Keys of tensors with NaN or infinity."""
        for key, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                yield key

    def siblings(self) -> dict[str, set[str]]:
        """The adapted modules' own names, by their parent."""
        found: dict[str, set[str]] = {}
        for name in self.modules:
            parent, _, own = name.rpartition(".")
            found.setdefault(parent, set()).add(own)
        return found


def read_shipped(folder: Path) -> Shipped:
    """The files of a folder.

    Raises:
        AdapterFileError: there is no adapter, or only pickled weights, or a file is broken.
    """
    diffusers = folder / DIFFUSERS
    if not (folder / TENSORS).is_file() and diffusers.is_file():
        tensors, metadata = read_tensors(diffusers), _metadata(diffusers)
        config = _json(metadata[METADATA], diffusers) if METADATA in metadata else {}
        config = {key.split(".", 1)[-1]: value for key, value in config.items()}
        return Shipped(folder, config, tensors, is_diffusers=True, has_metadata=METADATA in metadata)
    if not (folder / TENSORS).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) if folder.is_dir() else []
        also = f"; {pickled[0]} is a pickle, which is never opened" if pickled else ""
        raise AdapterFileError(f"{folder / TENSORS} is missing{also}")
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder / CONFIG} is missing")
    config = _json((folder / CONFIG).read_text(encoding="utf-8", errors="replace"), folder / CONFIG)
    return Shipped(folder, config, read_tensors(folder / TENSORS), is_diffusers=False, has_metadata=False)


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def _json(text: str, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise AdapterFileError(f"{file} is not a whole adapter config ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{file} is not a whole adapter config (it holds a {type(found).__name__})")
    wrong = wrong_entry(found)
    if wrong:
        raise AdapterFileError(f"{file} {wrong}")
    return found


def rename_for_diffusers(folder: Path, base_class: str) -> None:
    """A PEFT adapter in diffusers' one file: keys under the component's name, the config in the file's header.

    Raises:
        RankwiseError: the base model is none of diffusers' UNets or transformers.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    component = next(
        (name for part, name in (("UNet", "unet"), ("Transformer", "transformer")) if part in base_class), ""
    )
    if not component:
        raise RankwiseError(
            f"diffusers would not serve this adapter: {base_class} is none of its UNets or transformers"
        )
    tensors = {f"{component}.{key.removeprefix(PEFT_PREFIX)}": t for key, t in read_tensors(folder / TENSORS).items()}
    header = {f"{component}.{key}": value for key, value in config.items()}
    save_file(tensors, folder / DIFFUSERS, {"format": "pt", METADATA: json.dumps(header, indent=2, sort_keys=True)})
    (folder / TENSORS).unlink()
    (folder / CONFIG).unlink()
