"""AdaLoRA's averages after `optimizer.step()` are those of the gradient that the optimiser uses, written out plainly.

That gradient holds the orthonormality penalty's, and is divided by the loss scale where a scaler leaves that to the
optimiser. Equations 8 to 10 are computed here in float64 from the task's gradient and the penalty's, by autograd.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import rankwise
from conftest import tiny_bert
from rankwise.adapters.lookup import adapted_layers

TRIPLET = ("P", "Lambda", "Q")
BETA1, BETA2, WEIGHT = 0.8, 0.7, 0.5
STEPS = 3
Values = list[dict[str, Tensor]]


def adapted() -> Any:
    torch.manual_seed(2)
    own = {"target_r": 4, "init_r": 4, "total_step": 100, "tinit": 50, "tfinal": 20, "init_weights": False}
    averages = {"beta1": BETA1, "beta2": BETA2, "orth_reg_weight": WEIGHT}
    return get_peft_model(
        tiny_bert(), rankwise.AdaLoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS", **own, **averages)
    ).train()


def values_of(model: Any, names: tuple[str, ...]) -> Values:
    tensors = [layer.tensors("default") for layer in adapted_layers(model).values()]
    return [{name: getattr(t, name).detach().double().clone() for name in names} for t in tensors]


def task_gradients(model: Any, batch: dict[str, Tensor]) -> Values:
    """∂L/∂w of the loss alone, with nothing of it left on the parameters."""
    tensors = [layer.tensors("default") for layer in adapted_layers(model).values()]
    parameters = [getattr(t, name) for t in tensors for name in TRIPLET]
    flat = iter(torch.autograd.grad(model(**batch).loss, parameters))
    return [{name: next(flat).double() for name in TRIPLET} for _ in tensors]


def penalty_gradients(values: Values) -> Values:
    """Of γ times the mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over the 2L matrices."""
    own = [{name: w.clone().requires_grad_() for name, w in t.items()} for t in values]
    one = torch.eye(4, dtype=torch.float64)
    gaps = [(t["P"].T @ t["P"] - one).norm() + (t["Q"] @ t["Q"].T - one).norm() for t in own]
    (WEIGHT * torch.stack(gaps).sum() / (2 * len(own))).backward()
    return [{name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in t.items()} for t in own]


def assert_averages(found: Values, expected: Values) -> None:
    for one, other in zip(found, expected, strict=True):
        for name, average in other.items():
            torch.testing.assert_close(one[name], average, rtol=1e-3, atol=1e-5 * float(average.max()))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused, scaled"])
def test_the_averages_are_those_of_the_gradient_that_the_optimiser_uses(fused: bool, batch: dict[str, Tensor]) -> None:
    """|w·(g + the penalty's gradient)|: not of g alone, nor of either times the loss scale."""
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=fused)
    expected = [
        {f"{name}_{kind}": torch.zeros_like(w) for name, w in t.items() for kind in ("mean", "deviation")}
        for t in values_of(model, TRIPLET)
    ]
    for _ in range(STEPS):
        values, task = values_of(model, TRIPLET), task_gradients(model, batch)
        penalty = penalty_gradients(values)
        for w, g, more, average in zip(values, task, penalty, expected, strict=True):
            assert all(more[name].norm() > 0.05 * g[name].norm() for name in ("P", "Q")), "a penalty that is felt"
            for name in TRIPLET:
                sensitivity = (w[name] * (g[name] + more[name])).abs()
                mean, deviation = average[f"{name}_mean"], average[f"{name}_deviation"]
                mean = BETA1 * mean + (1 - BETA1) * sensitivity
                deviation = BETA2 * deviation + (1 - BETA2) * (sensitivity - mean).abs()
                average[f"{name}_mean"], average[f"{name}_deviation"] = mean, deviation

        scaler.scale(model(**batch).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert_averages(values_of(model, tuple(expected[0])), expected)
    assert rankwise.status(model).rules_run == STEPS
