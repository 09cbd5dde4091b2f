"""The layouts of a plain LoRA: which rank every module is written with, and the config that makes loaders agree.

Uniform: one rank for all modules, unused rows and columns zero. Compact: each module at its own rank. Every scale is
in B, and lora_alpha = r, so that no loader has anything left to multiply by.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import peft
import torch
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.export.source import PEFT_PREFIX, TENSORS, Form
from rankwise.update import Factors


class Adapter(Protocol):
    """What is written: updates, and what stands beside them."""

    @property
    def config(self) -> PeftConfig:
        """Of the adapter that the updates come from."""
        ...

    @property
    def updates(self) -> dict[str, Factors]:
        """By module name in the base model."""
        ...

    @property
    def others(self) -> dict[str, Tensor]:
        """Modules trained in full (a classifier), by PEFT's names for them."""
        ...

    @property
    def forms(self) -> dict[str, Form]:
        """Every module that can be adapted."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Every module name that a target could match."""
        ...


def uniform(
    source: Adapter, updates: Mapping[str, Factors], rank: int | None, beside: Sequence[str] = ()
) -> tuple[peft.LoraConfig, dict[str, Factors]]:
    """One rank for all, and zero factors wherever a target name, or one of `beside`, matches a module it lacks."""
    r = rank or max(1, *(f.r for f in updates.values()))
    if isinstance(source.config, peft.LoraConfig):
        return _same_modules(source.config, r), {
            name: _padded(f, source.forms[name].shape, r) for name, f in updates.items()
        }
    plain = sorted({name.rpartition(".")[2] for name in updates} | set(beside))
    matched = [name for name in source.names if name.rpartition(".")[2] in plain]
    usable = all(_can_be_padded(source, name) for name in matched)
    modules = matched if usable else list(updates)
    padded = {name: _padded(updates.get(name), source.forms[name].shape, r) for name in modules}
    excluded = [] if usable else _also_matched(source, updates)
    return _config(source, r, plain if usable else sorted(updates), {}, excluded), padded


def _can_be_padded(source: Adapter, name: str) -> bool:
    """Whether a module may get zero factors: of a kind the adapter has anyway, and not trained in full.

    PEFT saves the frozen weight of an adapted embedding beside the adapter; that is not training.
    """
    form = source.forms.get(name)
    in_full = [key.removeprefix(PEFT_PREFIX) for key in source.others if ".base_layer." not in key]
    kinds = {source.forms[adapted].kind for adapted in source.updates}
    return form is not None and form.kind in kinds and not form.unlike and not _is_within(name, in_full)


def compact(
    source: Adapter, updates: Mapping[str, Factors], rank: int | None
) -> tuple[peft.LoraConfig, dict[str, Factors]]:
    """Each module at its own rank. B is scaled by r_i / lora_alpha, since loaders divide lora_alpha by r_i."""
    alive = {name: f for name, f in updates.items() if f.r > 0}
    if not alive:
        raise RankwiseError('every update is zero, which a compact export cannot hold; use layout="uniform"')
    r = max(f.r for f in alive.values())
    scaled = {name: Factors(f.B, f.s * (f.r / r), f.A) for name, f in alive.items()}
    ranks = {_alone(name, source.names): f.r for name, f in alive.items() if f.r != r}
    return _config(source, r, sorted(alive), ranks, _also_matched(source, alive)), scaled


def _also_matched(source: Adapter, targets: Mapping[str, Factors]) -> list[str]:
    """Modules that a loader would adapt too, since a target's name is the end of theirs."""
    return sorted(n for n in source.names if n not in targets and any(_ends(n, target) for target in targets))


def _ends(name: str, ending: str) -> bool:
    return name.endswith(f".{ending}")


def _alone(name: str, names: Sequence[str]) -> str:
    """A rank_pattern key for this module only: loaders also match a plain name with the end of longer ones."""
    return f"^{re.escape(name)}$" if any(_ends(other, name) for other in names) else name


def _config(
    source: Adapter, r: int, targets: list[str], ranks: dict[str, int], excluded: Sequence[str] = ()
) -> peft.LoraConfig:
    own = source.config
    in_full = getattr(own, "modules_to_save", None)
    return peft.LoraConfig(
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        target_modules=targets,
        exclude_modules=list(excluded) or None,
        rank_pattern=ranks,
        modules_to_save=sorted(in_full) if in_full else None,
        fan_in_fan_out=any(source.forms[name].transposed for name in source.updates),
    )


def _same_modules(own: peft.LoraConfig, r: int) -> peft.LoraConfig:
    """The config of a plain LoRA whose modules stay as they were chosen, at one rank."""
    return dataclasses.replace(
        own,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights=True,
        lora_dropout=0.0,
    )


def _padded(f: Factors | None, shape: tuple[int, int], r: int) -> Factors:
    out, into = shape
    B, s, A = (torch.zeros(shape, dtype=torch.float32) for shape in ((out, r), (r,), (r, into)))
    if f is not None:
        B[:, : f.r], s[: f.r], A[: f.r] = f.B.float(), f.s.float(), f.A.float()
    return Factors(B, s, A)


def _is_within(name: str, tensors: list[str]) -> bool:
    return any(tensor.startswith(f"{name}.") for tensor in tensors)


def write(folder: Path, source: Adapter, config: peft.LoraConfig, factors: Mapping[str, Factors]) -> None:
    """The adapter's files: tensors under PEFT's names, and the config."""
    tensors = source.others | {
        f"{PEFT_PREFIX}{name}.{key}": tensor
        for name, f in factors.items()
        for key, tensor in source.forms[name].written(f).items()
    }
    # cloned: safetensors refuses tensors that share memory, as tied ones do
    plain = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(plain, folder / TENSORS, {"format": "pt"})
    config.save_pretrained(str(folder))


def leading(f: Factors, rank: int) -> Factors:
    """The best update of at most `rank`: the leading singular directions."""
    U, s, Vh = f.orthogonal()
    return Factors(U[:, :rank].to(f.B.dtype), s[:rank].to(f.s.dtype), Vh[:rank].to(f.A.dtype))


def relative_error(updates: Mapping[str, Factors], others: Mapping[str, Factors]) -> float:
    """‖ΔW' − ΔW‖_F / ‖ΔW‖_F over all modules together, without forming any; a module that is missing counts as 0."""
    difference = size = rounding = 0.0
    for name, f in updates.items():
        both = Factors(*(t.cpu().double() for t in f))
        size += both.norm() ** 2
        rounding += both.rounding() ** 2
        if name in others:
            B, s, A = (t.cpu().double() for t in others[name])
            both = Factors(torch.cat([both.B, B], 1), torch.cat([both.s, -s]), torch.cat([both.A, A]))
        difference += both.norm() ** 2
    if difference <= rounding:
        return 0.0
    return (difference / max(size, rounding)) ** 0.5
