"""Reading a plain LoRA adapter: ours or anybody's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.convolution import AdapterConv2d
from rankwise.adapters.embedding import AdapterEmbedding
from rankwise.adapters.linear import AdapterLinear
from rankwise.errors import AdapterFileError
from rankwise.export.source import CONFIG, PEFT_PREFIX, TENSORS, Form, not_finite, opened_config, read_tensors
from rankwise.update import Factors

PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B"}

NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
"""A module's name: no path, nothing empty."""
BEYOND_UPDATES = ("trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens")
BEYOND_UPDATES += ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config")
"""Fields of PEFT's LoraConfig that make an adapter more than updates of modules."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of PEFT's that leave the base weight as it is; after others (PiSSA), B·A is no update of the base model."""


@dataclass(frozen=True)
class PlainLora:
    """A plain LoRA adapter."""

    config: peft.LoraConfig
    updates: dict[str, Factors]
    """By module name in the base model; a convolution's A is (r, in·kh·kw), an embedding's (r, entries)."""
    others: dict[str, Tensor]
    """Modules trained in full (a classifier), by PEFT's names for them."""
    forms: dict[str, Form]
    """Of every adapted module."""

    @property
    def names(self) -> tuple[str, ...]:
        """The adapted modules: all that is known of the base model."""
        return tuple(self.updates)


def read_plain(folder: Path) -> PlainLora:
    """The plain LoRA adapter in a folder.

    Raises:
        AdapterFileError: it is missing, truncated, of another kind, not finite, or has parts that a plain update cannot
            hold.
    """
    config = _plain_config(folder)
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    for key, tensor in read_tensors(folder / TENSORS).items():
        ending = next((ending for ending in PARTS if key.endswith(ending)), None)
        if ending is not None:
            name = key.removeprefix(PEFT_PREFIX).removesuffix(ending)
            found.setdefault(name, {})[PARTS[ending]] = tensor
            if "embedding" in ending:
                embeddings.add(name)
        elif ".lora_" in key:
            raise AdapterFileError(f"{folder / TENSORS} holds {key!r}, which a plain LoRA does not have")
        else:
            others[key] = tensor
    broken = not_finite(others)
    if broken:
        raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in {broken!r}")
    if not found:
        raise AdapterFileError(f"{folder / TENSORS} holds no tensor of a LoRA adapter")
    updates = {name: _update(config, name, parts, folder) for name, parts in found.items()}
    forms = {name: _form(parts, name in embeddings, config.fan_in_fan_out) for name, parts in found.items()}
    return PlainLora(config, updates, others, forms)


def _plain_config(folder: Path) -> peft.LoraConfig:
    config = opened_config(folder)
    if config is None:
        raise AdapterFileError(f"{folder} holds no LoRA adapter: {CONFIG} is missing")
    if isinstance(config, AdapterConfig):
        raise AdapterFileError(f"{folder} holds a {config.method} adapter of rankwise: export it first")
    if type(config) is not peft.LoraConfig:
        raise AdapterFileError(f"{folder} holds no LoRA adapter")
    if config.use_dora:
        raise AdapterFileError(f"{folder} holds a DoRA adapter, whose magnitudes no plain update can hold")
    for field in BEYOND_UPDATES:
        if getattr(config, field, None):
            raise AdapterFileError(f"{folder} holds more than updates of modules: its config has `{field}`")
    if config.init_lora_weights not in STARTS:
        raise AdapterFileError(
            f"{folder} started from {config.init_lora_weights!r}, which changes the base model: convert it first"
        )
    return config


def _form(parts: dict[str, Tensor], embedding: bool, transposed: bool) -> Form:
    """What the tensors tell of their module."""
    A, B = parts["A"], parts["B"]
    shape = (B.shape[0], A.flatten(1).shape[1])
    if embedding:
        return Form(AdapterEmbedding, shape, transposed=False)
    if A.dim() == 4:
        return Form(AdapterConv2d, shape, transposed=False, kernel=tuple(A.shape[1:]))
    return Form(AdapterLinear, shape, transposed)


def _update(config: peft.LoraConfig, name: str, parts: dict[str, Tensor], folder: Path) -> Factors:
    if parts.keys() != {"A", "B"}:
        raise AdapterFileError(f"{folder / TENSORS} lacks half of the update of {name!r}")
    if not NAME.fullmatch(name):
        raise AdapterFileError(f"{folder / TENSORS} holds an update of {name!r}, which is no name of a module")
    for part, tensor in parts.items():
        if tensor.dim() not in (2, 4) or not tensor.is_floating_point():
            seen = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise AdapterFileError(f"{folder / TENSORS} must hold {part} of {name!r} as a real matrix; found {seen}")
        if not tensor.float().isfinite().all():
            raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in {name!r}")
    A, B = parts["A"].flatten(1), parts["B"].flatten(1)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    if A.shape[0] != r or B.shape[1] != r:
        raise AdapterFileError(f"{name!r} should have rank {r} by {CONFIG}; found {A.shape[0]} and {B.shape[1]}")
    if alpha is None:
        raise AdapterFileError(f"{folder / CONFIG} must give {name!r} a number as lora_alpha; found None")
    scale = alpha / (r**0.5 if config.use_rslora else r) if r else 1.0
    return Factors(B, torch.full((r,), scale, dtype=torch.float32), A)
