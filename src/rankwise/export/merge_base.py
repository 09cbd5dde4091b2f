"""A base model with adapters in its weights.

It needs none of the base model in memory but one weight: a safetensors file says where each tensor lies, and an
adapted one keeps its shape and dtype, so that the file is copied and the tensor written over in the copy.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from rankwise.checks import require_room
from rankwise.errors import ArgumentError, RankwiseError, nearest
from rankwise.export.adapter import FROZEN, Adapter
from rankwise.export.card import MODEL_LOAD, write_card
from rankwise.export.combine import combined, given_weights, read_adapters
from rankwise.export.lora_config import saved_config
from rankwise.export.lora_format import EMBEDDING, LoraFormat
from rankwise.export.reader import PEFT_PREFIX, read_tensors
from rankwise.files import whole_folder
from rankwise.update import Factors

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes, by safetensors' names, that a weight may have for an update to be added to it."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NOT_COPIED = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".safetensors", ".md"}
"""Endings of the base's files that hold its weights in another form, or speak of it."""


class Entry(NamedTuple):
    """Where a tensor lies in the base model's files."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    at: int
    """Its first byte in the file."""


def merge_into_base(
    folders: Sequence[str | Path],
    base: str | Path | None,
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the base model with the weighted sum of adapters in its weights: a full model that needs no PEFT.

    W_l + Σ w_i ΔW_i, in float32, back in the dtype of W_l (out, in); modules trained in full are averaged and take the
    place of theirs. Files and shards stay as they are, and at most one weight is in memory.

    Args:
        folders: adapters, plain LoRA or saved by rankwise, in any mix.
        base: the base model's folder of safetensors files, or its name; None: where the first adapter's config says.
        out: where to write; missing parents are made.
        weights: one per adapter, by default 1/n each.
        overwrite: replace an existing folder.

    Returns:
        `out`.

    Raises:
        ArgumentError: an argument breaks its rule, or `out` exists.
        AdapterFileError: a folder holds no whole adapter, or the adapters disagree on a module.
        RankwiseError: the base has no weight for an update, or one of another shape, or quantised ones.

    Example:
        >>> import tempfile, rankwise
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rankwise.export.merge_base import merge_into_base
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
    model = _model_folder(base or saved_config(folders[0]).get("base_model_name_or_path"))
    require_room("out", out, overwrite=overwrite, reads=[*folders, model])
    entries = _entries(model)
    merged = combined(read_adapters(folders, model), given)
    targets = {_key(f"{name}.weight", entries): name for name in merged.updates}
    values = {_key(key.removeprefix(PEFT_PREFIX), entries): t for key, t in merged.others.items() if FROZEN not in key}
    _check_targets(merged, targets, values, entries)
    with whole_folder(out) as beside:
        for file in model.iterdir():
            if file.is_file() and not file.name.startswith(".") and not _superseded(file):
                shutil.copyfile(file, beside / file.name)
        for name in sorted({entry.file for entry in entries.values()}):
            shutil.copyfile(model / name, beside / name)
            with safe_open(model / name, "pt") as before, (beside / name).open("r+b") as after:
                for key, entry in entries.items():
                    if entry.file != name or not (key in targets or key in values):
                        continue
                    new = values[key] if key in values else _added(before.get_tensor(key), targets[key], merged)
                    after.seek(entry.at)
                    after.write(_bytes(new.to(DTYPES[entry.dtype]), key))
        source = str(base or saved_config(folders[0]).get("base_model_name_or_path"))
        facts = {"Adapter from": ", ".join(f"`{Path(f).name}`" for f in folders), "Weights": ", ".join(map(str, given))}
        write_card(
            beside, out.name, source, "A model with LoRAs merged in", facts, load=MODEL_LOAD, library="transformers"
        )
    return out


def _added(weight: Tensor, name: str, merged: Adapter) -> Tensor:
    """A weight with the update of its module, in float32, or float64 where it is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = Factors(*(t.to(wide) for t in merged.updates[name])).delta()
    return weight.to(wide) + (delta if _is_upright(merged.formats[name], weight.shape) else delta.mT).reshape(
        weight.shape
    )


def _is_upright(form: LoraFormat, shape: Sequence[int]) -> bool:
    """Whether a weight of `shape` is stored as (out, in, …): not of an embedding, nor of a Conv1D of GPT-2's.

    A plain adapter says `fan_in_fan_out` for all its modules, so that it decides only where the weight is square.
    """
    out, into = form.shape
    if form.kind == EMBEDDING:
        return False
    return not form.transposed if out == into else shape[0] == out


def _bytes(tensor: Tensor, key: str) -> bytes:
    if not tensor.isfinite().all():
        raise RankwiseError(f"{key!r} would hold NaN or infinity in {tensor.dtype}")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _superseded(file: Path) -> bool:
    return bool(NOT_COPIED & set(file.suffixes)) and file.name != INDEX


def _model_folder(base: str | Path | None) -> Path:
    if not base:
        raise ArgumentError("base", "be given, since the adapter does not say its base model", base)
    if Path(base).is_dir():
        return Path(base)
    try:
        return Path(snapshot_download(str(base), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:
        raise ArgumentError("base", "be a model's folder, or the name of one", str(base)) from error


def _entries(model: Path) -> dict[str, Entry]:
    """Every tensor of a model's safetensors files, by its name."""
    try:
        return _read_entries(model)
    except RankwiseError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError, RecursionError) as error:
        raise RankwiseError(f"{model} holds no whole model in safetensors files ({type(error).__name__})") from error


def _read_entries(model: Path) -> dict[str, Entry]:
    files = [SINGLE]
    if (model / INDEX).is_file():
        files = sorted(set(json.loads((model / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    config = model / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        raise RankwiseError(f"{model} holds quantised weights, to which nothing can be added: merge into what it was")
    entries: dict[str, Entry] = {}
    for name in files:
        if Path(name).name != name:
            raise RankwiseError(f"{model / INDEX} names a file outside its folder: {name!r}")
        if not (model / name).is_file():
            raise RankwiseError(f"{model} holds no {name}: a merge reads safetensors files")
        read_tensors(model / name, only_header=True)
        with (model / name).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for key, told in header.items():
            if key != "__metadata__":
                at = 8 + size + told["data_offsets"][0]
                entries[key] = Entry(name, tuple(told["shape"]), told["dtype"], at)
    return entries


def _key(wanted: str, entries: Mapping[str, Entry]) -> str:
    """The name of a tensor in the files; those of a bare encoder leave out the first part, as GPT-2's do."""
    for key in (wanted, wanted.partition(".")[2]):
        if key in entries:
            return key
    raise RankwiseError(f"the base model's files hold no {wanted!r} to merge into: {nearest(wanted, entries)}")


def _check_targets(
    merged: Adapter, targets: Mapping[str, str], values: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> None:
    for key in (*targets, *values):
        shape, dtype = entries[key].shape, entries[key].dtype
        if dtype not in DTYPES:
            raise RankwiseError(f"the base model's {key!r} is quantised or no weight: its dtype is {dtype}")
        if key in values:
            fitting = [tuple(values[key].shape)]
        else:
            form = merged.formats[targets[key]]
            out, into = form.shape
            fitting = [(out, *form.kernel)] if form.kernel else [(out, into), (into, out)]
        if shape not in fitting:
            raise RankwiseError(f"the base model's {key!r} has shape {shape}, and the adapters' is {fitting[0]}")
        if key in targets and merged.formats[targets[key]].kind == EMBEDDING:
            warnings.warn(
                f"{key!r} is an embedding: where an output layer is tied to it, that changes too", stacklevel=3
            )
