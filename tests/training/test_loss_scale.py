"""A step that a loss scale skips is counted when it is skipped, where torch's GradScaler decides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from test_optimizers import Wrapped, adamw
from test_steps import counted
from torch import Tensor

import rankwise
from cases import CASES
from rankwise.adapters.lookup import adapted_layers
from small import FINAL, adapted, check_same, loss_of, state, trained

NAMES = pytest.mark.parametrize("name", CASES)
SCALE = 2.0**10


class Plain(torch.amp.GradScaler):
    """As somebody extends it."""

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return super().step(optimizer, *args, **kwargs)


class Patient(torch.amp.GradScaler):
    """Skips for a reason of its own."""

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._maybe_opt_step(optimizer, optimizer_state, *args, **kwargs)


SCALERS: dict[str, Callable[[], Any]] = {
    "torch.amp": lambda: torch.amp.GradScaler("cpu", init_scale=SCALE),
    "torch.cpu.amp": lambda: torch.cpu.amp.GradScaler(init_scale=SCALE),
    "step overridden": lambda: Plain("cpu", init_scale=SCALE),
    "_maybe_opt_step overridden": lambda: Patient("cpu", init_scale=SCALE),
}


def scaled_pass(model: Any, scaler: Any, i: int, *, overflow: bool = False) -> None:
    scaler.scale(loss_of(model, i) * (float("inf") if overflow else 1.0)).backward()


@NAMES
@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.GradScaler.*deprecated")
@pytest.mark.parametrize("which", SCALERS)
@pytest.mark.parametrize("clipping", [False, True])
def test_a_skipped_step_is_counted_at_once(name: str, which: str, clipping: bool) -> None:
    """With accumulation 2, in which the overflow is in either micro-batch."""
    model = adapted(name)
    optimizer, scaler = adamw(model), SCALERS[which]()
    expected = [0, 0, 0]
    for i, overflow in enumerate([(True, False), (False, False), (False, True), (False, False)]):
        before = state(model)
        for j in range(2):
            scaled_pass(model, scaler, 2 * i + j, overflow=overflow[j])
        if clipping:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        scaler.step(optimizer)
        skipped = any(overflow)
        expected = [expected[0] + 1, expected[1] + (not skipped), expected[2] + skipped]
        assert list(counted(model)) == expected
        scaler.update()
        optimizer.zero_grad()
        if skipped:
            after = state(model)
            assert all(torch.equal(after[key], t) for key, t in before.items() if not key.endswith("progress"))


@NAMES
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_schedule_counts_skipped_steps_and_no_others(name: str, accumulation: int) -> None:
    """An allocation that was due at a skipped step is made at the next one."""
    model = adapted(name)
    optimizer, scaler = adamw(model), SCALERS["torch.amp"]()
    final = None
    for i in range(12):
        overflow = i in (0, 1, FINAL.get(name, 0) - 1)
        for j in range(accumulation):
            scaled_pass(model, scaler, accumulation * i + j, overflow=overflow)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if final is None and rankwise.status(model).final_ranks_due is None:
            final = i + 1
    if name in FINAL:
        assert final == FINAL[name] + 1
        assert counted(model) == (12, 9, 3)
    else:
        assert counted(model) == (12, 10, 2)


@NAMES
def test_accelerate_skips_as_torch_does(name: str) -> None:
    ends = []
    for accelerated in (False, True):
        Accelerator(cpu=True)  # whose state the optimiser asks for
        model = adapted(name)
        inner, scaler = adamw(model), SCALERS["torch.amp"]()
        optimizer: Any = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler) if accelerated else inner
        for i in range(4):
            scaled_pass(model, scaler, i, overflow=i % 2 == 0)
            if accelerated:
                optimizer.step()
                assert optimizer.step_was_skipped == (i % 2 == 0)
            else:
                scaler.step(optimizer)
                scaler.update()
            assert counted(model) == (i + 1, (i + 1) // 2, i // 2 + 1)
            optimizer.zero_grad()
        ends.append(state(model))
    check_same(*ends)


@NAMES
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimiser_that_steps_another_skips_once(name: str, fused: bool, wrapped: bool) -> None:
    model = adapted(name)
    inner = adamw(model, fused=fused)
    optimizer = Wrapped(inner) if wrapped else inner
    scaler = SCALERS["torch.amp"]()
    for i in range(4):
        scaled_pass(model, scaler, i, overflow=i < 2)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert counted(model) == (i + 1, max(0, i - 1), min(i + 1, 2))


@NAMES
def test_only_the_optimiser_that_overflowed_skips(name: str) -> None:
    """Two models of one process, an optimiser each, one loss scale."""
    models = [adapted(name), adapted(name)]
    optimizers, scaler = [adamw(model) for model in models], SCALERS["torch.amp"]()
    for i in range(3):
        for k, model in enumerate(models):
            scaled_pass(model, scaler, i, overflow=k == 0)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
    assert counted(models[0]) == (3, 0, 3)
    assert counted(models[1]) == (3, 3, 0)


@NAMES
def test_a_frozen_adapter_counts_no_skipped_step(name: str) -> None:
    model = adapted(name)
    optimizer, scaler = adamw(model), SCALERS["torch.amp"]()
    for p in trained(model):
        p.requires_grad_(False)
    head = torch.nn.Linear(8, 1)
    optimizer.add_param_group({"params": list(head.parameters())})
    for i in range(2):
        scaler.scale(head(model(torch.randn(2, 8))).sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert counted(model) == (0, 0, 0), i


def test_a_scaler_that_is_off_skips_nothing() -> None:
    model = adapted("lora")
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", enabled=False)
    for i in range(3):
        scaled_pass(model, scaler, i)
        scaler.step(optimizer)
        scaler.update()
        assert counted(model) == (i + 1, i + 1, 0)


# --- the gradient that rules read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("importance", ["smoothed", "sensitivity"])
def test_adalora_measures_the_gradient_with_its_penalty_and_without_the_loss_scale(
    scaled: bool, fused: bool, importance: str
) -> None:
    """(8): I(w) = |w·∂L/∂w| of the whole objective (4); a fused optimiser divides by the loss scale only afterwards."""
    fields = {"init_weights": False, "orth_reg_weight": 20.0, "importance": importance, "total_step": 4}
    model = adapted("adalora", **fields, tinit=0, tfinal=1, deltaT=1)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=scaled)
    layers = [layer.tensors("default") for layer in adapted_layers(model).values()]

    (1e-4 * loss_of(model, 0)).backward()  # so that the penalty is no small part of the gradient
    weights = [{key: p.detach().double().requires_grad_() for key, p in t.named_parameters()} for t in layers]
    (200 * CASES["adalora"].penalty(weights, 1e-3)).backward()  # type: ignore[misc]  γ is 0.1 there
    whole, task = [], []
    for tensors, own in zip(layers, weights, strict=True):
        parameters = dict(tensors.named_parameters())
        added = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in own.items()}
        whole.append({key: (own[key] * (p.grad.double() + added[key])).abs() for key, p in parameters.items()})
        task.append({key: (own[key] * p.grad.double()).abs() for key, p in parameters.items()})
    optimizer.zero_grad()

    scaler.scale(1e-4 * loss_of(model, 0)).backward()
    scaler.step(optimizer)
    if importance == "smoothed":
        for tensors, expected in zip(layers, whole, strict=True):
            for key, value in expected.items():
                found = getattr(tensors, f"{key}_mean").double()
                torch.testing.assert_close(found, 0.15 * value.detach(), rtol=1e-4, atol=1e-7)
        return
    budget = sum(int(tensors.kept.sum()) for tensors in layers)
    assert budget < sum(tensors.size.r for tensors in layers)
    kept = torch.cat([tensors.kept for tensors in layers])
    assert torch.equal(kept, highest(whole, budget))
    assert not torch.equal(kept, highest(task, budget)), "the penalty makes no difference here"


def highest(importances: list[dict[str, Tensor]], count: int) -> Tensor:
    """Which triplets have the highest scores (7) of all layers."""
    scores = torch.cat([one["Lambda"] + one["P"].mean(0) + one["Q"].mean(1) for one in importances])
    return scores >= scores.sort(descending=True).values[count - 1]
