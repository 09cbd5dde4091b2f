"""Opening a base model as its adapters know it: with the class, labels and vocabulary they were trained with."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from rankwise.base_models import skeleton
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.base import trained_as
from rankwise.export.into_base.adapted import Adapted
from rankwise.export.into_base.model_config import resized
from rankwise.export.into_base.saved import SavedAdapter
from rankwise.export.names_today import files_today

CONFIG = "config.json"


def opened(folder: Path, adapters: Sequence[SavedAdapter]) -> tuple[nn.Module, list[Adapted]]:
    """The base model without weights, and one more of it for each adapter, with the adapter on it.

    Adapters do not always say the class of their base model. The first class in which the first adapter finds all its
    modules is taken.

    Args:
        folder: of a model; its config.json is changed where the adapters have other labels or another vocabulary.
        adapters: at least one.

    Raises:
        AdapterFileError: an adapter does not fit the base model.
        RankwiseError: the base model does not open.
    """
    first = adapters[0]
    told = read_config(folder)
    refusals: list[RankwiseError] = []
    tried: set[type] = set()
    for choice in _choices(first, told):
        try:
            write_config(folder, told)
            model = bare_model(folder, **choice)
            if type(model) in tried:
                continue
            tried.add(type(model))
            changed = resized(told, model, _with_names_of(model, first).tensors)
            if changed != told:
                write_config(folder, changed)
                model = bare_model(folder, **choice)
            found = [_adapted(folder, first, choice)]
        except RankwiseError as error:
            refusals.append(error)
            continue
        return model, found + [_adapted(folder, adapter, choice) for adapter in adapters[1:]]
    # An adapter that does not fit says more than a class that does not open.
    raise next((error for error in refusals if isinstance(error, AdapterFileError)), refusals[0])


def bare_model(folder: Path, task: str | None = None, trained_as: str | None = None) -> nn.Module:
    """The model of a folder without its weights, its ties made.

    Raises:
        ArgumentError: it does not open.
    """
    model: Any = skeleton(folder, task, trained_as=trained_as)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # parameters without weights are new ones wherever they are put
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model's folder.

    Raises:
        ArgumentError: there is none, or it is broken.
    """
    try:
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArgumentError("base", f"be a model's folder with a whole {CONFIG}", str(folder)) from error


def write_config(folder: Path, told: dict[str, Any]) -> None:
    """Write the config of a model's folder, unless it says the same already."""
    if told != read_config(folder):
        (folder / CONFIG).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _choices(adapter: SavedAdapter, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What tells the class, the surest first: what the adapter says, the model's own, and the one without a head."""
    task = adapter.told.get("task_type")
    yield {"task": task, "trained_as": trained_as(adapter.told)}
    yield {"task": task}
    yield {}
    headless = MODEL_MAPPING_NAMES.get(str(told.get("model_type")))
    if isinstance(headless, str):
        yield {"trained_as": headless}


def _adapted(folder: Path, adapter: SavedAdapter, choice: dict[str, Any]) -> Adapted:
    model = bare_model(folder, **choice)
    named = _with_names_of(model, adapter)
    # PEFT changes the config that it is given to what it has found in the model.
    return Adapted(model, adapter.folder, copy.deepcopy(named.config), named.tensors)


def _with_names_of(model: nn.Module, adapter: SavedAdapter) -> SavedAdapter:
    """An adapter under the names that the base model's modules have in today's transformers.

    PEFT maps keys of updates by itself, but neither the config nor the keys of modules trained in full.
    """
    told, new_keys = files_today(model, adapter.told, adapter.tensors, adapter.folder)
    if not new_keys:
        return adapter
    config: Any = copy.deepcopy(adapter.config)
    for entry, value in told.items():
        if value != adapter.told.get(entry):
            setattr(config, entry, value)
    tensors = {new_keys.get(key, key): tensor for key, tensor in adapter.tensors.items()}
    return dataclasses.replace(adapter, config=config, told=told, tensors=tensors)
