"""`rankwise merge --into-base`: a base model with adapters in its weights.

The base model's modules are opened without their weights, and PEFT puts each adapter on such a skeleton. Then one
module after the other gets its weights from the files, is merged by PEFT in float32, and is written back under the
files' names.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.base_models import model_folder
from rankwise.checks import require_room
from rankwise.errors import RankwiseError
from rankwise.export.base import told_base
from rankwise.export.card import write_card
from rankwise.export.combine import given_weights
from rankwise.export.dtypes import check_dtype
from rankwise.export.into_base.checkpoint import FILES, INDEX, open_checkpoint
from rankwise.export.into_base.merging import Merging
from rankwise.export.into_base.opening import opened, read_config
from rankwise.export.into_base.saved import SavedAdapter, read_saved
from rankwise.export.into_base.writing import write_model
from rankwise.export.lora_config import saved_config
from rankwise.files import whole_folder

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py"]
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
    check_dtype(dtype)
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
        for adapter in adapted:
            if adapter.unfinished:
                warnings.warn(f"{adapter.folder}: {adapter.unfinished}", stacklevel=2)
        write_model(beside, model, merging, checkpoint, dtype)
        facts = {
            "Revision": f"`{revision}`" if revision else None,
            "Merged from": ", ".join(f"`{Path(folder).name}`" for folder in folders),
            "Weights": ", ".join(map(str, given)),
        }
        library = type(model).__module__.partition(".")[0]
        load = LOAD.format(library=library, name=type(model).__name__)
        write_card(beside, out.name, source, "A model with LoRAs merged in", facts, load=load, library=library)
    return out


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
