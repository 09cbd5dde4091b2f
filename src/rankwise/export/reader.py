"""The one reader of adapter files: what lies in a folder, and the plain LoRA that it is, if it is one.

`read_peft_files` takes a folder as it is and believes nothing: what `check_export` looks at. `read_lora` builds on it
and refuses, in one sentence, whatever is not exactly updates of modules. Neither needs PEFT.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rankwise.errors import AdapterFileError
from rankwise.export.adapter import Adapter, is_finite, key_not_finite
from rankwise.export.keys import PEFT_PREFIX, Key, clean_key, parsed_key
from rankwise.export.lora_config import (
    CONFIG,
    DEFAULT_RANK,
    MODULE_NAME,
    alpha_of,
    check_only_updates,
    is_plain,
    is_target,
    rank_of,
    read_config,
    scale_of,
)
from rankwise.export.lora_format import format_of_tensors
from rankwise.update import Factors

if TYPE_CHECKING:
    from rankwise.export.known_base import KnownBase

TENSORS = "adapter_model.safetensors"
COMMAND = "training_command.txt"
FOREIGN = re.compile(r"(^|\.)lora_")
"""In keys that belong to a LoRA and are neither A nor B, as DoRA's magnitudes."""


COPIES = (".original_module.", ".modules_to_save.")
"""In names of what PEFT saves beside a module trained in full where the vocabulary has grown: the module as it was
before training, and once more as it is."""


def widened(tensor: Tensor) -> Tensor:
    """A tensor in a dtype that can be calculated with: float8, which cannot, as float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


@dataclass
class AdapterFiles:
    """The files of an adapter: a config and tensors, neither checked against the other."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    is_of_pipeline: ClassVar[bool] = False
    """Whether it is the file of a pipeline's LoRA, and no folder of PEFT's."""
    base: KnownBase | None = None
    """What is known of the base model."""
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """A and B by module name in the base model, as far as they are there."""
    others: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that are no A or B, by their names in the base model."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Scales beside the tensors, as diffusers and others before it write them, by module name."""
    embeddings: set[str] = field(default_factory=set)
    """The modules whose A and B have the names of an embedding's."""
    without_prefix: list[str] = field(default_factory=list)
    """Keys that lack the prefix their kind of file needs."""
    wrapped: list[str] = field(default_factory=list)
    """Keys with a wrapper in their path, which is left out everywhere else."""
    named: list[str] = field(default_factory=list)
    """Keys with an adapter's name in them, which is left out everywhere else."""
    twice: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of keys that name one tensor."""

    def __post_init__(self) -> None:
        first_keys: dict[tuple[str, str], str] = {}
        for key, tensor in self.tensors.items():
            told = parsed_key(key)
            first = first_keys.setdefault((told.module, told.part), key)
            if first != key:
                self.twice.append((first, key))
            self._note_oddities(key, told)
            self._sort_in(told, tensor)

    def _note_oddities(self, key: str, told: Key) -> None:
        if told.wrappers:
            self.wrapped.append(key)
        if told.adapter:
            self.named.append(key)
        if told.part in ("A", "B") and not told.prefix:
            self.without_prefix.append(key)

    def _sort_in(self, told: Key, tensor: Tensor) -> None:
        if told.part == "alpha" and tensor.numel() == 1:
            self.alphas[told.module] = float(tensor)
        elif told.part in ("A", "B"):
            self.modules.setdefault(told.module, {})[told.part] = tensor
            if told.embedding:
                self.embeddings.add(told.module)
        else:
            name = f"{told.module}.alpha" if told.part else told.module
            self.others[name] = tensor

    @property
    def whole(self) -> dict[str, dict[str, Tensor]]:
        """The modules that have both A and B, of two dimensions or more."""
        return {n: p for n, p in self.modules.items() if len(p) == 2 and all(t.dim() > 1 for t in p.values())}

    @property
    def largest_rank(self) -> int:
        """The largest rank the config or a tensor asks for."""
        ranks = [r for r in (self.config.get("rank_pattern") or {}).values() if isinstance(r, int)]
        ranks += [] if self.is_of_pipeline else [self.config.get("r", DEFAULT_RANK)]
        return max([1, *ranks, *(parts["A"].shape[0] for parts in self.whole.values())])

    @cached_property
    def is_readable_by_peft(self) -> bool:
        """Whether PEFT makes a config of what the JSON holds, with modules or parameters to adapt."""
        if not (self.config.get("target_modules") or self.config.get("target_parameters")):
            return False
        if is_plain(self.config):
            return True
        # Settings of variants have rules of their own. PEFT takes longer to import than all else here.
        import peft

        known = peft.LoraConfig.__dataclass_fields__.keys() - {"peft_type"}
        try:
            peft.LoraConfig(**{key: value for key, value in self.config.items() if key in known})
        except (TypeError, ValueError):
            return False
        return True

    def lacks(self, name: str) -> bool:
        """Whether the base model is known, and has no module of this name."""
        return self.base is not None and name not in self.base.names

    def is_target(self, name: str) -> bool:
        """Whether the config says that a module is adapted."""
        return self.is_readable_by_peft and is_target(self.config, name)

    def is_of_parameters(self, name: str) -> bool:
        """Whether a module's tensors update parameters that the config names (`target_parameters`), as fused experts.

        PEFT wraps the module once for each of its parameters, so that names may end in `.base_layer`.
        """
        module = name.replace(".base_layer", "")
        targets = self.config.get("target_parameters") or ()
        return any(f".{module}".endswith(f".{target.rpartition('.')[0]}") for target in targets)

    def not_finite(self) -> Iterator[str]:
        """Keys of tensors with NaN or infinity."""
        return (key for key, tensor in self.tensors.items() if not is_finite(tensor))

    def rank(self, name: str) -> int:
        """The rank that the config gives a module."""
        return rank_of(self.config, name)

    def alpha(self, name: str) -> float | None:
        """The lora_alpha that the config gives a module."""
        return alpha_of(self.config, name)

    def siblings(self) -> dict[str, set[str]]:
        """The adapted modules' own names, by their parent."""
        found: dict[str, set[str]] = {}
        for name in self.modules:
            parent, _, own = name.rpartition(".")
            found.setdefault(parent, set()).add(own)
        return found


def read_peft_files(folder: Path) -> AdapterFiles:
    """The files of a PEFT folder.

    Raises:
        AdapterFileError: there is no adapter, or only pickled weights, or a file is broken.
    """
    if not (folder / CONFIG).is_file() and not (folder / TENSORS).is_file():
        read_tensors(folder / TENSORS)  # says what is missing
    return AdapterFiles(folder, read_config(folder), read_tensors(folder / TENSORS))


def read_lora(folder: Path) -> Adapter:
    """The plain LoRA adapter in a folder.

    Raises:
        AdapterFileError: it is missing, truncated, of another kind, not finite, or holds more than updates of modules.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder} holds no LoRA adapter: {CONFIG} is missing")
    config = read_config(folder)
    check_only_updates(config, folder)
    files = AdapterFiles(folder, config, read_tensors(folder / TENSORS))
    _check_keys(files)
    formats = {
        name: format_of_tensors(
            parts["A"],
            parts["B"],
            embedding=name in files.embeddings,
            transposed=bool(config.get("fan_in_fan_out")),
        )
        for name, parts in files.modules.items()
    }
    updates = {name: _update(files, name) for name in files.modules}
    others = {PEFT_PREFIX + name: tensor for name, tensor in files.others.items()}
    for key in needless_copies(others, folder / TENSORS):
        del others[key]
    return Adapter(
        config=config,
        updates=updates,
        others=others,
        formats=formats,
        names=tuple(updates),
        dtype=common_dtype(files.modules),
    )


def common_dtype(modules: Mapping[str, Mapping[str, Tensor]]) -> torch.dtype:
    """The dtype to write new factors of these modules in: the narrowest that holds every A and B of theirs.

    Float8 would leave new factors a digit or two, so that it becomes bfloat16; float64 becomes float32.
    """
    found = {tensor.dtype for parts in modules.values() for tensor in parts.values()}
    wide_enough = (torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in found)
    common = functools.reduce(torch.promote_types, wide_enough)
    return torch.float32 if common == torch.float64 else common


def read_clean_tensors(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an adapter of any kind under PEFT's own names; float8, with which nobody calculates, as float32.

    Scales beside the tensors, of which PEFT knows nothing, are left out.

    Raises:
        AdapterFileError: the file is missing or broken, or one tensor has two names.
    """
    files = AdapterFiles(folder, dict(config), read_tensors(folder / TENSORS))
    check_names(files, folder / TENSORS)
    _say_what_was_left_out(files, folder / TENSORS)
    tensors = {clean_key(key): widened(tensor) for key, tensor in files.tensors.items()}
    needless = {f"{PEFT_PREFIX}{name}.alpha" for name in files.alphas}
    needless |= needless_copies(tensors, folder / TENSORS)
    return {key: tensor for key, tensor in tensors.items() if key not in needless}


def needless_copies(tensors: Mapping[str, Tensor], file: Path) -> set[str]:
    """The keys of the copies that `file` holds of modules trained in full.

    Raises:
        AdapterFileError: one differs from the module as it is.
    """
    before_training, once_more = COPIES
    found: set[str] = set()
    for key, tensor in tensors.items():
        if key.replace(before_training, ".") != key and key.replace(before_training, ".") in tensors:
            found.add(key)
        original = key.replace(once_more, ".")
        if original != key and original in tensors:
            if not torch.equal(widened(tensors[original]), widened(tensor)):
                raise AdapterFileError(f"{file} holds one tensor under two names, {original!r} and {key!r}")
            found.add(key)
    return found


def _check_keys(files: AdapterFiles) -> None:
    """Raise `AdapterFileError` for keys and tensors that a plain LoRA does not have; warn of odd ones."""
    file = files.folder / TENSORS
    check_names(files, file)
    for name in files.others:
        if FOREIGN.search(name):
            raise AdapterFileError(f"{file} holds {name!r}, which a plain LoRA does not have")
    broken = key_not_finite(files.others)
    if broken:
        raise AdapterFileError(f"{file} holds NaN or infinity in {PEFT_PREFIX + broken!r}")
    if not files.modules:
        raise AdapterFileError(f"{file} holds no tensor of a LoRA adapter")
    for name, parts in files.modules.items():
        check_module(name, parts, file)
    _say_what_was_left_out(files, file)


def check_names(files: AdapterFiles, file: Path) -> None:
    """Raise `AdapterFileError` for two names of one tensor in `file`, and for wrappers that are not known."""
    if files.twice:
        first, second = files.twice[0]
        raise AdapterFileError(f"{file} holds one tensor under two names, {first!r} and {second!r}")
    for name in (*files.modules, *files.others):
        if PEFT_PREFIX in name:
            before = name.partition(PEFT_PREFIX)[0]
            raise AdapterFileError(f"{file} holds {name!r}, and {before!r} is none of the wrappers known here")


def _say_what_was_left_out(files: AdapterFiles, file: Path) -> None:
    """Warn of names in keys that stock PEFT would not understand, and that were read without them."""
    unread = [key for key in files.named if ".default" not in key]  # PEFT reads that one
    for keys, what in (
        (files.wrapped, "wrappers' names, which are left out"),
        (unread, "an adapter's name, which is left out"),
        (files.without_prefix, f"names without {PEFT_PREFIX}, which is added"),
    ):
        if keys:
            warnings.warn(f"{file} holds {what}, in {len(keys)} of its keys, as in {keys[0]!r}", stacklevel=4)
    for name, alpha in files.alphas.items():
        if alpha != files.alpha(name):
            warnings.warn(
                f"{file} holds {name + '.alpha'!r}, {alpha:g}, which is left out: PEFT scales by the config's "
                f"lora_alpha, {files.alpha(name)}",
                stacklevel=4,
            )
            break


def check_module(name: str, parts: dict[str, Tensor], file: Path) -> None:
    """Raise `AdapterFileError` unless a module of `file` has A and B, each a finite matrix or kernel."""
    if parts.keys() != {"A", "B"}:
        raise AdapterFileError(f"{file} lacks half of the update of {name!r}")
    if not MODULE_NAME.fullmatch(name):
        raise AdapterFileError(f"{file} holds an update of {name!r}, which is no name of a module")
    for part, tensor in parts.items():
        # 2 of a linear layer or an embedding, 3 to 5 of a convolution in one to three dimensions
        if tensor.dim() not in (2, 3, 4, 5) or not tensor.is_floating_point():
            seen = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise AdapterFileError(f"{file} must hold {part} of {name!r} as a real matrix; found {seen}")
        if not is_finite(tensor):
            raise AdapterFileError(f"{file} holds NaN or infinity in {name!r}")


def _update(files: AdapterFiles, name: str) -> Factors:
    """The update of a module, its scale in s."""
    A, B = (widened(files.modules[name][part]).flatten(1) for part in ("A", "B"))
    r = rank_of(files.config, name)
    if A.shape[0] != r or B.shape[1] != r:
        raise AdapterFileError(f"{name!r} should have rank {r} by {CONFIG}; found {A.shape[0]} and {B.shape[1]}")
    scale = scale_of(files.config, name)
    if scale is None:
        raise AdapterFileError(f"{files.folder / CONFIG} must give {name!r} a number as lora_alpha; found None")
    return Factors(B, torch.full((r,), scale, dtype=torch.float32), A)


def read_tensors(file: Path, *, only_header: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or, `only_header`, none of them once the file is known to be whole.

    Raises:
        AdapterFileError: it is missing or truncated.
    """
    if not file.is_file():
        pickle = file.with_suffix(".bin")
        also = f"; {pickle.name} is a pickle, which `rankwise fix` turns into safetensors" if pickle.is_file() else ""
        raise AdapterFileError(f"{file} is missing{also}")
    try:
        with safe_open(file, "pt") as opened:
            return {} if only_header else {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterFileError(f"{file} is truncated or not safetensors") from error


def recorded_command(folder: Path | Any) -> str | None:
    """The command that trained a saved adapter, where `rankwise train` or `compare` left it."""
    file = Path(folder) / COMMAND
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
