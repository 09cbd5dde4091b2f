"""Adapters of one base model, their weighted sum, and a base model with that sum in its weights.

Adding to the base needs none of it in memory but one weight: a safetensors file says where each tensor lies, and an
adapted one keeps its shape and dtype, so that the file is copied and the tensor written over in the copy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import Tensor, nn

from rankwise.adapters.embedding import AdapterEmbedding
from rankwise.adapters.lookup import reduced
from rankwise.adapters.progress import unfinished
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError, nearest
from rankwise.export.layouts import Adapter
from rankwise.export.lora import TOLERANCE
from rankwise.export.plain import PlainLora, read_plain
from rankwise.export.source import CONFIG, PEFT_PREFIX, Form, Source, finite, from_folder, skeleton
from rankwise.files import whole_folder
from rankwise.update import Factors

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Config fields that choose the modules."""
BEYOND_UPDATES = ("trainable_token_indices", "target_parameters", "layer_replication")
"""Fields of PEFT's LoraConfig that make an adapter more than updates of modules."""
STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Starts of PEFT's that leave the base weight as it is; after others (PiSSA), B·A is no update of the base model."""

FROZEN = ".base_layer."
"""In the names of frozen weights that PEFT saves beside an adapted embedding."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes, by safetensors' names, that a weight may have for an update to be added to it."""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NOT_COPIED = {".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ckpt", ".safetensors", ".md"}
"""Endings of the base's files that hold its weights in another form, or speak of it."""


@dataclass(frozen=True)
class Merged:
    """The weighted sum of adapters, as `layouts` writes one."""

    config: PeftConfig
    updates: dict[str, Factors]
    others: dict[str, Tensor]
    forms: dict[str, Form]
    names: tuple[str, ...]


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
    if out.exists() and not overwrite:
        raise ArgumentError("out", "not exist yet, or be replaced with overwrite", str(out))
    given = given_weights(weights, len(folders))
    model = _model_folder(base or _saved(folders[0]).get("base_model_name_or_path"))
    if out.resolve() == model.resolve():
        raise ArgumentError("out", "be another folder than the base model's", str(out))
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
    return out


def _added(weight: Tensor, name: str, merged: Merged) -> Tensor:
    """A weight with the update of its module, in float32, or float64 where it is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    delta = Factors(*(t.to(wide) for t in merged.updates[name])).delta()
    return weight.to(wide) + (delta if _is_upright(merged.forms[name], weight.shape) else delta.mT).reshape(
        weight.shape
    )


def _is_upright(form: Form, shape: Sequence[int]) -> bool:
    """Whether a weight of `shape` is stored as (out, in, …): not of an embedding, nor of a Conv1D of GPT-2's.

    A plain adapter says `fan_in_fan_out` for all its modules, so that it decides only where the weight is square.
    """
    out, into = form.shape
    if issubclass(form.kind, AdapterEmbedding):
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
    files = [SINGLE]
    if (model / INDEX).is_file():
        files = sorted(set(json.loads((model / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    config = model / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text(encoding="utf-8")):
        raise RankwiseError(f"{model} holds quantised weights, to which nothing can be added: merge into what it was")
    entries: dict[str, Entry] = {}
    for name in files:
        if not (model / name).is_file():
            raise RankwiseError(f"{model} holds no {name}: a merge reads safetensors files")
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
    merged: Merged, targets: Mapping[str, str], values: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> None:
    for key in (*targets, *values):
        shape, dtype = entries[key].shape, entries[key].dtype
        if dtype not in DTYPES:
            raise RankwiseError(f"the base model's {key!r} is quantised or no weight: its dtype is {dtype}")
        if key in values:
            fitting = [tuple(values[key].shape)]
        else:
            form = merged.forms[targets[key]]
            out, into = form.shape
            fitting = [(out, *form.kernel)] if form.kernel else [(out, into), (into, out)]
        if shape not in fitting:
            raise RankwiseError(f"the base model's {key!r} has shape {shape}, and the adapters' is {fitting[0]}")
        if key in targets and issubclass(merged.forms[targets[key]].kind, AdapterEmbedding):
            warnings.warn(
                f"{key!r} is an embedding: where an output layer is tied to it, that changes too", stacklevel=3
            )


def given_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One weight per adapter, 1/n each where none are given."""
    if count == 0:
        raise ArgumentError("folders", "name at least one adapter", [])
    given = tuple(weights) if weights is not None else (1 / count,) * count
    if len(given) != count or not all(math.isfinite(w) for w in given) or not any(given):
        raise ArgumentError("weights", f"be {count} finite numbers, one per adapter, not all 0", weights)
    return given


def opened(base: str | Path | nn.Module | None, folders: Sequence[str | Path]) -> nn.Module:
    """The base model, without weights unless it was given as a model."""
    if isinstance(base, nn.Module):
        return base
    return skeleton(base or _saved(folders[0]).get("base_model_name_or_path"), Path(folders[0]))


def _saved(folder: str | Path) -> dict[str, Any]:
    try:
        return dict(json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # the reader of the adapter says what is wrong with it
        return {}


def read_adapters(folders: Sequence[str | Path], base: str | Path | nn.Module | None) -> list[Source | PlainLora]:
    """The adapters in `folders`, plain or of rankwise, each found to hold nothing but finite updates and full modules.

    Raises:
        AdapterFileError: a folder holds no whole adapter.
        RankwiseError: it holds what cannot be merged.
    """
    ours = [str(_saved(folder).get("peft_type")).startswith("RANKWISE_") for folder in folders]
    model = opened(base, [f for f, own in zip(folders, ours, strict=True) if own]) if any(ours) else None
    found: list[Source | PlainLora] = []
    for folder, own in zip(folders, ours, strict=True):
        adapter = from_folder(Path(folder), model) if own else read_plain(Path(folder))
        _check_adapter(adapter, folder)
        if isinstance(adapter, Source):
            left = unfinished(adapter.config, adapter.progress, adapter.ranks)
            if left:
                warnings.warn(f"{folder}: {left}", stacklevel=3)
            adapter = dataclasses.replace(adapter, updates=reduced(adapter.updates, adapter.config))
        found.append(adapter)
    names = {adapter.config.base_model_name_or_path for adapter in found} - {None, ""}
    if len(names) > 1:
        warnings.warn(f"the adapters say different base models: {', '.join(sorted(map(str, names)))}", stacklevel=3)
    return found


def _check_adapter(adapter: Adapter, folder: str | Path) -> None:
    config: Any = adapter.config
    if config.bias != "none":
        raise RankwiseError(f"{folder} trains biases, which a merge cannot hold: `bias` is {config.bias!r}")
    for field in BEYOND_UPDATES:
        if getattr(config, field, None):
            raise RankwiseError(f"{folder} cannot be merged: its config has `{field}`")
    if isinstance(config, peft.LoraConfig) and config.init_lora_weights not in STARTS:
        raise RankwiseError(
            f"{folder} started from {config.init_lora_weights!r}, which changes the base model: convert it first"
        )
    for name in adapter.updates:
        if adapter.forms[name].unlike:
            raise RankwiseError(f"the update of module {name!r} cannot be a plain LoRA: {adapter.forms[name].unlike}")
    broken = finite(adapter.updates) or next((k for k, t in adapter.others.items() if not t.isfinite().all()), None)
    if broken:
        raise RankwiseError(f"{folder} holds NaN or infinity in {broken!r}")


def combined(adapters: Sequence[Source | PlainLora], weights: Sequence[float]) -> Merged:
    """The weighted sum, its factors side by side.

    Raises:
        AdapterFileError: the adapters disagree on the shape or kind of a module.
        RankwiseError: modules trained in full cannot be averaged.
    """
    forms: dict[str, Form] = {}
    # those of rankwise first: they know the whole base model, and a plain adapter only what it adapts
    telling = sorted(adapters, key=lambda adapter: isinstance(adapter, PlainLora))
    for adapter in telling:
        for name, form in adapter.forms.items():
            known = forms.setdefault(name, form)
            if (known.shape, known.kernel, known.names) != (form.shape, form.kernel, form.names):
                raise AdapterFileError(
                    f"the adapters disagree on module {name!r}: {known.shape} and {form.shape}, {known.kind.__name__} "
                    f"and {form.kind.__name__}"
                )
    parts: dict[str, list[Factors]] = {}
    for w, adapter in zip(weights, adapters, strict=True):
        for name, f in adapter.updates.items():
            parts.setdefault(name, []).append(Factors(f.B.double(), w * f.s.double(), f.A.double()))
    updates = {
        name: Factors(torch.cat([f.B for f in fs], 1), torch.cat([f.s for f in fs]), torch.cat([f.A for f in fs]))
        for name, fs in parts.items()
    }
    names = tuple(dict.fromkeys(name for adapter in telling for name in adapter.names))
    return Merged(_config(adapters, updates), updates, _averaged(adapters, weights), forms, names)


def _averaged(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Modules trained in full, averaged; frozen weights that PEFT saves beside an adapted embedding, from one."""
    first = {key: t for adapter in reversed(adapters) for key, t in adapter.others.items()}
    trained = [key for key in first if FROZEN not in key]
    if trained and abs(sum(weights) - 1) > TOLERANCE:
        raise ArgumentError("weights", f"sum to 1, since {trained[0]!r} is trained in full: no update", list(weights))
    for key in trained:
        found = [adapter.others.get(key) for adapter in adapters]
        if any(t is None or t.shape != first[key].shape for t in found):
            raise RankwiseError(f"{key!r} is not trained in full, with one shape, in every adapter: it has no average")
        total = torch.stack([w * t.double() for w, t in zip(weights, found, strict=True) if t is not None]).sum(0)
        first[key] = total.to(first[key].dtype)
    return first


def _config(adapters: Sequence[Adapter], updates: Mapping[str, Factors]) -> PeftConfig:
    """A plain LoRA's where there is one, with the modules of all."""
    own = next((a.config for a in adapters if isinstance(a.config, peft.LoraConfig)), adapters[0].config)
    if isinstance(own, peft.LoraConfig) and any(a.updates.keys() != updates.keys() for a in adapters):
        return dataclasses.replace(own, target_modules=sorted(updates), **dict.fromkeys(TARGETS[1:4]))
    return own


def public_modules(adapters: Sequence[Adapter], forms: Mapping[str, Form]) -> dict[str, tuple[int, int]]:
    """(out, in) of every module the common config adapts: told by config and base model, whatever the files hold."""
    config = common(adapters, TARGETS)
    modules = {name: form.shape for name, form in forms.items() if check_target_module_exists(config, name)}
    for adapter in adapters:
        for name in adapter.updates:
            if adapter.forms[name].shape != modules.get(name):
                raise RankwiseError(
                    f"an adapter holds an update of module {name!r} with shape {adapter.forms[name].shape}, and by its "
                    f"config and base model it should be {modules.get(name, 'none')}"
                )
    return modules


def common(adapters: Sequence[Adapter], fields: Sequence[str]) -> Any:
    """The first config, which agrees with the others on `fields`."""
    first: Any = adapters[0].config
    for adapter in adapters:
        for name in fields:
            one, other = (_comparable(getattr(config, name, None)) for config in (first, adapter.config))
            if one != other:
                raise RankwiseError(f"a private merge needs adapters of one config: `{name}` is {one!r} and {other!r}")
    return first


def _comparable(value: object) -> object:
    return sorted(value) if isinstance(value, list | set | tuple) else value or None
