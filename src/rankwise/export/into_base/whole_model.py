"""One base model's folder written again with adapters in its weights."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from rankwise.errors import RankwiseError
from rankwise.export.into_base.checkpoint import INDEX, open_checkpoint
from rankwise.export.into_base.merging import Merging
from rankwise.export.into_base.opening import opened, read_config
from rankwise.export.into_base.saved import SavedAdapter
from rankwise.export.into_base.writing import write_model

NOT_COPIED = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".safetensors", ".md"}
"""Endings of the base's files that hold its weights, or speak of it."""
LOAD = """from {library} import {name}

model = {name}.from_pretrained("{{folder}}")"""


def check_mergeable(model_at: Path) -> None:
    """Raise `RankwiseError` for a base model's folder whose weights are quantised, missing or broken."""
    _check_not_quantised(model_at)
    open_checkpoint(model_at)


def write_merged(
    folder: Path, model_at: Path, adapters: Sequence[SavedAdapter], weights: Sequence[float], dtype: str | None
) -> nn.Module:
    """Write a base model with adapters in its weights.

    Args:
        folder: where to write; it exists and is empty.
        model_at: the base model's folder.
        adapters: at least one.
        weights: one for each adapter.
        dtype: one of `dtypes.DTYPES`, or None for what each tensor has.

    Returns:
        The base model's skeleton.

    Raises:
        RankwiseError: an adapter does not fit the base model, or cannot be merged into its files.
    """
    checkpoint = open_checkpoint(model_at)
    for file in model_at.iterdir():
        if file.is_file() and not file.name.startswith(".") and not _is_replaced(file):
            shutil.copyfile(file, folder / file.name)
    model, adapted = opened(folder, adapters)
    merging = Merging(model, adapted, weights, checkpoint)
    _warn_of_lacking(model, merging)
    for adapter in adapted:
        if adapter.unfinished:
            warnings.warn(f"{adapter.folder}: {adapter.unfinished}", stacklevel=3)
    write_model(folder, model, merging, checkpoint, dtype)
    return model


def _check_not_quantised(folder: Path) -> None:
    if read_config(folder).get("quantization_config"):
        raise RankwiseError(f"{folder} holds quantised weights, to which nothing can be added: merge into what it was")


def _warn_of_lacking(model: Any, merging: Merging) -> None:
    """Name weights that neither the base model's files nor the adapters hold, unless the model does without them."""
    needless = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ["$^"]))
    parameters = dict(model.named_parameters())
    drawn = [name for name in merging.lacking if name in parameters and name not in merging.in_full]
    drawn = sorted(name for name in drawn if not needless.search(name))
    if drawn:
        warnings.warn(
            f"the base model's files and the adapters hold no {', '.join(drawn)}: whoever loads the model draws them "
            "at random, as the adapters' training did",
            stacklevel=5,
        )


def _is_replaced(file: Path) -> bool:
    return bool(NOT_COPIED & set(file.suffixes)) or file.name.endswith(INDEX)


def library_of(model: nn.Module) -> str:
    """The library that a model is of."""
    return type(model).__module__.partition(".")[0]


def load_code(model: nn.Module) -> str:
    """Code that loads such a model from {folder}."""
    return LOAD.format(library=library_of(model), name=type(model).__name__)
