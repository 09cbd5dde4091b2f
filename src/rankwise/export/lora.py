"""Export to a plain LoRA: closed form for every method, whole or not at all, verified before success is reported."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.adapters.configs import AdapterConfig
from rankwise.adapters.lookup import reduced
from rankwise.adapters.progress import unfinished
from rankwise.checks import require_choice, require_int
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.source import PEFT_PREFIX, TENSORS, Form, Source, finite, from_folder, from_model
from rankwise.files import whole_folder
from rankwise.update import Factors

TOLERANCE = 1e-6
"""Largest relative error of the whole update an export may have beyond a truncation that was asked for."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    folder: Path
    layout: str
    rank: int
    """The config's r: what a server must allow."""
    ranks: dict[str, int]
    """The rank each module holds, by name in the base model; modules added with zero factors hold 0."""
    parameters: int
    """Numbers in the adapter's tensors as written, padding included."""
    relative_error: float
    """‖ΔW_exported − ΔW‖_F / ‖ΔW‖_F over all modules, read back from the file."""


def export_lora(
    model_or_folder: nn.Module | str | Path,
    folder: str | Path,
    *,
    adapter: str = "default",
    layout: str = "uniform",
    rank: int | None = None,
    base: str | Path | nn.Module | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a trained adapter as a plain LoRA that stock PEFT and servers load without rankwise.

    ΔW = B·diag(s)·A becomes lora_B = B·diag(s), lora_A = A with lora_alpha = r, so that the scale is 1 everywhere.

    Args:
        model_or_folder: the adapted model, or a folder written by its `save_pretrained`.
        folder: where to write; missing parents are made.
        adapter: which adapter of a live model.
        layout: "uniform": one rank for all modules, unused rows and columns zero, every module present in every layer.
            "compact": each module at its own rank through rank_pattern, modules of rank 0 left out.
        rank: the rank to write, by default the largest a module holds. Below it, each update is truncated optimally
            and the report states the error.
        base: for a folder, the base model or where it is, if not where the adapter's config says.
        overwrite: replace an existing folder.

    Raises:
        ArgumentError: the folder exists, or an argument breaks its rule.
        AdapterFileError: the source folder holds no whole rankwise adapter.
        RankwiseError: the adapter cannot be a plain LoRA, or what was written does not read back as it is.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.SoraConfig(r=2, target_modules=["0"], init_weights=False))
        >>> rankwise.export_lora(model, tempfile.mkdtemp() + "/lora").ranks
        {'0': 2}
    """
    folder = Path(folder)
    require_choice("layout", layout, ("uniform", "compact"))
    if rank is not None:
        require_int("rank", rank, least=1)
    if folder.exists() and not overwrite:
        raise ArgumentError("folder", "not exist yet, or be replaced with overwrite", str(folder))
    live = isinstance(model_or_folder, nn.Module)
    source = from_model(model_or_folder, adapter) if live else from_folder(Path(model_or_folder), base)
    _check(source)
    left = None if live else unfinished(source.config, source.progress, source.ranks)  # a live model's state has warned
    if left:
        warnings.warn(left, stacklevel=2)
    written = _truncated(source, rank)
    config, factors = (_uniform if layout == "uniform" else _compact)(source, written, rank)
    with whole_folder(folder) as beside:
        _write(beside, config, _tensors(factors, source.forms) | source.others)
        error = _error_of(beside, config, source)
        allowed = TOLERANCE + relative_error(source.updates, written)
        if error > allowed:
            raise RankwiseError(f"the export would differ from the adapter by {error:.1e}, more than {allowed:.1e}")
    ranks = {name: written[name].r if name in written else 0 for name in factors}
    return ExportReport(
        folder, layout, config.r, ranks, sum(f.B.numel() + f.A.numel() for f in factors.values()), error
    )


def check_exportable(config: AdapterConfig) -> None:
    """Raise `RankwiseError` for a config whose adapter could not be a plain LoRA."""
    if config.bias != "none":
        raise RankwiseError(
            f"trained biases cannot be part of a plain LoRA that servers load: `bias` is {config.bias!r}"
        )


def _check(source: Source) -> None:
    config = source.config
    check_exportable(config)
    for name in source.updates:
        if source.forms[name].unlike:
            raise RankwiseError(f"the update of module {name!r} cannot be a plain LoRA: {source.forms[name].unlike}")
    broken = finite(source.updates)
    if broken:
        raise RankwiseError(f"the update of module {broken!r} holds NaN or infinity")


def _truncated(source: Source, rank: int | None) -> dict[str, Factors]:
    """Each update without the ranks that hold nothing, and at most `rank` of its singular directions."""
    kept = reduced(source.updates, source.config)
    if rank is None:
        return kept
    return {name: f if f.r <= rank else _leading(f, rank) for name, f in kept.items()}


def _leading(f: Factors, rank: int) -> Factors:
    U, s, Vh = f.orthogonal()
    return Factors(U[:, :rank].to(f.B.dtype), s[:rank].to(f.s.dtype), Vh[:rank].to(f.A.dtype))


def _uniform(
    source: Source, updates: Mapping[str, Factors], rank: int | None
) -> tuple[peft.LoraConfig, dict[str, Factors]]:
    """One rank for all, and zero factors wherever a target name matches a module that has no update."""
    r = rank or max(1, *(f.r for f in updates.values()))
    plain = sorted({name.rpartition(".")[2] for name in updates})
    matched = [name for name in source.names if name.rpartition(".")[2] in plain]
    usable = all(_can_be_padded(source, name) for name in matched)
    modules = matched if usable else list(updates)
    padded = {name: _padded(updates.get(name), source.forms[name].shape, r) for name in modules}
    excluded = [] if usable else _also_matched(source, updates)
    return _config(source, r, plain if usable else sorted(updates), {}, excluded), padded


def _can_be_padded(source: Source, name: str) -> bool:
    """Whether a module may get zero factors: of a kind the adapter has anyway, and not trained in full.

    PEFT saves the frozen weight of an adapted embedding beside the adapter; that is not training.
    """
    form = source.forms.get(name)
    in_full = [key.removeprefix(PEFT_PREFIX) for key in source.others if ".base_layer." not in key]
    kinds = {source.forms[adapted].kind for adapted in source.updates}
    return form is not None and form.kind in kinds and not form.unlike and not _is_within(name, in_full)


def _compact(
    source: Source, updates: Mapping[str, Factors], rank: int | None
) -> tuple[peft.LoraConfig, dict[str, Factors]]:
    """Each module at its own rank. B is scaled by r_i / lora_alpha, since loaders divide lora_alpha by r_i."""
    alive = {name: f for name, f in updates.items() if f.r > 0}
    if not alive:
        raise RankwiseError('every update is zero, which a compact export cannot hold; use layout="uniform"')
    r = max(f.r for f in alive.values())
    scaled = {name: Factors(f.B, f.s * (f.r / r), f.A) for name, f in alive.items()}
    ranks = {_alone(name, source.names): f.r for name, f in alive.items() if f.r != r}
    return _config(source, r, sorted(alive), ranks, _also_matched(source, alive)), scaled


def _also_matched(source: Source, targets: Mapping[str, Factors]) -> list[str]:
    """Modules that a loader would adapt too, since a target's name is the end of theirs."""
    return sorted(n for n in source.names if n not in targets and any(_ends(n, target) for target in targets))


def _ends(name: str, ending: str) -> bool:
    return name.endswith(f".{ending}")


def _alone(name: str, names: Sequence[str]) -> str:
    """A rank_pattern key for this module only: loaders also match a plain name with the end of longer ones."""
    return f"^{re.escape(name)}$" if any(_ends(other, name) for other in names) else name


def _config(
    source: Source, r: int, targets: list[str], ranks: dict[str, int], excluded: Sequence[str] = ()
) -> peft.LoraConfig:
    own = source.config
    return peft.LoraConfig(
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        target_modules=targets,
        exclude_modules=list(excluded) or None,
        rank_pattern=ranks,
        modules_to_save=sorted(own.modules_to_save) if own.modules_to_save else None,
        fan_in_fan_out=any(source.forms[name].transposed for name in source.updates),
    )


def _padded(f: Factors | None, shape: tuple[int, int], r: int) -> Factors:
    out, into = shape
    B, s, A = torch.zeros(out, r), torch.zeros(r), torch.zeros(r, into)
    if f is not None:
        B[:, : f.r], s[: f.r], A[: f.r] = f.B.float(), f.s.float(), f.A.float()
    return Factors(B, s, A)


def _is_within(name: str, tensors: list[str]) -> bool:
    return any(tensor.startswith(f"{name}.") for tensor in tensors)


def _tensors(factors: Mapping[str, Factors], forms: Mapping[str, Form]) -> dict[str, Tensor]:
    return {
        f"{PEFT_PREFIX}{name}.{key}": tensor
        for name, f in factors.items()
        for key, tensor in forms[name].written(f).items()
    }


def _write(folder: Path, config: peft.LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    # cloned: safetensors refuses tensors that share memory, as tied ones do
    plain = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    save_file(plain, folder / TENSORS, {"format": "pt"})
    config.save_pretrained(str(folder))


def _error_of(folder: Path, config: peft.LoraConfig, source: Source) -> float:
    """The error of what a loader will compute, from the files alone."""
    tensors, read = load_file(folder / TENSORS), {}
    for name in source.updates:
        found = source.forms[name].read(tensors, f"{PEFT_PREFIX}{name}")
        if found is not None:
            A, B = found
            pattern = config.rank_pattern or {}
            r = pattern.get(get_pattern_key(list(pattern), name), config.r)
            if r != A.shape[0]:
                raise RankwiseError(f"a loader would take module {name!r} to have rank {r}, and it has {A.shape[0]}")
            read[name] = Factors(B, torch.full((r,), config.lora_alpha / r), A)
    return relative_error(source.updates, read)


def relative_error(updates: Mapping[str, Factors], others: Mapping[str, Factors]) -> float:
    """‖ΔW' − ΔW‖_F / ‖ΔW‖_F over all modules together, without forming any; a module that is missing counts as 0."""
    difference = size = rounding = 0.0
    for name, f in updates.items():
        both = Factors(*(t.cpu().double() for t in f))
        size += float(both.singular_values().square().sum())
        rounding += both.rounding() ** 2
        if name in others:
            B, s, A = (t.cpu().double() for t in others[name])
            both = Factors(torch.cat([both.B, B], 1), torch.cat([both.s, -s]), torch.cat([both.A, A]))
        difference += float(both.singular_values().square().sum())
    if difference <= rounding:
        return 0.0
    return (difference / max(size, rounding)) ** 0.5
