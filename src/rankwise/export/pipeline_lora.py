"""The LoRA of a pipeline that makes images or videos: read, merged, and written in the form of the file it came in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.adapter import Adapter
from rankwise.export.keys import PEFT_PREFIX
from rankwise.export.lora_config import CONFIG, check_only_updates, scale_of
from rankwise.export.lora_format import format_of_tensors
from rankwise.export.pipeline_files import (
    DIFFUSERS,
    METADATA,
    Keys,
    PipelineFiles,
    component_of,
    numberings_of,
    own_name,
    pipeline_file,
    read_pipeline_files,
    spelling_of,
)
from rankwise.export.reader import (
    TENSORS,
    check_module,
    common_dtype,
    read_lora,
    read_tensors,
    widened,
)
from rankwise.update import Factors


@dataclass(frozen=True, kw_only=True)
class PipelineLora(Adapter):
    """The LoRA of a pipeline. Names of modules begin with their component's, as in the file."""

    file_name: str
    """The file that held it."""
    keys: dict[str, Keys]
    """By module name."""
    headers: dict[str, dict[str, Any]]
    """The config of each component, as the file's header holds it; empty where it holds none."""
    has_alphas: bool
    """Whether updates have their alphas beside them."""

    @property
    def spelling(self) -> str:
        """Whose names the keys are."""
        return spelling_of(key for keys in self.keys.values() for key in keys)

    def write(
        self, folder: Path, config: Mapping[str, Any], factors: Mapping[str, Factors], dtype: torch.dtype
    ) -> None:
        """Write updates under the names, and with the scales told in the way, of the file that was read.

        Args:
            folder: where to write the file.
            config: of all components together; each update is to be scaled by its lora_alpha over the update's rank.
            factors: the updates.
            dtype: of A and B.
        """
        alpha = config["lora_alpha"]
        tensors: dict[str, Tensor] = {}
        for name, f in factors.items():
            keys = self.keys[name]
            if not self.headers and not self.has_alphas:
                # Nothing tells a scale, so that every reader takes 1.
                f = Factors(f.B, f.s * (alpha / f.r), f.A)
            tensors |= dict(zip(keys, self.formats[name].written(f, dtype).values(), strict=True))
            if self.has_alphas:
                tensors[keys.alpha] = torch.tensor(float(alpha))
        header = {"format": "pt"}
        if self.headers:
            header[METADATA] = json.dumps(self._headers_with(config, factors), indent=2, sort_keys=True)
        alone = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
        save_file(alone, folder / self.file_name, header)

    def _headers_with(self, config: Mapping[str, Any], factors: Mapping[str, Factors]) -> dict[str, Any]:
        """The config of each component with the new ranks, its modules by their whole names."""
        found: dict[str, Any] = {}
        for component, own in self.headers.items():
            ranks = {own_name(name): f.r for name, f in factors.items() if component_of(name) == component}
            if not ranks:
                continue
            written = own | {
                "r": config["r"],
                "lora_alpha": config["lora_alpha"],
                "rank_pattern": {f"^{re.escape(name)}$": r for name, r in ranks.items() if r != config["r"]},
                "alpha_pattern": {},
                "use_rslora": False,
                "init_lora_weights": True,
                "target_modules": sorted(ranks),
                "exclude_modules": None,
            }
            found |= {f"{component}.{entry}": value for entry, value in written.items()}
        return found


def read_any_lora(folder: Path) -> Adapter:
    """The plain LoRA in a folder of PEFT's, or in the file of a pipeline's.

    Raises:
        AdapterFileError: it is missing, broken, not finite, or holds more than updates of modules.
    """
    file = pipeline_file(folder)
    return read_lora(folder) if file is None else read_pipeline_lora(file)


def read_pipeline_lora(file: Path) -> PipelineLora:
    """The LoRA in the file of a pipeline's.

    Raises:
        AdapterFileError: it is broken, not finite, or holds more than updates of modules.
    """
    files = read_pipeline_files(file)
    for component, config in files.headers.items():
        check_only_updates({"peft_type": "LORA"} | config, Path(f"{component} of {file}"))
    if files.others:
        raise AdapterFileError(f"{file} holds {next(iter(files.others))!r}, which is no part of a plain LoRA")
    if not files.modules:
        raise AdapterFileError(f"{file} holds no tensor of a LoRA adapter")
    for name, parts in files.modules.items():
        check_module(name, parts, file)
    updates = {name: _update(files, name) for name in files.modules}
    r = max(f.r for f in updates.values())
    return PipelineLora(
        config={"peft_type": "LORA", "r": r, "lora_alpha": r},
        updates=updates,
        others={},
        formats={
            name: format_of_tensors(parts["A"], parts["B"], embedding=False, transposed=False)
            for name, parts in files.modules.items()
        },
        names=tuple(updates),
        dtype=common_dtype(files.modules),
        file_name=file.name,
        keys={name: Keys(**keys) for name, keys in files.keys.items()},
        headers=files.headers,
        has_alphas=bool(files.alphas),
    )


def _update(files: PipelineFiles, name: str) -> Factors:
    """The update of a module, its scale in s."""
    A, B = (widened(files.modules[name][part]).flatten(1) for part in ("A", "B"))
    rank = files.rank(name)
    if A.shape[0] != rank or B.shape[1] != rank:
        raise AdapterFileError(f"{name!r} should have rank {rank} in {files.file}; found {A.shape[0]} and {B.shape[1]}")
    return Factors(B, torch.full((rank,), _scale(files, name, rank), dtype=torch.float32), A)


def _scale(files: PipelineFiles, name: str, rank: int) -> float:
    """What B·A of a module is multiplied by."""
    if not files.headers:
        return files.alphas.get(files.alpha_name(name), rank) / rank
    if files.alphas:
        raise AdapterFileError(f"{files.file} gives scales twice, by its header and by alphas")
    config = files.headers.get(component_of(name))
    if config is None:
        raise AdapterFileError(f"the header of {files.file} holds configs, and none of {component_of(name)}")
    scale = scale_of(config, own_name(name))
    if scale is None:
        raise AdapterFileError(f"the header of {files.file} must give {name!r} a number as lora_alpha; found None")
    return scale


def merged_like(adapters: Sequence[Adapter], merged: Adapter, folders: Sequence[str | Path]) -> Adapter:
    """A merge in the form of what it came from: of pipelines' files one more; of folders as it is.

    Raises:
        RankwiseError: some are pipelines' files and some are folders, or they name modules in different ways.
    """
    of_pipelines = [adapter for adapter in adapters if isinstance(adapter, PipelineLora)]
    if not of_pipelines:
        return merged
    if len(of_pipelines) < len(adapters):
        kinds = [isinstance(adapter, PipelineLora) for adapter in adapters]
        file, other = folders[kinds.index(True)], folders[kinds.index(False)]
        raise RankwiseError(f"{file} is the LoRA of a pipeline and {other} is not: they adapt different models")
    first = of_pipelines[0]
    for adapter, folder in zip(of_pipelines, folders, strict=True):
        if adapter.spelling != first.spelling:
            raise RankwiseError(
                f"{folders[0]} names modules as {first.spelling} does and {folder} as {adapter.spelling} does: "
                "convert one of them first"
            )
    _check_one_name_each(of_pipelines, folders)
    keys: dict[str, Keys] = {}
    headers: dict[str, dict[str, Any]] = {}
    for adapter in reversed(of_pipelines):
        keys |= adapter.keys
        headers |= adapter.headers
    # A header speaks for every component or for none; without one, scales are in alphas or in B.
    if not all(adapter.headers for adapter in of_pipelines):
        headers = {}
    return replace(
        first,
        config=first.config,
        updates=merged.updates,
        formats=merged.formats,
        names=merged.names,
        dtype=merged.dtype,
        keys=keys,
        headers=headers,
        has_alphas=any(adapter.has_alphas for adapter in of_pipelines) and not headers,
    )


def _check_one_name_each(adapters: Sequence[PipelineLora], folders: Sequence[str | Path]) -> None:
    """Raise `RankwiseError` where kohya's scripts have given one module two names in different files."""
    first_numbers: tuple[str, str | Path] | None = None
    first_names: dict[str, str] = {}
    for adapter, folder in zip(adapters, folders, strict=True):
        for who in numberings_of(adapter.updates):
            first_numbers = first_numbers or (who, folder)
            if who != first_numbers[0]:
                raise RankwiseError(
                    f"{first_numbers[1]} has a UNet's blocks by the numbers of {first_numbers[0]} and {folder} by "
                    f"those of {who}: convert one of them first"
                )
        for name in adapter.updates:
            # An only text encoder is te or te1.
            first = first_names.setdefault(re.sub("^lora_te_", "lora_te1_", name), name)
            if first != name:
                raise RankwiseError(f"{folder} has {name!r} and another adapter {first!r}, two names of one module")


def rename_for_diffusers(folder: Path, base_class: str) -> None:
    """A PEFT adapter in diffusers' one file: keys under the component's name, the config in the file's header.

    Raises:
        RankwiseError: the base model is none of diffusers' UNets or transformers.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    component = next(
        (name for part, name in (("UNet", "unet"), ("Transformer", "transformer")) if part in base_class), ""
    )
    if not component:
        raise RankwiseError(
            f"diffusers would not serve this adapter: {base_class} is none of its UNets or transformers"
        )
    tensors = {f"{component}.{key.removeprefix(PEFT_PREFIX)}": t for key, t in read_tensors(folder / TENSORS).items()}
    header = {f"{component}.{key}": value for key, value in config.items()}
    save_file(tensors, folder / DIFFUSERS, {"format": "pt", METADATA: json.dumps(header, indent=2, sort_keys=True)})
    (folder / TENSORS).unlink()
    (folder / CONFIG).unlink()
