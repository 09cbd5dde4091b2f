"""What an export reads: the updates, the modules trained beside them, and the shapes of the base model.

A live model and a saved folder give the same `Source`; everything after it knows only this.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.convolution import AdapterConv2d
from rankwise.adapters.embedding import AdapterEmbedding, without_padding
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import adapted_layers, base_name, factors, ranks
from rankwise.adapters.progress import LENGTH, Progress
from rankwise.adapters.tensors import ADDED_IN_FORMAT_2
from rankwise.adapters.tuner import PREFIX, kind_of
from rankwise.base_models import skeleton
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.update import Factors

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMMAND = "training_command.txt"
PEFT_PREFIX = "base_model.model."
BOUNDED = "max_norm bounds the columns of A wherever they are looked up, and an export may hold another A"


class Form(NamedTuple):
    """How the update of a module of the base model stands in a LoRA file of PEFT's."""

    kind: type[AdapterLayer]
    shape: tuple[int, int]
    """(out, in) of its matrix."""
    transposed: bool
    """Whether it is a Conv1D, whose weight is (in, out)."""
    kernel: tuple[int, ...] = ()
    """(in, kh, kw) of a convolution."""
    padding: int | None = None
    """The id without an update of an embedding."""
    unlike: str | None = None
    """Why PEFT's LoRA of this module would compute something else."""

    @property
    def names(self) -> tuple[str, str]:
        """What PEFT calls A and B of such a module."""
        embedding = issubclass(self.kind, AdapterEmbedding)
        return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")

    def written(self, f: Factors) -> dict[str, Tensor]:
        """An update as PEFT's tensors, every scale in B."""
        A, B = f.A.float(), (f.B * f.s).float()
        if self.kernel:
            A, B = A.unflatten(1, self.kernel), B[..., None, None]
        return dict(zip(self.names, (A, B), strict=True))

    def read(self, tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor] | None:
        """The matrices A and B that a loader finds under `prefix`; None where one is missing."""
        A, B = (tensors.get(f"{prefix}.{name}") for name in self.names)
        return None if A is None or B is None else (A.flatten(1), B.flatten(1))


@dataclass(frozen=True)
class Source:
    """An adapter to export."""

    config: AdapterConfig
    updates: dict[str, Factors]
    """By module name in the base model, in model order."""
    others: dict[str, Tensor]
    """Modules trained in full (a classifier), by PEFT's names for them."""
    progress: Progress
    """How far training had come."""
    ranks: list[int]
    """What the method has not pruned, per module."""
    forms: dict[str, Form]
    """Every module of the base model that can be adapted."""
    names: tuple[str, ...]
    """Every module name of the base model."""
    base_class: str
    """What the base model is."""


def from_model(model: nn.Module, adapter: str) -> Source:
    """The adapter of a live model.

    Raises:
        ArgumentError: the model has no such adapter.
        RankwiseError: FSDP2 has it in pieces.
    """
    layers = adapted_layers(model, adapter)
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise RankwiseError("FSDP2 has the model in pieces, on every process some: save it whole and export the folder")
    first = next(iter(layers.values()))
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    others = {key: t for key, t in state.items() if f".{PREFIX}" not in key}
    progress = Progress.of(first.started(adapter).progress)
    kept = list(ranks(model, adapter).values())
    config: Any = first.methods[adapter]
    return Source(config, factors(model, adapter), others, progress, kept, *forms_of(model), base_class_of(model))


def from_folder(folder: Path, base: str | Path | nn.Module | None) -> Source:
    """The adapter saved in `folder`.

    Args:
        folder: as written by `save_pretrained`.
        base: the base model, or where it is; by default where the adapter's config says.

    Raises:
        AdapterFileError: the folder holds no whole rankwise adapter, or its base model cannot be opened.
    """
    config = read_config(folder)
    state = read_tensors(folder / TENSORS)
    by_module: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, found, name = key.removeprefix(PEFT_PREFIX).rpartition(f".{PREFIX}tensors.")
        if found:
            by_module.setdefault(module, {})[name] = tensor
    if not by_module:
        raise AdapterFileError(f"{folder / TENSORS} holds no tensor of a rankwise adapter")
    whole = opened_base(base, saved_config(folder), folder)
    forms, names = forms_of(whole)
    for name in by_module.keys() & forms.keys():
        _check_same_base(name, state.get(f"{PEFT_PREFIX}{name}.base_layer.weight"), forms[name], folder)
        _check_whole(config, name, by_module[name], forms[name].shape, folder / TENSORS)
    updates = {
        name: _saved_update(config, name, by_module[name], form.padding)
        for name, form in forms.items()
        if name in by_module
    }
    if len(updates) < len(by_module):
        unknown = sorted(by_module.keys() - updates.keys())
        raise AdapterFileError(
            f"the base model has no module {unknown[0]!r}, which {folder} adapts: is it the right base?"
        )
    others = {key: tensor for key, tensor in state.items() if f".{PREFIX}" not in key}
    progress = Progress.of(next(iter(by_module.values()))["progress"])
    kept = [int(config.ranks_left(by_module[name]).sum()) for name in updates]
    return Source(config, updates, others, progress, kept, forms, names, base_class_of(whole))


def opened_base(base: str | Path | nn.Module | None, config: Mapping[str, Any], folder: Path) -> nn.Module:
    """The base model that the adapter in `folder` was trained on, without its weights unless it was given as a model.

    Args:
        base: the base model, or where it is; by default where the adapter's config says.
        config: the adapter's, as its JSON holds it.
        folder: the adapter's, for messages.

    Raises:
        AdapterFileError: no base model is named, or it does not open.
    """
    if isinstance(base, nn.Module):
        return base
    name, revision = told_base(base, config, folder)
    trained_as = (config.get("auto_mapping") or {}).get("base_model_class")
    try:
        return skeleton(name, config.get("task_type"), revision=revision, trained_as=trained_as)
    except ArgumentError as error:
        raise AdapterFileError(f"the base model {name!r} of {folder} does not open; pass `base` ({error})") from error


def base_class_of(model: nn.Module) -> str:
    """The name of the base model's class, whatever wraps it."""
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def read_config(folder: Path) -> AdapterConfig:
    """The config of a saved rankwise adapter.

    Raises:
        AdapterFileError: it is missing, broken, or of another kind.
    """
    config = opened_config(folder)
    if not isinstance(config, AdapterConfig):
        raise AdapterFileError(
            f"{folder} holds no rankwise adapter: {CONFIG} is {'missing' if config is None else 'of PEFT'}"
        )
    return config


def opened_config(folder: Path) -> PeftConfig | None:
    """The config in a folder as PEFT reads it; None where there is none.

    Raises:
        AdapterFileError: it is broken, of an unknown kind, or has patterns that no loader can apply.
    """
    file = folder / CONFIG
    try:
        config = PeftConfig.from_pretrained(str(folder)) if file.is_file() else None
    except RankwiseError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file} is not a whole adapter config ({type(error).__name__})") from error
    wrong = wrong_entry(vars(config)) if config is not None else None
    if wrong:
        raise AdapterFileError(f"{file} {wrong}")
    return config


def wrong_entry(config: Mapping[str, Any]) -> str | None:
    """What is wrong with the entries of a config that choose modules and give ranks and scales."""
    wrong = [key for key, least in (("r", 1), ("lora_alpha", None)) if not _number(config.get(key, 8), least)]
    if config.get("peft_type") == "LORA" and config.get("lora_alpha", 8) is None:  # ours may leave it out: r then
        wrong.append("lora_alpha")
    for key, least in (("rank_pattern", 0), ("alpha_pattern", None)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(_expression(k) and _number(v, least) for k, v in pattern.items()):
            wrong.append(key)
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        names = config.get(key)
        if not (names is None or _expression(names) or (isinstance(names, list | set | tuple) and _texts(names))):
            wrong.append(key)
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        wrong.append("base_model_name_or_path")
    return f"gives {wrong[0]} as {config[wrong[0]]!r:.60}, which no loader can apply" if wrong else None


def _texts(names: Iterable[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def _number(value: Any, least: int | None) -> bool:
    """Whether a value is a finite number or missing; where `least` is asked for, whole and at least that."""
    if least is None:
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    return isinstance(value, int) and value >= least


def _expression(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError):
        return False
    return isinstance(text, str)


def read_tensors(file: Path, *, only_header: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or, `only_header`, none of them once the file is known to be whole.

    Raises:
        AdapterFileError: it is missing or truncated.
    """
    if not file.is_file():
        raise AdapterFileError(f"{file} is missing")
    try:
        with safe_open(file, "pt") as opened:
            return {} if only_header else {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is truncated or not safetensors") from error


def told_base(base: str | Path | None, config: Mapping[str, Any], adapter: Path) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model: `base`, or what the adapter's config says.

    The config's revision belongs to the model that the config names.

    Raises:
        AdapterFileError: neither names one.
    """
    named = config.get("base_model_name_or_path")
    if not (base or named):
        raise AdapterFileError(f"{adapter} does not say its base model; pass `base`")
    name = str(base or named)
    return name, config.get("revision") if name == named else None


def saved_config(folder: str | Path) -> dict[str, Any]:
    """The config in a folder as it lies there; empty where there is none."""
    try:
        return dict(json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):  # the reader of the adapter says what is wrong with it
        return {}


def _check_same_base(name: str, saved: Tensor | None, form: Form, folder: Path) -> None:
    """Raise `AdapterFileError` where PEFT saved the frozen weight of an adapted embedding, and the base's is of another
    shape: the vocabulary was resized after the base model had been saved."""
    shape = form.shape[::-1] if issubclass(form.kind, AdapterEmbedding) else form.shape
    if saved is not None and saved.is_floating_point() and tuple(saved.shape) != shape:
        raise AdapterFileError(
            f"{folder} was trained on a base model whose {name!r} is {tuple(saved.shape)}, and this base model's is "
            f"{shape}: save the base model with its resized vocabulary and pass it as `base`"
        )


def _check_whole(
    config: AdapterConfig, name: str, tensors: dict[str, Tensor], shape: tuple[int, int], file: Path
) -> None:
    """Raise `AdapterFileError` for a module that lacks a tensor of its method, or has one of another shape."""
    size = config.size_of(name, *shape)
    slots = config.slots(size)
    expected = {key: slot.shape for key, slot in slots.items()} | {"progress": (LENGTH,)}
    if config.rankwise_format == 1:
        expected = {key: wanted for key, wanted in expected.items() if key not in ADDED_IN_FORMAT_2}
    for key, wanted in expected.items():
        seen = tuple(tensors[key].shape) if key in tensors else None
        if seen != wanted:
            raise AdapterFileError(f"{file} must hold {key} of {name!r} with shape {wanted}; found {seen}")
        real = key in slots and slots[key].dtype.is_floating_point
        if real and not tensors[key].is_floating_point():
            raise AdapterFileError(f"{file} must hold {key} of {name!r} as real numbers; found {tensors[key].dtype}")


def _saved_update(config: AdapterConfig, name: str, tensors: dict[str, Tensor], padding: int | None) -> Factors:
    found = config.evaluation_factors(tensors, config.scale_of(name))
    return without_padding(Factors(*(t.detach() for t in found)), padding)


def forms_of(model: nn.Module) -> tuple[dict[str, Form], tuple[str, ...]]:
    """`forms` and `names` of a Source."""
    forms: dict[str, Form] = {}
    names: list[str] = []
    for name, module in model.named_modules():
        if f".{PREFIX}" in name or ".modules_to_save" in name or ".original_module" in name:
            continue
        names.append(base_name(name))
        form = _form(module.get_base_layer() if isinstance(module, AdapterLayer) else module)
        if form is not None:
            forms.setdefault(base_name(name), form)
    return forms, tuple(dict.fromkeys(names))


def _form(root: Any) -> Form | None:
    """The form of a base layer; None for one that is not adapted."""
    kind = kind_of(root)
    if kind is None or kind.refusal(root):
        return None
    form = Form(kind, kind.matrix_shape(root), isinstance(root, Conv1D))
    if issubclass(kind, AdapterConv2d):
        return form._replace(kernel=(root.in_channels, *root.kernel_size), unlike=_unlike_convolution(root))
    if issubclass(kind, AdapterEmbedding):
        return form._replace(padding=root.padding_idx, unlike=None if root.max_norm is None else BOUNDED)
    return form


def _unlike_convolution(root: nn.Conv2d) -> str | None:
    if root.dilation != (1, 1):
        return f"PEFT's LoRA ignores a convolution's dilation, here {root.dilation}"
    if root.padding_mode != "zeros":
        return f"PEFT's LoRA pads a convolution's input with zeros, and the padding here is {root.padding_mode!r}"
    return None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The key of the first tensor that holds NaN or infinity."""
    return next((key for key, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()), None)


def recorded(folder: Path | Any) -> str | None:
    """The command that trained a saved adapter, where `rankwise train` or `compare` left it."""
    file = Path(folder) / COMMAND
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def finite(updates: dict[str, Factors]) -> str | None:
    """The name of the first update that holds NaN or infinity."""
    return next((name for name, f in updates.items() if not all(torch.isfinite(t).all() for t in f)), None)
