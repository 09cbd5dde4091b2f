"""`rankwise merge --into-base`: a base model with adapters in its weights.

The base model's modules are opened without their weights, and PEFT puts each adapter on such a skeleton. Then one
module after the other gets its weights from the files, is merged by PEFT in float32, and is written back under the
files' names.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.base_models import model_folder
from rankwise.checks import require_choice, require_room
from rankwise.errors import RankwiseError
from rankwise.export.base import told_base
from rankwise.export.card import write_card
from rankwise.export.combine import given_weights
from rankwise.export.into_base.checkpoint import (
    FILES,
    INDEX,
    WEIGHT_DTYPES,
    Checkpoint,
    Shards,
    Stored,
    open_checkpoint,
)
from rankwise.export.into_base.merging import Merging, tied_names
from rankwise.export.into_base.model_config import TIE_MEANS_MORE, untied, with_dtype
from rankwise.export.into_base.opening import bare_model, opened, read_config, write_config
from rankwise.export.into_base.saved import SavedAdapter, read_saved
from rankwise.export.lora_config import saved_config
from rankwise.files import whole_folder

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What a model can be written in: torch's names of dtypes, with safetensors'."""
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""The files of a base model on the hub that are fetched; its pickles only where it has no other weights."""
NOT_COPIED = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".safetensors", ".md"}
"""Endings of the base's files that hold its weights, or speak of it."""
LOAD = """from {library} import {name}

model = {name}.from_pretrained("{{folder}}")"""


def merge_into_base(
    folders: Sequence[str | Path],
    base: str | Path | None,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the base model with the weighted sum of adapters in its weights: a full model that needs no PEFT.

    W_l + Σ w_i ΔW_i, worked out by PEFT in float32; modules trained in full and rows of embeddings are averaged by the
    weights. One module is in memory at a time, whatever the model's size. Where the config ties the output layer to the
    embeddings and the two come out different, both are written and the config says so.

    Args:
        folders: adapters, plain LoRA or saved by rankwise, in any mix. DoRA alone, with weight 1.
        base: the base model's folder, or its name; None: where the first adapter's config says, at its revision.
        out: where to write; missing parents are made.
        weights: one per adapter, by default 1/n each.
        dtype: "float32", "bfloat16" or "float16": what to write; by default each tensor's own.
        overwrite: replace an existing folder.

    Returns:
        `out`.

    Raises:
        ArgumentError: an argument breaks its rule, or `out` exists.
        AdapterFileError: a folder holds no whole adapter, or one that does not fit the base model.
        RankwiseError: the base has no weight for an update, or one of another shape, or quantised ones.

    Example:
        >>> import tempfile, rankwise
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rankwise.export.into_base.merge import merge_into_base
        >>> folder, sizes = tempfile.mkdtemp(), {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
        >>> llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
        >>> llama.save_pretrained(folder + "/base")
        >>> config = rankwise.SoraConfig(r=2, target_modules=["q_proj"], init_weights=False)
        >>> _ = rankwise.export_lora(get_peft_model(llama, config), folder + "/lora")
        >>> merge_into_base([folder + "/lora"], folder + "/base", folder + "/merged").name
        'merged'
    """
    out = Path(out)
    given = given_weights(weights, len(folders))
    if dtype is not None:
        require_choice("dtype", dtype, list(DTYPES))
    source, revision = told_base(base, saved_config(folders[0]), Path(folders[0]))
    model_at = _fetched(source, revision)
    require_room("out", out, overwrite=overwrite, reads=[*folders, model_at])
    adapters = [read_saved(Path(folder)) for folder in folders]
    _warn_of_other_bases(adapters)
    _check_not_quantised(model_at)
    checkpoint = open_checkpoint(model_at)
    with whole_folder(out) as beside:
        for file in model_at.iterdir():
            if file.is_file() and not file.name.startswith(".") and not _is_replaced(file):
                shutil.copyfile(file, beside / file.name)
        model, adapted = opened(beside, adapters)
        merging = Merging(model, adapted, given, checkpoint)
        _warn_of_lacking(model, merging)
        _write_model(beside, model, merging, checkpoint, dtype)
        facts = {
            "Revision": f"`{revision}`" if revision else None,
            "Merged from": ", ".join(f"`{Path(folder).name}`" for folder in folders),
            "Weights": ", ".join(map(str, given)),
        }
        library = type(model).__module__.partition(".")[0]
        load = LOAD.format(library=library, name=type(model).__name__)
        write_card(beside, out.name, source, "A model with LoRAs merged in", facts, load=load, library=library)
    return out


def _write_model(folder: Path, model: nn.Module, merging: Merging, checkpoint: Checkpoint, dtype: str | None) -> None:
    """The merged weights, their index, and the config."""
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
    left = set(checkpoint.stored)
    others = (merging.results(group) for group in merging.groups if not group & tied)
    for results in itertools.chain(results_of_tied, others):
        for unit in merging.units(results):
            for key, tensor in merging.conversion.to_files(unit, results).items():
                shards.write(key, tensor)
                left.discard(key)
        for name in results.keys() & added.keys():
            shards.write(added[name], results[name])
    for key in left:
        shards.write(key, checkpoint.read(key))

    if checkpoint.index is not None:
        index = {"metadata": {"total_size": shards.size}, "weight_map": shards.files}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / (_written_as(checkpoint.kind) + INDEX)).write_text(text, encoding="utf-8")
    told = read_config(folder)
    if dtype is not None:
        told = with_dtype(told | {"dtype": dtype}, dtype)
    if added and type(model).__name__ not in (told.get("architectures") or ()):
        told["architectures"] = [type(model).__name__]
    write_config(folder, told)


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
            stacklevel=4,
        )


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
    for key, stored in placed.items():
        chosen = DTYPES[dtype] if dtype is not None and stored.dtype in WEIGHT_DTYPES else stored.dtype
        placed[key] = stored._replace(file=_written_as(stored.file), dtype=chosen)
    return placed


def _written_as(file: str) -> str:
    """The name of the safetensors file for a file of weights."""
    if not file.endswith(".bin"):
        return file
    return re.sub("^pytorch_model", "model", file.removesuffix(".bin")) + ".safetensors"


def _is_replaced(file: Path) -> bool:
    return bool(NOT_COPIED & set(file.suffixes)) or file.name.endswith(INDEX)


def _fetched(source: str, revision: str | None) -> Path:
    """The base model's folder; its pickles are downloaded only where it has no other weights."""
    folder = model_folder(source, revision, files=WANTED)
    if any((folder / (name + ending)).is_file() for name in FILES for ending in ("", INDEX)):
        return folder
    return model_folder(source, revision, files=[*WANTED, "*.bin"])


def _check_not_quantised(folder: Path) -> None:
    if read_config(folder).get("quantization_config"):
        raise RankwiseError(f"{folder} holds quantised weights, to which nothing can be added: merge into what it was")


def _warn_of_other_bases(adapters: Sequence[SavedAdapter]) -> None:
    """Say where adapters name different base models, or different revisions of one."""
    named = {}
    for adapter in adapters:
        name, revision = adapter.told.get("base_model_name_or_path"), adapter.told.get("revision")
        if name:
            named[f"{name} at revision {revision}" if revision else str(name)] = adapter.folder
    if len(named) > 1:
        warnings.warn(f"the adapters say different base models: {', '.join(sorted(named))}", stacklevel=3)
