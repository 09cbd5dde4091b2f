"""The soft threshold against PyTorch's and against its definition as a proximal map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.linalg.prox import soft_threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0, 3.0])
def test_equals_softshrink(dtype: torch.dtype, threshold: float) -> None:
    x = torch.cat([torch.linspace(-4, 4, 65), torch.tensor([0.0, threshold, -threshold, 2 * threshold])]).to(dtype)
    assert torch.equal(soft_threshold(x, threshold), F.softshrink(x, threshold))


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-2, 2), threshold=st.floats(0, 1.5))
def test_minimises_half_the_squared_distance_plus_the_weighted_modulus(x: float, threshold: float) -> None:
    grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    objective = 0.5 * (x - grid).square() + threshold * grid.abs()
    y = soft_threshold(torch.tensor(x, dtype=torch.float64), threshold)
    assert float(y) == pytest.approx(float(grid[objective.argmin()]), abs=1.01e-4)


def test_zeroes_up_to_the_threshold_and_not_up_to_twice_it() -> None:
    x = torch.tensor([1.0, -1.0, 0.5, -0.5, 1.5, -1.5])
    assert soft_threshold(x, 1.0).tolist() == [0.0, 0.0, 0.0, 0.0, 0.5, -0.5]


def test_a_threshold_per_layer_broadcasts() -> None:
    x = torch.linspace(-2, 2, 12).view(3, 4)
    thresholds = torch.tensor([[0.1], [0.0], [1.0]])
    rows = [F.softshrink(row, float(threshold)) for row, threshold in zip(x, thresholds, strict=True)]
    assert torch.equal(soft_threshold(x, thresholds), torch.stack(rows))
