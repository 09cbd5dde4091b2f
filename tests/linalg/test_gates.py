"""The hard-concrete gates against a million samples, float64 autograd, and the numbers that SaLoRA's rules rest on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rankwise.linalg.gates import (
    CEILING,
    FLOOR,
    Stretch,
    closing_point,
    evaluation_gate,
    least_open_probability,
    open_probability,
    sampled_gate,
)

TEMPERATURE, STRETCH = 2 / 3, (-0.1, 1.1)
DISTRIBUTIONS = pytest.mark.parametrize(
    ("temperature", "stretch"), [(TEMPERATURE, STRETCH), (0.3, (-0.4, 1.05)), (1.5, (-0.05, 1.8))]
)


def draws(*shape: int) -> Tensor:
    """Uniform numbers in (0, 1), the edges left out."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def opened(log_theta: float, temperature: float = TEMPERATURE, stretch: Stretch = STRETCH) -> float:
    """The closed form of P(g > 0)."""
    return float(open_probability(torch.tensor(log_theta, dtype=torch.float64), temperature, stretch))


@DISTRIBUTIONS
def test_expected_count_of_open_gates_is_that_of_a_million_samples(temperature: float, stretch: Stretch) -> None:
    log_theta = torch.tensor([-4.0, -2.4, -0.5, 0.3, 2.0], dtype=torch.float64)
    gates = sampled_gate(log_theta, draws(1_000_000, 1), temperature, stretch)
    expected = open_probability(log_theta, temperature, stretch)
    assert float((gates > 0).sum(1).double().mean()) == pytest.approx(float(expected.sum()), abs=5e-3)
    torch.testing.assert_close((gates > 0).double().mean(0), expected, rtol=0, atol=2.5e-3)


@DISTRIBUTIONS
def test_the_gate_is_equation_7_number_by_number(temperature: float, stretch: Stretch) -> None:
    low, high = stretch
    log_theta, u = torch.linspace(-5, 5, 9, dtype=torch.float64), draws(9)
    for theta, number, g in zip(log_theta, u, sampled_gate(log_theta, u, temperature, stretch), strict=True):
        x = (math.log(number) - math.log(1 - number) + float(theta)) / temperature
        s = (high - low) / (1 + math.exp(-x)) + low
        assert float(g) == pytest.approx(min(1.0, max(0.0, s)), abs=1e-12)


def test_sampled_gates_put_mass_on_both_ends_and_between() -> None:
    gates = sampled_gate(torch.tensor(0.0), draws(10_000).float(), TEMPERATURE, STRETCH)
    assert 0 <= float(gates.min()) <= float(gates.max()) <= 1
    for part in (gates == 0, gates == 1, (gates > 0) & (gates < 1)):
        assert float(part.double().mean()) > 0.1


@DISTRIBUTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_evaluation_gate_is_exactly_0_at_and_below_its_closing_point(
    dtype: torch.dtype, temperature: float, stretch: Stretch
) -> None:
    point = torch.tensor(closing_point(stretch), dtype=dtype)
    below = point - torch.logspace(-6, 1, 200).to(dtype)
    assert float(evaluation_gate(point, stretch)) == 0
    assert int(evaluation_gate(below, stretch).count_nonzero()) == 0
    above = point + torch.linspace(0.05, 8, 200).to(dtype)
    assert bool((evaluation_gate(above, stretch) > 0).all())


def test_the_evaluation_gate_is_the_clipped_stretched_sigmoid() -> None:
    for theta in (-3.0, -2.0, 0.0, 1.0, 2.3, 2.5, 4.0):
        s = 1.2 / (1 + math.exp(-theta)) - 0.1
        g = evaluation_gate(torch.tensor(theta, dtype=torch.float64), STRETCH)
        assert float(g) == pytest.approx(min(1.0, max(0.0, s)), abs=1e-12)


@DISTRIBUTIONS
def test_gradients_by_autograd_are_those_of_finite_differences(temperature: float, stretch: Stretch) -> None:
    u = draws(6)
    interior = (u.logit() - closing_point(stretch)).neg().detach() + torch.linspace(0.3, 0.6, 6).double()
    for function in (
        lambda x: sampled_gate(x, u, temperature, stretch),
        lambda x: open_probability(x, temperature, stretch),
        lambda x: evaluation_gate(x, stretch),
    ):
        for point in (interior, torch.linspace(-4.1, 4.2, 6, dtype=torch.float64)):
            assert torch.autograd.gradcheck(function, (point.clone().requires_grad_(),))


def test_the_slope_of_the_open_probability_is_p_times_1_minus_p() -> None:
    log_theta = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    p = open_probability(log_theta, TEMPERATURE, STRETCH)
    (slope,) = torch.autograd.grad(p.sum(), log_theta)
    torch.testing.assert_close(slope, (p * (1 - p)).detach(), rtol=1e-12, atol=0)


def test_gates_stay_finite_at_the_ends_of_their_range() -> None:
    for u in (1e-6, 1 - 1e-6):
        log_theta = torch.tensor([FLOOR, CEILING], requires_grad=True)
        gates = sampled_gate(log_theta, torch.tensor([u, u]), TEMPERATURE, STRETCH)
        gates.sum().backward()
        assert bool(gates.isfinite().all())
        assert bool(log_theta.grad.isfinite().all())  # type: ignore[union-attr]


def test_the_numbers_that_the_rules_rest_on() -> None:
    assert closing_point(STRETCH) == pytest.approx(-2.398, abs=5e-4)
    assert opened(closing_point(STRETCH)) == pytest.approx(0.31, abs=5e-4), (
        "closed in evaluation, often open in training"
    )
    assert opened(FLOOR) == pytest.approx(0.047, abs=5e-4), "the least density"
    assert least_open_probability(TEMPERATURE, STRETCH) == pytest.approx(opened(FLOOR), rel=1e-12)
    assert opened(CEILING) == pytest.approx(0.998, abs=5e-4), "the greatest density"
    assert opened(2.0) == pytest.approx(0.97, abs=5e-3), "the start"
