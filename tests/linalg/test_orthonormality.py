"""The distance from orthonormality and its gradients against float64 autograd of the norm written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.orthonormality import orthonormality_gap, orthonormality_gap_squared


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def written_out(P: Tensor, *, squared: bool) -> tuple[Tensor, Tensor]:
    """The sum over entries of (PᵀP − I)², or its root, and its derivative by autograd."""
    P = P.double().clone().requires_grad_()
    columns = range(P.shape[1])
    total = sum(((P[:, i] * P[:, j]).sum() - float(i == j)) ** 2 for i in columns for j in columns)
    value = total if squared else total.sqrt()  # type: ignore[union-attr]
    value.backward()  # type: ignore[union-attr]
    return value.detach(), P.grad  # type: ignore[return-value,union-attr]


FORMS = pytest.mark.parametrize(
    ("gap", "squared"), [(orthonormality_gap, False), (orthonormality_gap_squared, True)], ids=["norm", "squared"]
)


@FORMS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "P",
    [
        pytest.param(random(9, 4), id="random"),
        pytest.param(random(3, 5), id="more columns than rows"),
        pytest.param(random(6, 1), id="one column"),
        pytest.param(torch.zeros(5, 3, dtype=torch.float64), id="zero"),
        pytest.param(0.02 * random(96, 8), id="small"),
        pytest.param(torch.linalg.qr(random(12, 4)).Q + 1e-3 * random(12, 4, seed=1), id="nearly orthonormal"),
    ],
)
def test_value_and_gradient_equal_autograd(
    gap: object, squared: bool, dtype: torch.dtype, tolerance: float, P: Tensor
) -> None:
    P = P.to(dtype)
    value, gradient = gap(P)  # type: ignore[operator]
    expected, derivative = written_out(P, squared=squared)
    assert float(value) == pytest.approx(float(expected), rel=1e-10)
    assert gradient.dtype == dtype
    assert torch.allclose(gradient.double(), derivative, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), r=st.integers(1, 5), exponent=st.integers(-3, 3), seed=st.integers(0, 10**6))
def test_equals_autograd_at_every_shape_and_scale(m: int, r: int, exponent: int, seed: int) -> None:
    P = 10.0**exponent * random(m, r, seed=seed)
    for gap, squared in ((orthonormality_gap, False), (orthonormality_gap_squared, True)):
        value, gradient = gap(P)
        expected, derivative = written_out(P, squared=squared)
        assert float(value) == pytest.approx(float(expected), rel=1e-8)
        assert (gradient - derivative).norm() <= 1e-8 * derivative.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_gradient_at_exact_orthonormality(dtype: torch.dtype) -> None:
    P = torch.eye(7, 3, dtype=dtype)
    for gap in (orthonormality_gap, orthonormality_gap_squared):
        value, gradient = gap(P)
        assert float(value) == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("times_floor", "silent"), [(0.5, True), (2.0, False)])
def test_the_gradient_starts_at_ten_r_eps(dtype: torch.dtype, times_floor: float, silent: bool) -> None:
    r = 4
    floor = 10 * r * torch.finfo(dtype).eps
    P = torch.eye(9, r, dtype=dtype)
    P[8, 0] = (times_floor * floor) ** 0.5
    value, gradient = orthonormality_gap(P)
    assert float(value) == pytest.approx(times_floor * floor, rel=1e-3)
    assert bool((gradient == 0).all()) is silent
    if not silent:
        assert float(gradient.norm()) == pytest.approx(2, rel=1e-2)


@FORMS
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_batches_equal_a_loop(gap: object, squared: bool, batch: tuple[int, ...]) -> None:
    P = random(*batch, 6, 2)
    P.view(-1, 6, 2)[0] = torch.eye(6, 2)
    values, gradients = gap(P)  # type: ignore[operator]
    assert values.shape == batch
    for one, value, gradient in zip(P.view(-1, 6, 2), values.view(-1), gradients.view(-1, 6, 2), strict=True):
        alone, slope = gap(one)  # type: ignore[operator]
        assert torch.allclose(value, alone, rtol=1e-12)
        assert torch.allclose(gradient, slope, rtol=1e-12, atol=1e-14)
