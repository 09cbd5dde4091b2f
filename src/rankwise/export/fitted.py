"""A base model with as many labels and tokens as its adapter has, which is what the adapter was trained on.

A classifier is opened with its number of labels, and a vocabulary grows before training. The base model's config says
nothing of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.export.into_base.model_config import resized
from rankwise.export.keys import clean_key


def fitted(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A skeleton with the labels and the vocabulary of an adapter; `model` itself where these are its own.

    Args:
        model: without weights; it stays as it is.
        tensors: the adapter's, as they lie in its file.
    """
    if not isinstance(model, PreTrainedModel):
        return model
    told = model.config.to_dict()
    changed = resized(told, model, {clean_key(key): tensor for key, tensor in tensors.items()})
    if changed == told:
        return model
    cls: Any = type(model)
    with init_empty_weights():
        made = cls(type(model.config).from_dict(changed))
    made.tie_weights()
    return made


def tokens_of(model: Any) -> int | None:
    """The size of a model's vocabulary; None where it has none."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # models of other inputs, or of other libraries
        return None
