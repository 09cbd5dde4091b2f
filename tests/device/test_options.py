"""Hyper-parameters that are not the defaults, other optimisers and other loops, on a second device as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.optim.swa_utils import AveragedModel

from device_training import CPU, adapted, autocast, base, batch_on, logits, off, rounding_on, state, strays, train
from rankwise.export.moments import second_moments_of
from rankwise.methods import METHODS

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"lora_alpha": 12}, {"rank_pattern": {"key": 2}}],
    "nnm": [{"frobenius": "held"}, {"frobenius": "none"}],
    "adalora": [{"orth_reg_form": "sum"}, {"importance": "sensitivity"}, {"importance": "magnitude"}],
    "sora": [{"sparse_penalty": 1.0}, {"gate_lr": 1e-2, "gate_init": "ones"}],
    "alora": [{"max_r": 5, "prune_per_round": None}],
    "salora": [{"orth_reg_form": "sum"}, {"gate_lr": 1e-2, "multiplier_lr": 0.1}],
    "sorsa": [{"orth_reg_form": "sum"}, {"svd": "full"}, {"residual": "cached"}],
    "nblora": [
        {"norm": "nuclear"},
        {"norm": 3.0, "learn_split": False},
        {"bound_relative_to_weight": False},
        {"parameterization": "svd"},
        {"singular_value_bounds": [0.4, 0.3, 0.2, 0.1]},
    ],
    "deep": [{"init": "random"}, {"depth": 2}, {"depth": 5}],
}
ROWS = [(name, fields) for name, each in OPTIONS.items() for fields in each]


@pytest.mark.parametrize(("name", "fields"), ROWS, ids=[f"{name} {fields}" for name, fields in ROWS])
def test_options_train_as_on_the_cpu(name: str, fields: dict[str, Any], device: torch.device) -> None:
    ends = []
    for where in (CPU, device):
        model = adapted(name, where, **fields)
        train(model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1), 4)
        ends.append(model)
    assert not strays(ends[1], device)
    assert off(logits(ends[1]), logits(ends[0])) <= rounding_on(device)


def averaged(parameters: Any) -> torch.optim.Optimizer:
    """A schedule-free optimiser, in its mode for training."""
    optimizer = AdamWScheduleFree(parameters, lr=3e-3, weight_decay=0.1, foreach=False)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "AdamW over lists": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
    "Prodigy": lambda p: Prodigy(p, lr=1.0, d0=1e-3, weight_decay=0.1),
    "schedule-free": averaged,
}


@pytest.mark.parametrize("name", ["adalora", "sora", "salora", "deep"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimisers_train_as_on_the_cpu(name: str, kind: str, device: torch.device) -> None:
    """Of methods with rates of their own, with gates, or with tensors that must not decay."""
    ends = []
    for where in (CPU, device):
        model = adapted(name, where)
        trained = [p for p in model.parameters() if p.requires_grad]
        train(model, OPTIMIZERS[kind](trained), 4)
        ends.append(logits(model))
    assert off(ends[1], ends[0]) <= rounding_on(device)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointed_passes_train_as_on_the_cpu(name: str, reentrant: bool, device: torch.device) -> None:
    """Under autocast, whose state the second pass through a block must find again; gradients accumulate twice."""
    ends = []
    for where in (CPU, device):
        model: Any = adapted(name, where)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for _ in range(2):
            for _ in range(2):
                with autocast(where, "bfloat16 autocast"):
                    loss = model(**batch_on(where)).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(logits(model.eval()))
    assert off(ends[1], ends[0]) <= rounding_on(device, "bfloat16 autocast")


def test_an_average_of_the_model_follows_its_buffers(device: torch.device) -> None:
    model: nn.Module = adapted("adalora", device)
    average = AveragedModel(model)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2), 6)
    average.update_parameters(model)
    assert not strays(average.module, device)
    ranks = [{key: t for key, t in state(m).items() if key.endswith("kept")} for m in (model, average.module)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])


def test_second_moments_of_a_model_on_the_device(device: torch.device) -> None:
    """By which an adapter is shrunk; they come back to the CPU."""
    modules = ["bert.pooler.dense"]
    here, there = (second_moments_of(base().to(where), [batch_on(where)], modules) for where in (CPU, device))
    assert there[modules[0]].device.type == "cpu"
    assert off(there[modules[0]], here[modules[0]]) <= rounding_on(device)
