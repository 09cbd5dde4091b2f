"""What is known of an adapter's base model while the adapter is checked against a server's rules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from rankwise.base_models import skeleton
from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.base import formats_of, opened_base, told_base, trained_as
from rankwise.export.fitted import fitted, tokens_of
from rankwise.export.names_today import modules_today


@dataclass(frozen=True)
class KnownBase:
    """The base model of an adapter: its modules as the adapter names them, and as a server does."""

    names: frozenset[str]
    """Every module of the model of the adapter's task."""
    shapes: dict[str, tuple[int, int]]
    """(out, in) of those that rankwise can adapt."""
    class_in_config: str | None = None
    """The model class that the base model's own config names, where its files are at hand."""
    modules_in_config: frozenset[str] = frozenset()
    """The modules of that class."""
    components: frozenset[str] = frozenset()
    """Of a pipeline's model: the components whose modules are known. Their names stand before those of modules."""
    unet_config: Any = None
    """Of a pipeline's model: the UNet's config, which tells diffusers how its blocks were once numbered."""
    models: tuple[nn.Module, ...] = ()
    """The models, without weights, that somebody may load the adapter onto: the task's, and the same without a head.
    They have the adapter's labels and vocabulary."""
    vocabulary: tuple[int, int] | None = None
    """How many tokens the base model has and how many the adapter, where these differ."""

    def name_today(self, name: str) -> str | None:
        """What the base model calls a module that older versions of transformers knew by this name."""
        found = (modules_today(model, [name]).get(name) for model in self.models)
        return next((today for today in found if today), None)

    def left_out_by_peft(self, folder: Path) -> list[str] | None:
        """What stock PEFT would leave out of the adapter in `folder`, a sentence each; None where that is not known.

        PEFT itself is asked: it loads the adapter onto a copy of the base model that holds no weights.
        """
        found = [_left_out_by_peft(model, folder) for model in self.models]
        return min(found, key=len) if found else None


def known_base(
    base: str | Path | nn.Module | None,
    config: Mapping[str, Any],
    folder: Path,
    tensors: Mapping[str, Tensor],
) -> KnownBase | None:
    """What is known of the base model of the adapter in `folder`; None where nobody named one and none opens.

    Args:
        base: the base model, or where it is; by default where the adapter's config says.
        config: the adapter's, as its JSON holds it.
        folder: the adapter's.
        tensors: the adapter's, as they lie in its file.

    Raises:
        AdapterFileError: a base model was named, and does not open.
    """
    try:
        model = opened_base(base, config, folder)
    except AdapterFileError:
        if base is not None:
            raise
        return None
    formats, names = formats_of(model)
    shapes = {name: form.shape for name, form in formats.items()}
    if isinstance(base, nn.Module):
        is_quantised = getattr(model, "is_quantized", False)
        return KnownBase(frozenset(names), shapes, models=() if is_quantised else (model,))
    models = tuple(fitted(each, tensors) for each in _may_be_loaded_onto(model, base, config, folder))
    tokens = (tokens_of(model), tokens_of(models[0]))
    vocabulary = (tokens[0], tokens[1]) if tokens[0] and tokens[1] and tokens[0] != tokens[1] else None
    told = class_in_config(base, config, folder)
    return KnownBase(frozenset(names), shapes, *told, models=models, vocabulary=vocabulary)


def _may_be_loaded_onto(
    model: nn.Module, base: str | Path | None, config: Mapping[str, Any], folder: Path
) -> list[nn.Module]:
    """The task's model, and the same without a head unless the adapter says its class.

    Adapters trained on AutoModel name the modules of that, which may have a pooler that models with a head lack.
    """
    if getattr(model, "base_model", model) is model or trained_as(config) == type(model).__name__:
        return [model]
    found: Any = model
    headless = MODEL_MAPPING_NAMES.get(found.config.model_type)
    if not isinstance(headless, str):
        return [model, found.base_model]
    name, revision = told_base(base, config, folder)
    return [model, skeleton(name, revision=revision, trained_as=headless)]


def class_in_config(
    base: str | Path | None, config: Mapping[str, Any], folder: Path
) -> tuple[str | None, frozenset[str]]:
    """The model class that the base model's config names under `architectures`, and the names of its modules.

    The arguments are those of `known_base`. None and no modules where its config does not open, or names no class of
    transformers'.
    """
    try:
        name, revision = told_base(base, config, folder)
        model = skeleton(name, revision=revision)
    except RankwiseError:
        return None, frozenset()
    own_class = type(model).__name__
    if own_class not in (getattr(model.config, "architectures", None) or ()):
        return None, frozenset()
    return own_class, frozenset(name for name, _ in model.named_modules())


def _left_out_by_peft(model: nn.Module, folder: Path) -> list[str]:
    """What stock PEFT would leave out if it loaded the adapter in `folder` onto `model`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is what is looked for here
            config = PeftConfig.from_pretrained(str(folder))
            adapted: Any = get_peft_model(_without_weights(model), config, low_cpu_mem_usage=True)  # type: ignore[arg-type]
            loaded = adapted.load_adapter(str(folder), "default", low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"PEFT does not load it: {' '.join(str(error).split())[:200]}"]
    return [f"PEFT would leave out {key!r}" for key in loaded.unexpected_keys if ".lora_" in key]


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device, so that no weight is copied and none is changed."""
    empty: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in model.buffers()}
    for parameter in model.parameters():
        empty[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, empty)
