"""Writing a merged model: its weights in files like the base model's, their index, and what changes in its config."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.export.dtypes import DTYPES
from rankwise.export.into_base.adapted import tied_names
from rankwise.export.into_base.checkpoint import (
    INDEX,
    SAFETENSORS_NAMES,
    WEIGHT_DTYPES,
    Checkpoint,
    Shards,
    Stored,
)
from rankwise.export.into_base.merging import Merging
from rankwise.export.into_base.model_config import TIE_MEANS_MORE, untied, with_dtype
from rankwise.export.into_base.opening import bare_model, read_config, write_config


def write_model(folder: Path, model: nn.Module, merging: Merging, checkpoint: Checkpoint, dtype: str | None) -> None:
    """Write the merged weights, their index, and the config.

    Args:
        folder: where the model will be, with the base model's config in it.
        model: the base model's skeleton.
        merging: what its weights become.
        checkpoint: the base model's weight files.
        dtype: one of `dtypes.DTYPES`, or None for what each tensor has.
    """
    # Whether tied weights come out different decides what the files hold, so that these are worked out first.
    tied = {name for tie in merging.ties for name in tie}
    results_of_tied = [merging.results(group) for group in merging.groups if group & tied]
    apart = [tie for tie in merging.ties if any(_differ(tie, results) for results in results_of_tied)]
    if apart:
        _untie(folder, model, apart)
        known = {name for results in results_of_tied for name in results}
        results_of_tied += [merging.results(tie) for tie in merging.ties if not known.intersection(tie)]

    heads = [name for name in merging.lacking if name in merging.in_full]
    added = merging.new_keys([*heads, *(sorted(tied) if apart else [])])
    shards = Shards(folder, _laid_out(merging, added, checkpoint, dtype))
    written: set[str] = set()
    while results_of_tied:
        written |= _write_results(results_of_tied.pop(), merging, added, shards)
    for group in merging.groups:
        if not group & tied:
            written |= _write_results(merging.results(group), merging, added, shards)
    for key in checkpoint.stored.keys() - written:
        shards.write(key, checkpoint.read(key))

    if checkpoint.index is not None:
        index = {"metadata": {"total_size": shards.size}, "weight_map": shards.files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / (_written_as(checkpoint.kind) + INDEX)).write_text(text, encoding="utf-8")
    told = read_config(folder)
    if dtype is not None:
        # diffusers' configs say no dtype.
        told = with_dtype(told | {"dtype": dtype} if "model_type" in told else told, dtype)
    if added and type(model).__name__ not in (told.get("architectures") or ()):
        told["architectures"] = [type(model).__name__]
    write_config(folder, told)


def _write_results(
    results: Mapping[str, Tensor], merging: Merging, added: Mapping[str, str], shards: Shards
) -> set[str]:
    """Write what the weights of a group have become; the keys that were written."""
    tensors: dict[str, Tensor] = {}
    for unit in merging.units(results):
        tensors |= merging.conversion.to_files(unit, results)
    tensors |= {added[name]: results[name] for name in results.keys() & added.keys()}
    for key, tensor in tensors.items():
        shards.write(key, tensor)
    return set(tensors)


def _differ(tie: Collection[str], results: Mapping[str, Tensor]) -> bool:
    """Whether weights that were one and the same are so no more."""
    found = [results[name] for name in tie if name in results]
    return any(other.shape != found[0].shape or not torch.equal(other, found[0]) for other in found[1:])


def _untie(folder: Path, model: Any, apart: Sequence[Collection[str]]) -> None:
    """Make the config say that weights are tied no more, if that is all it would say."""
    told = read_config(folder)
    if model.config.model_type not in TIE_MEANS_MORE:
        write_config(folder, untied(told, model.config))
        still = [set(tie) for tie in tied_names(bare_model(folder, trained_as=type(model).__name__))]
        if not any(len(other.intersection(tie)) > 1 for other in still for tie in apart):
            return
        write_config(folder, told)
    warnings.warn(
        f"the weights of {', '.join(apart[0])} differ now, and the config of {type(model).__name__} cannot say so: "
        "transformers finds both in the files and keeps them apart; another reader may tie them",
        stacklevel=5,
    )


def _laid_out(
    merging: Merging, added: Mapping[str, str], checkpoint: Checkpoint, dtype: str | None
) -> dict[str, Stored]:
    """Where every tensor will lie: where it lay, a new one beside the one it was tied to or in the last file."""
    placed = dict(checkpoint.stored)
    usual_dtype = Counter(stored.dtype for stored in placed.values() if stored.dtype in WEIGHT_DTYPES).most_common(1)
    last = max(stored.file for stored in placed.values())
    for group in merging.groups:
        for unit in merging.units(group):
            if unit.converter is None:
                shape = merging.shape(unit.parameters[0])
                placed |= {key: placed[key]._replace(shape=shape) for key in unit.keys}
    for name, key in added.items():
        beside = merging.units([name])
        like = placed[beside[0].keys[0]] if beside else Stored(last, (), usual_dtype[0][0])
        placed[key] = like._replace(shape=merging.shape(name))
    chosen = None if dtype is None else SAFETENSORS_NAMES[DTYPES[dtype]]
    for key, stored in placed.items():
        changes = chosen is not None and stored.dtype in WEIGHT_DTYPES
        placed[key] = stored._replace(file=_written_as(stored.file), dtype=chosen if changes else stored.dtype)
    return placed


def _written_as(file: str) -> str:
    """The name of the safetensors file for a file of weights."""
    if not file.endswith(".bin"):
        return file
    return re.sub("^pytorch_model", "model", file.removesuffix(".bin")) + ".safetensors"
