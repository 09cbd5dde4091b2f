"""Running the model between optimiser steps, on a development batch: what it leaves behind is nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rankwise.adapters.roster import Roster
from rankwise.errors import ArgumentError, TrainingError
from rankwise.shards import whole

Batch = Mapping[str, Any]
Development = Batch | Callable[[nn.Module], Any]
"""A mapping of model inputs whose output has `.loss`, or a function of the model."""


def loss_of(model: nn.Module, batch: Batch, argument: str = "score_batch") -> Tensor:
    """The model's own loss on a batch, which the user gave as `argument`.

    Raises:
        ArgumentError: the output has no loss.
    """
    loss = getattr(model(**batch), "loss", None)
    if loss is None:
        raise ArgumentError(argument, "give a model output with .loss (does it hold labels?)", sorted(batch))
    return loss


def on_device_of(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The batch with its tensors where the model's parameters are."""
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def model_of(roster: Roster) -> nn.Module:
    """The model an adapter belongs to.

    Raises:
        TrainingError: it is not known any more.
    """
    if roster.model is None:
        raise TrainingError(
            f"the model of adapter {roster.adapter!r} is not known, so it cannot be run between steps: make or load "
            "the adapter on the model that trains"
        )
    return roster.model


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or caches; modes, settings and random states are put back."""
    modes = [(module, module.training) for module in model.modules()]
    found = [getattr(module, "config", None) for module in model.modules()]
    configs: dict[int, Any] = {id(config): config for config in found if getattr(config, "use_cache", False)}
    with torch.no_grad(), random_states():
        try:
            for config in configs.values():
                config.use_cache = False
            model.eval()
            for module, _ in modes:  # bitsandbytes' four-bit layers pack themselves in evaluation, and train no more
                module.training = hasattr(module, "support_avx512bf16_for_cpu")
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for config in configs.values():
                config.use_cache = True


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole what FSDP2 gathers in a pass through a module around this model only, such as PEFT's; every process asks.

    Parts that are sharded as modules of their own gather themselves when they run.
    """
    swapped = [(m, name, p) for m in _unsharded(model) for name, p in m._parameters.items() if isinstance(p, DTensor)]
    try:
        for module, name, p in swapped:
            module._parameters[name] = nn.Parameter(whole(p.detach()), requires_grad=False)
        yield
    finally:
        for module, name, p in swapped:
            module._parameters[name] = p  # type: ignore[assignment]


def _unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """The modules outside of those that FSDP2 has sharded one by one."""
    if not isinstance(model, FSDPModule):
        yield model
        for child in model.children():
            yield from _unsharded(child)


@contextmanager
def random_states() -> Iterator[None]:
    """Put every random generator back to where it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def backward_through(roster: Roster) -> None:
    """One forward and backward pass on `init_batch`, leaving every `.grad` as it was.

    Raises:
        TrainingError: the model is not known.
        ArgumentError: the model is sharded.
    """
    model, batch = model_of(roster), roster.method.init_batch  # type: ignore[attr-defined]  asked for by its users
    if roster.sharded:
        raise ArgumentError("init_batch", "be left out under FSDP2, where the first step's own batch is taken", "given")
    held = [(p, p.grad) for p in model.parameters()]
    for p, _ in held:
        p.grad = None
    try:
        with torch.enable_grad(), random_states():
            loss: Any = batch(model) if callable(batch) else loss_of(model, on_device_of(model, batch), "init_batch")
            loss.backward()  # not autograd.grad, which passes by the blocks that reentrant checkpointing recomputes
    finally:
        for p, gradient in held:
            p.grad = gradient
