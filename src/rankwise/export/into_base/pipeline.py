"""A pipeline of diffusers' with LoRAs in the weights of its components: UNet or transformer, and text encoders."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from rankwise.base_models import model_folder
from rankwise.checks import require_room
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.adapter import check_adapter
from rankwise.export.card import write_card
from rankwise.export.into_base.saved import SavedAdapter
from rankwise.export.into_base.whole_model import check_mergeable, load_code, write_merged
from rankwise.export.keys import PEFT_PREFIX
from rankwise.export.known_base import KnownBase
from rankwise.export.known_pipeline import known_pipeline, names_in_diffusers
from rankwise.export.pipeline_files import component_of, own_name, pipeline_file
from rankwise.export.pipeline_lora import PipelineLora, read_pipeline_lora
from rankwise.files import whole_folder

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model"]
"""The files of a pipeline on the hub that are fetched."""
INDEX = "model_index.json"
"""What tells a pipeline's folder from that of one component."""
LOAD_PIPELINE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}")"""


def merge_into_pipeline(
    folders: Sequence[str | Path],
    base: str | Path | None,
    out: Path,
    weights: Sequence[float],
    *,
    dtype: str | None,
    overwrite: bool,
) -> Path:
    """Write a pipeline, or one component of it, with the weighted sum of LoRAs in its weights: W + Σ wᵢ·ΔWᵢ.

    Args:
        folders: LoRAs of the pipeline: files, or folders with one.
        base: the pipeline's folder or hub id, or the folder of the one component that they adapt.
        out: where to write.
        weights: one for each LoRA.
        dtype: of the adapted components; None for what each tensor has.
        overwrite: replace an existing folder.

    Raises:
        ArgumentError: no base is given, it does not open, or `out` exists.
        AdapterFileError: a folder holds no whole LoRA of a pipeline, or one that does not fit this one.
    """
    if base is None:
        raise ArgumentError("base", "be given, since the LoRA of a pipeline does not name its base model", base)
    base_at = model_folder(base, files=WANTED)
    require_room("out", out, overwrite=overwrite, reads=[*folders, base_at])
    known = known_pipeline(base_at)
    assert known is not None, "there is a base"
    by_component: dict[str, list[tuple[SavedAdapter, float]]] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for component, adapter in _adapters_of_components(Path(folder), known, base_at).items():
            by_component.setdefault(component, []).append((adapter, weight))
    is_pipeline = (base_at / INDEX).is_file()
    homes = {component: base_at / component if is_pipeline else base_at for component in by_component}
    for home in homes.values():
        check_mergeable(home)
    load = LOAD_PIPELINE
    with whole_folder(out) as beside:
        if is_pipeline:
            _copy_others(base_at, beside, without=list(by_component))
        for component, parts in by_component.items():
            adapters, given = zip(*parts, strict=True)
            written_at = beside / component if is_pipeline else beside
            model = write_merged(written_at, homes[component], adapters, given, dtype)
            load = load if is_pipeline else load_code(model)
        facts = {
            "Components": ", ".join(f"`{component}`" for component in by_component),
            "Merged from": ", ".join(f"`{Path(folder).name}`" for folder in folders),
            "Weights": ", ".join(map(str, weights)),
        }
        write_card(beside, out.name, str(base), "A model with LoRAs merged in", facts, load=load, library="diffusers")
    return out


def _copy_others(base_at: Path, beside: Path, without: Sequence[str]) -> None:
    """Copy a pipeline but for the components that change, whose folders are made."""
    for path in base_at.iterdir():
        if path.name in without:
            (beside / path.name).mkdir()
        elif path.is_dir() and not path.name.startswith("."):
            shutil.copytree(path, beside / path.name)
        elif path.name == INDEX:
            shutil.copyfile(path, beside / path.name)


def _adapters_of_components(folder: Path, known: KnownBase, base: Path) -> dict[str, SavedAdapter]:
    """The LoRA of each component in a pipeline's file, as PEFT would have it."""
    file = pipeline_file(folder)
    if file is None:
        raise RankwiseError(f"{folder} is no LoRA of a pipeline, and others are: they adapt different models")
    lora = read_pipeline_lora(file)
    check_adapter(lora, str(file))
    names = _names_in_base(lora, known, file)
    found: dict[str, dict[str, str]] = {}
    for name, in_base in names.items():
        found.setdefault(component_of(in_base), {})[name] = own_name(in_base)
    for component in found:
        if component not in known.components:
            raise AdapterFileError(f"{file} adapts {component}, which {base} does not hold")
    return {component: _as_peft_has_it(lora, own_names, file) for component, own_names in found.items()}


def _names_in_base(lora: PipelineLora, known: KnownBase, file: Path) -> dict[str, str]:
    """What the base model calls each module, its component's name in front."""
    if lora.spelling == "diffusers":
        return {name: name for name in lora.updates}
    if not lora.spelling.startswith("kohya") or "unet" not in known.components:
        raise AdapterFileError(
            f"{file} has {lora.spelling}'s names, and only those of a UNet and its text encoders are known here: "
            "diffusers may add such a LoRA by pipeline.load_lora_weights() and pipeline.fuse_lora()"
        )
    return names_in_diffusers(lora.updates, known.unet_config)


def _as_peft_has_it(lora: PipelineLora, own_names: dict[str, str], file: Path) -> SavedAdapter:
    """The LoRA of one component; `own_names` are those of its modules there, by their names in the file."""
    tensors: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for name, own in own_names.items():
        # Every scale is in B, so that an alpha equal to the rank leaves nothing to multiply by.
        update, form = lora.updates[name], lora.formats[name]
        tensors |= {
            f"{PEFT_PREFIX}{own}.{part}": tensor for part, tensor in form.written(update, torch.float32).items()
        }
        ranks[f"^{re.escape(own)}$"] = update.r
    told: dict[str, Any] = {
        "peft_type": "LORA",
        "target_modules": "|".join(re.escape(own) for own in own_names.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    config = peft.LoraConfig(**{entry: value for entry, value in told.items() if entry != "peft_type"})
    return SavedAdapter(file, config, told, tensors)
