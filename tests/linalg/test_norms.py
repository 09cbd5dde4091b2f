"""Schatten norms against a singular value decomposition, and the bounds built on them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.norms import EXPONENTS, on_unit_sphere, schatten, squared_norm_bound

EVERY_P = pytest.mark.parametrize("p", [1, 1.5, 2, 3, 7.25, math.inf])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_svd(W: Tensor, p: float) -> float:
    sigma = torch.linalg.svdvals(W.double()).tolist()
    return max(sigma) if p == math.inf else sum(x**p for x in sigma) ** (1 / p)


@EVERY_P
@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (6, 6), (1, 5), (5, 1)])
def test_schatten_is_the_norm_of_the_singular_values(shape: tuple[int, int], p: float) -> None:
    assert float(schatten(random(*shape), p)) == pytest.approx(by_svd(random(*shape), p), rel=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    p=st.floats(1, 50) | st.just(math.inf),
    exponent=st.integers(-15, 15),
    seed=st.integers(0, 10**6),
)
def test_schatten_at_every_shape_exponent_and_scale(m: int, n: int, p: float, exponent: int, seed: int) -> None:
    W = random(m, n, seed=seed)
    assert float(schatten(10.0**exponent * W, p)) == pytest.approx(10.0**exponent * by_svd(W, p), rel=1e-8)


@pytest.mark.parametrize("p", [1, 1.01, 1.9, 2, 2.5, math.inf])
def test_zero_singular_values_add_nothing(p: float) -> None:
    W = random(200, 2) @ random(2, 200, seed=1)
    assert float(schatten(W, p)) == pytest.approx(by_svd(W, p), rel=1e-10)
    assert float(schatten(torch.zeros(4, 3), p)) == 0


def test_large_exponents_do_not_overflow_and_tend_to_the_spectral_norm() -> None:
    W = torch.diag(torch.tensor([1e30, 1e29, 1.0]))
    assert float(schatten(W, 400.0)) == pytest.approx(1e30)


@EVERY_P
def test_batches_equal_a_loop_and_float32_is_taken_in_float64(p: float) -> None:
    W = random(2, 3, 7, 5).float()
    norms = schatten(W, p)
    assert norms.shape == (2, 3)
    assert norms.dtype == torch.float64
    for i in range(2):
        for j in range(3):
            assert float(norms[i, j]) == pytest.approx(by_svd(W[i, j], p), rel=1e-11)


def test_names_are_the_exponents_of_torchs_norms() -> None:
    W = random(6, 9)
    for name, order in (("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")):
        assert float(schatten(W, EXPONENTS[name])) == pytest.approx(float(torch.linalg.matrix_norm(W, order)))  # type: ignore[call-overload]


# --- the sphere -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 1.3, 2.0, 5.0, 300.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_points_on_the_sphere_have_norm_one_and_the_direction_of_z(p: float, scale: float) -> None:
    z = (scale * random(4, 6)).float()
    s = on_unit_sphere(z, p)
    torch.testing.assert_close(torch.linalg.vector_norm(s, p, dim=-1), torch.ones(4, dtype=torch.float64))
    ratio = s / z.abs().double()
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-10, atol=0)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_gradient_on_the_sphere_is_that_of_the_formula(p: float) -> None:
    z = random(3, 5).requires_grad_()
    C = random(3, 5, seed=1)
    (on_unit_sphere(z, p) * C).sum().backward()
    found, z.grad = z.grad, None
    (z.abs() / z.abs().pow(p).sum(-1, keepdim=True).pow(1 / p) * C).sum().backward()
    torch.testing.assert_close(found, z.grad)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
def test_zeros_stay_zero_and_finite(p: float) -> None:
    z = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    s = on_unit_sphere(z, p)
    assert s.tolist() == [[0, 1, 0], [0, 0, 0]]
    s.square().sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


# --- the bound of a rounded factor ----------------------------------------------------------------------------------


def test_the_bound_is_one_for_orthonormal_columns_and_above_the_norm_otherwise() -> None:
    Q = torch.linalg.qr(random(3, 50, 6)).Q
    torch.testing.assert_close(squared_norm_bound(Q), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-13)
    for distorted in (Q.float(), Q.bfloat16(), 3 * Q, 0.2 * Q, random(3, 50, 6), torch.zeros(3, 5, 2)):
        largest = torch.linalg.matrix_norm(distorted.double(), 2).square()
        assert (squared_norm_bound(distorted) >= largest).all()
    assert (squared_norm_bound(Q.bfloat16()) < 1.02).all()


def test_the_bound_is_constant_in_differentiation() -> None:
    assert not squared_norm_bound(random(5, 2).requires_grad_()).requires_grad
