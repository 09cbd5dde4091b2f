"""What a folder with an adapter holds, measured. A plain LoRA is read without PEFT or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rankwise.errors import AdapterFileError
from rankwise.export.adapter import first_not_finite
from rankwise.export.lora_config import OURS, saved_config
from rankwise.export.pipeline_lora import read_any_lora
from rankwise.export.reader import TENSORS, recorded_command
from rankwise.spectral import Measured, Pretrained, Record, measure
from rankwise.spectral.record import DIRECTIONS
from rankwise.update import Factors

if TYPE_CHECKING:
    from torch import nn

    from rankwise.adapters.progress import Progress

TOP_K = 8
"""Leading singular triplets of each pretrained weight that the drift is over."""


@dataclass(frozen=True)
class Found:
    """An adapter from a folder."""

    folder: Path
    what: str
    """The method and what it adapts."""
    trained: str
    """How far, and by which command."""
    measured: Measured
    exported: dict[str, Factors]
    """The updates without ranks that hold nothing."""
    is_plain: bool
    """Whether it is a plain LoRA, and not of a method of rankwise's."""
    unfinished: str | None = None
    """What a run that stopped early has left undone."""

    @property
    def record(self) -> Record:
        """The adapter's spectra."""
        return self.measured.record


class _Read(NamedTuple):
    """An adapter as its files give it."""

    what: str
    told: str
    method: str
    step: int
    ranks: dict[str, int]
    kept: dict[str, int]
    exported: dict[str, Factors]
    trained: dict[str, Factors]
    unfinished: str | None


def read_adapter(folder: Path, base: str | None = None) -> Found:
    """An adapter of rankwise's, whose base model must open for its shapes, or else a plain LoRA.

    Args:
        folder: an adapter's, or of a pipeline's LoRA its file.
        base: the base model. Where it is given, the adapter is measured against its weights, too; otherwise one of
            rankwise's is looked for where the adapter says.

    Raises:
        AdapterFileError: there is no adapter, a file is broken or holds NaN, or the base model does not fit it.
    """
    read = _read(folder, base)
    weights = None if base is None else _pretrained(folder, base, read.exported)
    measured = _measured(read, read.step, weights)
    return Found(folder, read.what, read.told, measured, read.exported, not is_ours(folder), read.unfinished)


def read_checkpoint(folder: Path, step: int, base: nn.Module | None) -> Measured:
    """The adapter in a trainer's checkpoint, measured; `base` is the opened base model, which only ours need.

    Raises:
        AdapterFileError: as `read_adapter`.
    """
    return _measured(_read(folder, base), step)


def _measured(read: _Read, step: int, pretrained: Mapping[str, Pretrained] | None = None) -> Measured:
    return measure(
        read.exported,
        step=step,
        method=read.method,
        kept=read.kept,
        ranks=read.ranks,
        trained=read.trained,
        pretrained=pretrained,
        directions=DIRECTIONS,
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder's config is of a method of rankwise's."""
    return str(saved_config(folder).get("peft_type")).startswith(OURS)


def _read(folder: Path, base: Any) -> _Read:
    command = recorded_command(folder)
    told = f", by `{command}`" if command else ""
    if is_ours(folder):
        return _read_trained(folder, base, told)
    updates = read_any_lora(folder).updates
    exported = {name: f.kept() for name, f in updates.items()}
    return _Read(
        what="a plain LoRA",
        told=f"a plain LoRA does not say how far{told}",
        method="lora",
        step=0,
        ranks={name: f.r for name, f in updates.items()},
        kept={name: f.r for name, f in exported.items()},
        exported=exported,
        trained=updates,
        unfinished=None,
    )


def _read_trained(folder: Path, base: Any, told: str) -> _Read:
    from rankwise.adapters.lookup import reduced
    from rankwise.adapters.progress import unfinished
    from rankwise.export.trained import from_folder

    adapter = from_folder(folder, base)
    broken = first_not_finite(adapter.updates)
    if broken:
        raise AdapterFileError(f"{folder / TENSORS} holds NaN or infinity in the update of {broken!r}")
    progress = adapter.progress
    return _Read(
        what=f"{adapter.method.method} on {adapter.base_class}",
        told=_steps(progress) + told,
        method=adapter.method.method,
        step=progress.step,
        ranks={name: f.r for name, f in adapter.updates.items()},
        kept=dict(zip(adapter.updates, adapter.ranks, strict=True)),
        exported=reduced(adapter.updates, adapter.method),
        trained=adapter.trained,
        unfinished=unfinished(adapter.method, progress, adapter.ranks) if progress.step else None,
    )


def _steps(progress: Progress) -> str:
    if not progress.step:
        return "no step yet"
    total = f" of {progress.total}" if progress.total else ""
    skipped = f", {progress.skipped} skipped" if progress.skipped else ""
    return f"to step {progress.step}{total}{skipped}"


def _pretrained(folder: Path, base: str, updates: Mapping[str, Factors]) -> dict[str, Pretrained]:
    """The base model's weights that an adapter updates, each with its leading triplets; convolutions are left out."""
    from rankwise.base_models import open_model
    from rankwise.export.base import told_base, trained_as

    config = saved_config(folder)
    name, revision = told_base(base, config, folder)
    settings: dict[str, Any] = {"dtype": "auto", "revision": revision, "argument": "--base"}
    model = open_model(name, config.get("task_type"), trained_as=trained_as(config), **settings)
    modules = dict(model.named_modules())
    unknown = sorted(updates.keys() - modules.keys())
    if unknown:
        raise AdapterFileError(f"the base model {base!r} has no module {unknown[0]!r}: is it the right base?")
    weights: dict[str, Pretrained] = {}
    for module, update in updates.items():
        layer: Any = modules[module]
        W = layer.weight.detach()
        shape = (update.B.shape[0], update.A.shape[1])
        # Conv1D, GPT-2's linear layer, and embeddings hold their weight the other way round.
        if W.ndim == 2 and tuple(W.shape) != shape:
            W = W.T
        if tuple(W.shape) == shape:
            weights[module] = Pretrained(W, min(TOP_K, *shape))
    return weights
