"""The layouts of a plain LoRA: which rank every module is written with, and the config that makes loaders agree.

Uniform: one rank for all modules, unused rows and columns zero. Compact: each module at its own rank. Every scale is
in B, and lora_alpha = r, so that no loader has anything left to multiply by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.errors import RankwiseError
from rankwise.export.adapter import FROZEN, Adapter
from rankwise.export.keys import PEFT_PREFIX
from rankwise.export.lora_config import CONFIG
from rankwise.export.pipeline_lora import PipelineLora
from rankwise.export.reader import TENSORS
from rankwise.update import Factors

TOLERANCE = 1e-6
"""Largest relative error of the whole update that writing may add to a truncation that was asked for."""


EXPERT = re.compile(r"\.experts\.\d+\.")
"""In names of modules: a layer of one expert of several."""


def uniform(
    source: Adapter, updates: Mapping[str, Factors], rank: int | None, beside: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Factors]]:
    """One rank for all, and zero factors wherever a target name, or one of `beside`, matches a module it lacks."""
    r = rank or max(1, *(update.r for update in updates.values()))
    if source.is_plain:
        return _same_modules(source.config, r), _all_padded(source, updates, updates, r)

    # The shortest config names modules by their last part, as "q_proj". It stands where every module of such a name may
    # get zero factors; else whole names are written, and those that a loader would match by their end are excluded.
    last_parts = {name.rpartition(".")[2] for name in updates} | set(beside)
    matched = [name for name in source.names if name.rpartition(".")[2] in last_parts]
    if all(_can_be_padded(source, name) for name in matched):
        config = _config(source, r, sorted(last_parts), {})
        return config, _all_padded(source, updates, matched, r)
    config = _config(source, r, sorted(updates), {}, _also_matched(source, updates))
    return config, _all_padded(source, updates, updates, r)


def _all_padded(source: Adapter, updates: Mapping[str, Factors], modules: Iterable[str], r: int) -> dict[str, Factors]:
    """Factors of rank r for these modules; zeros for those without an update."""
    return {name: _padded(updates.get(name), source.formats[name].shape, r) for name in modules}


def _can_be_padded(source: Adapter, name: str) -> bool:
    """Whether a module may get zero factors: of a kind the adapter has anyway, and not trained in full.

    PEFT saves the frozen weight of an adapted embedding beside the adapter; that is not training.
    """
    form = source.formats.get(name)
    in_full = [key.removeprefix(PEFT_PREFIX) for key in source.others if FROZEN not in key]
    kinds = {source.formats[adapted].kind for adapted in source.updates}
    return form is not None and form.kind in kinds and not form.unlike and not _is_within(name, in_full)


def compact(
    source: Adapter, updates: Mapping[str, Factors], rank: int | None
) -> tuple[dict[str, Any], dict[str, Factors]]:
    """Each module at its own rank. B is scaled by r_i / lora_alpha, since loaders divide lora_alpha by r_i.

    Experts of a plain LoRA all get the largest rank among them, padded with zeros: transformers has joined the experts
    of most models since into one parameter, and PEFT joins such updates where all are there, at the config's rank.
    """
    written = {name: update for name, update in updates.items() if update.r > 0}
    if not written:
        raise RankwiseError('every update is zero, which a compact export cannot hold; use layout="uniform"')
    experts = [name for name in updates if EXPERT.search(name)] if source.is_plain else []
    if experts:
        r = max(1, *(updates[name].r for name in experts))
        written |= _all_padded(source, updates, experts, r)
    else:
        r = max(update.r for update in written.values())

    # The config's rank, and lora_alpha, are r; a module of another rank is scaled by loaders with r / r_i.
    scaled = {name: Factors(f.B, f.s * (f.r / r), f.A) for name, f in written.items()}
    ranks = {_alone(name, source.names): f.r for name, f in written.items() if f.r != r}
    if source.is_plain and written.keys() == source.updates.keys():
        # Its own choice of modules stands: it may be an expression, or names that a loader maps to newer ones.
        return _same_modules(source.config, r) | {"rank_pattern": ranks}, scaled
    return _config(source, r, sorted(written), ranks, _also_matched(source, written)), scaled


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
) -> dict[str, Any]:
    """The config of a plain LoRA with these modules; what is not in it is as PEFT has it by default."""
    in_full = source.config.get("modules_to_save")
    kept = dict(source.config) if source.is_plain else {"bias": "none"}
    return (
        kept
        | {
            "peft_type": "LORA",
            "task_type": source.config.get("task_type"),
            "base_model_name_or_path": source.config.get("base_model_name_or_path"),
            "revision": source.config.get("revision"),
            "auto_mapping": source.config.get("auto_mapping"),
            "inference_mode": True,
            "target_modules": targets,
            "exclude_modules": list(excluded) or None,
            "rank_pattern": ranks,
            "modules_to_save": sorted(in_full) if in_full else None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "fan_in_fan_out": any(source.formats[name].transposed for name in source.updates),
        }
        | _plain_scales(r)
    )


def _same_modules(own: Mapping[str, Any], r: int) -> dict[str, Any]:
    """The config of a plain LoRA whose modules stay as they were chosen, at one rank."""
    return {**own, "inference_mode": True, "rank_pattern": {}} | _plain_scales(r)


def _plain_scales(r: int) -> dict[str, Any]:
    """Fields under which no loader has anything left to multiply by, or to start in another way."""
    return {
        "r": r,
        "lora_alpha": r,
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }


def _padded(f: Factors | None, shape: tuple[int, int], r: int) -> Factors:
    out, into = shape
    B, s, A = (torch.zeros(shape, dtype=torch.float32) for shape in ((out, r), (r,), (r, into)))
    if f is not None:
        B[:, : f.r], s[: f.r], A[: f.r] = f.B.float(), f.s.float(), f.A.float()
    return Factors(B, s, A)


def _is_within(name: str, tensors: list[str]) -> bool:
    return any(tensor.startswith(f"{name}.") for tensor in tensors)


def write(
    folder: Path,
    source: Adapter,
    config: Mapping[str, Any],
    factors: Mapping[str, Factors],
    dtype: torch.dtype = torch.float32,
) -> None:
    """The adapter's files: A and B in `dtype` under PEFT's names, and the config; a pipeline's LoRA in its own form.

    Raises:
        RankwiseError: an update is too large for `dtype`.
    """
    _check_range(factors, dtype)
    if isinstance(source, PipelineLora):
        source.write(folder, config, factors, dtype)
        return
    tensors = dict(source.others)
    for name, f in factors.items():
        for key, tensor in source.formats[name].written(f, dtype).items():
            tensors[f"{PEFT_PREFIX}{name}.{key}"] = tensor
    # cloned: safetensors refuses tensors that share memory, as tied ones do
    plain = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(plain, folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _check_range(factors: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Raise `RankwiseError` for an update that is too large for `dtype`."""
    largest = torch.finfo(dtype).max
    for name, f in factors.items():
        if f.r and max(float((f.B * f.s).abs().max()), float(f.A.abs().max())) > largest:
            raise RankwiseError(f"{dtype} cannot hold the update of module {name!r}: choose another dtype")


def check_read_back(wanted: Mapping[str, Factors], read: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Raise `RankwiseError` unless what was read from a file is what it should hold, rounded to `dtype`.

    Factors whose columns and rows are orthogonal lose no more than half of the dtype's eps by rounding A, and as much
    by rounding B.
    """
    error = relative_error(wanted, read)
    if error > TOLERANCE + torch.finfo(dtype).eps:
        raise RankwiseError(f"what was written in {dtype} differs by {error:.1e} from what should have been")


def balanced(f: Factors) -> Factors:
    """The same update, its scales shared between B and A, so that neither nears the end of a narrow dtype's range."""
    root = f.s.sqrt()
    return Factors(f.B * root, torch.ones_like(f.s), root[:, None] * f.A)


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
