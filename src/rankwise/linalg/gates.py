"""The hard-concrete distribution of gates in [0, 1] (SaLoRA, eq. 7, 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rankwise.errors import ArgumentError

Stretch = tuple[float, float]
"""(γ, ζ) with γ < 0 and ζ > 1: the interval that is then clipped to [0, 1]."""
FLOOR, CEILING = math.log(1e-2), math.log(1e2)
"""Where log θ is clamped."""
BARELY = 0.05
"""How far log θ of a kept gate is above where gates close, at least: bfloat16 still tells them apart."""


def require_stretch(argument: str, value: object) -> Stretch:
    """The pair as a tuple, as JSON has lists; raise unless gates close between the floor of log θ and 0."""
    match value:
        case [float() | int() as low, float() | int() as high] if (
            low < 0 and 2 * math.exp(FLOOR) < -low / high < 1 < high
        ):
            return low, high
    raise ArgumentError(argument, "be (γ, ζ) with γ < 0, ζ > 1 and 0.02 < −γ/ζ < 1", value)


def sampled_gate(log_theta: Tensor, u: Tensor, temperature: float, stretch: Stretch) -> Tensor:
    """g = clip(sigmoid((log u − log(1 − u) + log θ)/τ)·(ζ − γ) + γ, 0, 1) for u in (0, 1) (eq. 7)."""
    return _stretched(torch.sigmoid((torch.logit(u) + log_theta) / temperature), stretch)


def evaluation_gate(log_theta: Tensor, stretch: Stretch) -> Tensor:
    """g = clip(sigmoid(log θ)·(ζ − γ) + γ, 0, 1): exactly 0 where log θ ≤ log(−γ/ζ), whatever the rounding."""
    gate = _stretched(torch.sigmoid(log_theta), stretch)
    return torch.where(log_theta > closing_point(stretch), gate, 0)


def training_gate(log_theta: Tensor, u: Tensor, temperature: float, stretch: Stretch) -> Tensor:
    """The sampled gate where a u was drawn, the evaluation gate where u is 0, by one pass through the sigmoid."""
    drawn = u > 0
    noisy = (torch.logit(torch.where(drawn, u, 0.5)) + log_theta) / temperature
    gate = _stretched(torch.sigmoid(torch.where(drawn, noisy, log_theta)), stretch)
    return torch.where(drawn | (log_theta > closing_point(stretch)), gate, 0)


def open_probability(log_theta: Tensor, temperature: float, stretch: Stretch) -> Tensor:
    """P(g > 0) = sigmoid(log θ − τ·log(−γ/ζ)), of which E‖G‖₀ is the sum (eq. 8)."""
    return torch.sigmoid(log_theta - temperature * closing_point(stretch))


def least_open_probability(temperature: float, stretch: Stretch) -> float:
    """P(g > 0) at the floor of log θ, in plain numbers: a config may be made where tensors have no values."""
    return 1 / (1 + math.exp(temperature * closing_point(stretch) - FLOOR))


def closing_point(stretch: Stretch) -> float:
    """log(−γ/ζ): the log θ at and below which the evaluation gate is 0."""
    return math.log(-stretch[0] / stretch[1])


def kept_open(log_theta: Tensor, stretch: Stretch) -> Tensor:
    """Log θ of gates that are kept for good: raised to where they are barely open, and clamped."""
    return log_theta.clamp(closing_point(stretch) + BARELY, CEILING)


def reopened(log_theta: Tensor, stretch: Stretch) -> Tensor:
    """As `kept_open`, but at the floor, where gates are put that are not kept, log θ stays."""
    return torch.where(log_theta > FLOOR, kept_open(log_theta, stretch), log_theta)


def _stretched(s: Tensor, stretch: Stretch) -> Tensor:
    low, high = stretch
    return (s * (high - low) + low).clamp(0, 1)
