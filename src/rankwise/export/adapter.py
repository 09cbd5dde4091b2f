"""What every export, merge and check works on: an adapter's updates, and what stands beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.export.lora_format import LoraFormat
from rankwise.update import Factors

if TYPE_CHECKING:
    from rankwise.adapters.configs import AdapterConfig
    from rankwise.adapters.progress import Progress

FROZEN = ".base_layer."
"""In the names of frozen weights that PEFT saves beside an adapted embedding."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter: a plain LoRA of anybody's, a sum of several, or one of rankwise's."""

    config: Mapping[str, Any]
    """Its config under PEFT's names, as its JSON holds them."""
    updates: dict[str, Factors]
    """By module name in the base model; a convolution's A is (r, in·kernel), an embedding's (r, entries)."""
    others: dict[str, Tensor]
    """Modules trained in full (a classifier) and frozen weights that PEFT saves beside them, by PEFT's names."""
    formats: dict[str, LoraFormat]
    """Of every module that is known and can be adapted: at least those that are."""
    names: tuple[str, ...]
    """Every module name that is known and could match a target: at least those of the adapted modules."""
    dtype: torch.dtype = torch.float32
    """What its A and B are written in."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain LoRA, whose config already chooses its modules."""
        return self.config.get("peft_type") == "LORA"


@dataclass(frozen=True, kw_only=True)
class TrainedAdapter(Adapter):
    """An adapter of rankwise's, with what training left beside its updates."""

    method: AdapterConfig
    """Its config, which is its method."""
    progress: Progress
    """How far training had come."""
    trained: dict[str, Factors]
    """The part of each update that training moves; see `Method.moving_factors`."""
    ranks: list[int]
    """What the method has not pruned, per module."""
    base_class: str
    """What the base model is."""


def check_config(config: Mapping[str, Any], subject: str) -> None:
    """Raise `RankwiseError` for a config whose adapter could not be one plain LoRA; `subject` is how messages begin."""
    if config.get("bias", "none") not in ("none", None):
        raise RankwiseError(
            f"{subject} trains biases, which cannot be part of a plain LoRA that servers load: "
            f"`bias` is {config['bias']!r}"
        )
    if config.get("trainable_token_indices"):
        raise RankwiseError(
            f"{subject} trains single rows of an embedding (`trainable_token_indices`), which cannot be part of a "
            "plain LoRA that servers load: save the whole model, after `merge_and_unload()`"
        )


def check_adapter(adapter: Adapter, subject: str) -> None:
    """Raise `RankwiseError` for an adapter that cannot be one plain LoRA, or that holds NaN or infinity."""
    check_config(adapter.config, subject)
    for name in adapter.updates:
        reason = adapter.formats[name].unlike
        if reason:
            raise RankwiseError(f"the update of module {name!r} cannot be a plain LoRA: {reason}")
    broken = first_not_finite(adapter.updates)
    if broken:
        raise RankwiseError(f"the update of module {broken!r} holds NaN or infinity ({subject})")
    broken = key_not_finite(adapter.others)
    if broken:
        raise RankwiseError(f"{broken!r}, trained in full, holds NaN or infinity ({subject})")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; integers never do."""
    # isfinite is not there for float8, which float32 holds exactly.
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


def first_not_finite(updates: Mapping[str, Factors]) -> str | None:
    """The name of the first update that holds NaN or infinity."""
    return next((name for name, f in updates.items() if not all(is_finite(t) for t in f)), None)


def key_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of the first tensor that holds NaN or infinity."""
    return next((key for key, tensor in tensors.items() if not is_finite(tensor)), None)
