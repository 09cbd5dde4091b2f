"""The config of a merged model where it cannot stay what the base model's was: its ties, sizes and dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from rankwise.export.into_base.adapted import own_name
from rankwise.export.keys import PEFT_PREFIX

TIE = "tie_word_embeddings"
TIE_MEANS_MORE = ("switch_transformers", "udop", "umt5")
"""Model types that also scale their output where the config ties, so that the config must go on saying so."""


def resized(told: Mapping[str, Any], skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A config with as many labels and tokens as an adapter's own tensors have.

    Args:
        told: the config as it lies in its file.
        skeleton: the model that it makes.
        tensors: the adapter's: a head trained in full, or embeddings of a vocabulary that has grown.
    """
    config: Any = getattr(skeleton, "config", None)
    changed = copy.deepcopy(dict(told))
    if not isinstance(config, PretrainedConfig):
        return changed
    shapes = {name: tuple(t.shape) for name, t in skeleton.state_dict().items()}
    for key, tensor in tensors.items():
        name = own_name(key.removeprefix(PEFT_PREFIX))
        before, after = shapes.get(name), tuple(tensor.shape)
        if not before or before == after or before[1:] != after[1:]:
            continue
        parts = _parts(config, _place_of(config, told))
        vocabularies = [path for path, part in parts if getattr(part, "vocab_size", None) == before[0]]
        # An encoder and a decoder may have vocabularies of one size, of which one has grown.
        named = [path for path in vocabularies if path and path[-1] == name.partition(".")[0]]
        vocabularies = named or vocabularies
        for path in vocabularies:
            _entries(changed, path)["vocab_size"] = after[0]
        if not vocabularies and before[0] == config.num_labels:
            names = [f"LABEL_{i}" for i in range(after[0])]
            changed["id2label"] = {str(i): name for i, name in enumerate(names)}
            changed["label2id"] = {name: i for i, name in enumerate(names)}
    return changed


def untied(told: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """A config that ties no embeddings: neither the model's nor those of a model inside of it."""
    changed = copy.deepcopy(dict(told))
    for path, part in _parts(config, _place_of(config, told)):
        if getattr(part, TIE, False):
            _entries(changed, path)[TIE] = False
    return changed


def with_dtype(told: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that says `dtype` wherever it said one."""
    changed = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in told.items()}
    return changed | {key: dtype for key in ("dtype", "torch_dtype") if key in changed}


def _place_of(config: PretrainedConfig, told: Mapping[str, Any]) -> tuple[str, ...]:
    """The names that lead to a model's config in a config file, which may be that of a model around it."""
    if told.get("model_type") == config.model_type:
        return ()
    for name, entries in told.items():
        if isinstance(entries, dict) and entries.get("model_type") == config.model_type:
            return (name,)
    return ()


def _parts(config: PretrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], PretrainedConfig]]:
    """A config and every config inside of it, each after the names that lead to it."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, (*path, name))


def _entries(told: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The part of a config file that a path leads to; made where the file left it out."""
    for name in path:
        told = told.setdefault(name, {})
    return told
