"""Recording an adapter's spectra while it trains, in a loop of one's own.

Everything is read from the factors: two QR decompositions and a small SVD for all layers of one shape at once. The
model is neither run nor changed. Trainers have callbacks that do this (`SpectraCallback`, `LightningSpectra`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import adapted_layers, base_name, factors, ranks, trained_factors
from rankwise.checks import require_int
from rankwise.errors import ArgumentError, TrainingError
from rankwise.spectral import Measured, Pretrained, measure, write_record
from rankwise.spectral.record import DIRECTIONS
from rankwise.training.status import budget_now
from rankwise.update import Factors

EVERY = 100
"""Steps between records by default: a record takes a part of a step's time, and this many share it."""


class _Live(NamedTuple):
    """An adapter as it is now."""

    method: str
    updates: dict[str, Factors]
    trained: dict[str, Factors]
    kept: dict[str, int]
    budget: float | None


class Recorder:
    """Records an adapter's spectra into a folder, a file a step; `rankwise inspect --checkpoints` draws them.

    Args:
        model: with an adapter of rankwise's, or with PEFT's own LoRA on linear layers.
        folder: where the records go. A record of the same step is replaced.
        adapter: its name.
        directions: leading singular directions of each layer to keep, ≥ 0; the alignment of subspaces is told from
            them. They take directions·(out + in) numbers of two bytes a layer and record.
        pretrained: also measure against this many leading singular triplets of each pretrained weight: lengths along
            the update's directions, ΔΣ_t and ΔD_t over the top k. Holds each weight in float64 and takes a subspace
            iteration a layer, so it is far dearer than the rest. None: do not.

    Raises:
        ArgumentError: the model has no such adapter, or a number is out of its range.
        TrainingError: FSDP2 has the model in pieces.

    Example:
        >>> import tempfile, torch, rankwise
        >>> from peft import get_peft_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(6, 5))
        >>> model = get_peft_model(net, rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False))
        >>> recorder = rankwise.Recorder(model, tempfile.mkdtemp())
        >>> found = recorder.record(step=10)
        >>> found.record.modules["0"].numerical_rank
        2
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        adapter: str = "default",
        directions: int = DIRECTIONS,
        pretrained: int | None = None,
    ) -> None:
        _check(directions, pretrained)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise TrainingError(
                "FSDP2 has the model in pieces, which a recorder cannot read: record from its checkpoints afterwards "
                "(`rankwise inspect --checkpoints`)"
            )
        self._model, self._folder, self._adapter = model, Path(folder), adapter
        self._directions = directions
        _live(model, adapter)  # a wrong name is told now, not at the first record
        self._pretrained = {} if pretrained is None else _pretrained_weights(model, adapter, pretrained)

    @torch.no_grad()
    def record(self, step: int) -> Measured:
        """Measure the adapter as it is now, and write the record of `step`.

        Raises:
            ArgumentError: the step is negative, or a factor holds a NaN or infinity.
        """
        found = look(self._model, step, adapter=self._adapter, directions=self._directions, pretrained=self._pretrained)
        write_record(self._folder, found)
        return found


class ScheduledRecorder:
    """A recorder that trainers' callbacks share: before the first step, every so many steps, and after the last.

    It is made before there is a model, so that a wrong number is told before anything is trained.

    Args:
        folder: where the records go.
        every: optimiser steps between records, ≥ 1.
        adapter: its name.
        directions: as in `Recorder`.
        pretrained: as in `Recorder`.

    Raises:
        ArgumentError: a number is out of its range.
    """

    def __init__(
        self, folder: str | Path, *, every: int, adapter: str, directions: int, pretrained: int | None
    ) -> None:
        require_int("every", every, least=1)
        _check(directions, pretrained)
        self._folder, self._every = folder, every
        self._settings: dict[str, Any] = {"adapter": adapter, "directions": directions, "pretrained": pretrained}
        self._recorder: Recorder | None = None
        self._recorded = -1

    def begin(self, model: nn.Module, step: int) -> Measured | None:
        """The record before the first step of a run; later ones are of the same model."""
        self._recorder = Recorder(model, self._folder, **self._settings)
        self._recorded = -1
        return self._record(step)

    def after_step(self, step: int) -> Measured | None:
        """A record, if one is due. Nothing is recorded before `begin`, which only one process calls."""
        return self._record(step) if step % self._every == 0 else None

    def end(self, step: int) -> Measured | None:
        """The record after the last step."""
        last = self._record(step)
        self._recorder = None
        return last

    def _record(self, step: int) -> Measured | None:
        # Several batches may make one step, and the last step may be one that was due anyway.
        if self._recorder is None or step == self._recorded:
            return None
        self._recorded = step
        return self._recorder.record(step)


def look(
    model: nn.Module,
    step: int,
    *,
    adapter: str = "default",
    directions: int = 0,
    pretrained: Mapping[str, Pretrained] | None = None,
) -> Measured:
    """Measure the adapter of a model as it is now; the arguments are those of `measure`.

    Raises:
        ArgumentError: the model has no such adapter, or a factor holds a NaN or infinity.
    """
    now = _live(model, adapter)
    return measure(
        now.updates,
        step=step,
        method=now.method,
        kept=now.kept,
        trained=now.trained,
        budget=now.budget,
        pretrained=pretrained,
        directions=directions,
    )


def _check(directions: int, pretrained: int | None) -> None:
    require_int("directions", directions, least=0)
    if pretrained is not None:
        require_int("pretrained", pretrained, least=1)


def _live(model: nn.Module, adapter: str) -> _Live:
    """An adapter of rankwise's, or else PEFT's own LoRA."""
    of_peft = _peft_layers(model, adapter)
    if of_peft:
        updates = {name: _peft_update(layer, adapter) for name, layer in of_peft.items()}
        return _Live("lora", updates, updates, {name: f.r for name, f in updates.items()}, None)
    roster = next(iter(adapted_layers(model, adapter).values())).rosters[adapter]
    return _Live(
        roster.method.method,
        factors(model, adapter),
        trained_factors(model, adapter),
        ranks(model, adapter),
        budget_now(roster),
    )


def _peft_layers(model: nn.Module, adapter: str) -> dict[str, PeftLinear]:
    """The linear layers that carry an adapter of PEFT's own LoRA."""
    return {
        base_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, PeftLinear) and adapter in module.lora_A
    }


def _peft_update(layer: PeftLinear, adapter: str) -> Factors:
    if layer.lora_variant.get(adapter) is not None:
        variant = type(layer.lora_variant[adapter]).__name__
        raise ArgumentError("model", "carry a plain LoRA, whose update is B·A alone", variant)
    A, B = (getattr(layer, part)[adapter].weight.detach() for part in ("lora_A", "lora_B"))
    return Factors(B, B.new_full((A.shape[0],), layer.scaling[adapter]), A)


def _pretrained_weights(model: nn.Module, adapter: str, k: int) -> dict[str, Pretrained]:
    """The base weights of an adapter's layers with their k leading triplets, or all that a smaller layer has."""
    layers: dict[str, Any] = _peft_layers(model, adapter) or adapted_layers(model, adapter)
    weights = {name: _base_weight(layer) for name, layer in layers.items()}
    return {name: Pretrained(W, min(k, *W.shape)) for name, W in weights.items()}


def _base_weight(layer: Any) -> Tensor:
    """The pretrained weight of an adapted layer as a matrix (out, in)."""
    if isinstance(layer, AdapterLayer):
        return layer.base_weight()
    weight = layer.get_base_layer().weight.detach()
    if not weight.is_floating_point():
        raise ArgumentError("pretrained", "be left out for PEFT's LoRA on quantised weights", str(weight.dtype))
    return weight.T if layer.fan_in_fan_out else weight
