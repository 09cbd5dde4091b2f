"""The polar factor against a float64 singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.polar import polar


def by_svd(A: Tensor) -> tuple[Tensor, Tensor]:
    """U Vᵀ over the nonzero singular values, and their sum, of one matrix."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    alive = S / S.max() > 1e-7
    return (U * alive) @ Vh, S[alive].sum()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(r: int, n: int, spectrum: Tensor) -> Tensor:
    U, V = torch.linalg.qr(random(r, r)).Q, torch.linalg.qr(random(n, r, seed=1)).Q
    return (U * spectrum) @ V.T


def assert_polar(A: Tensor, tolerance: float) -> None:
    Q, nuclear = polar(A)
    expected, total = by_svd(A)
    assert Q.dtype == A.dtype
    assert Q.shape == A.shape
    assert (Q.double() - expected).norm() <= tolerance * expected.norm()
    assert float(nuclear) == pytest.approx(float(total), rel=1e-9)


@pytest.mark.parametrize(
    "A",
    [
        pytest.param(random(64, 768), id="wide"),
        pytest.param(random(8, 8), id="square"),
        pytest.param(random(9, 4), id="tall"),
        pytest.param(random(1, 5), id="one row"),
        pytest.param(random(5, 1), id="one column"),
        pytest.param(planted(16, 96, torch.logspace(0, -3, 16, dtype=torch.float64)), id="condition 1e3"),
        pytest.param(torch.cat([random(3, 10), random(3, 10)]), id="every row twice"),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-7)])
def test_equals_the_svd(A: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert_polar(A.to(dtype), tolerance)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_does_not_depend_on_the_scale(scale: float) -> None:
    A = planted(8, 32, torch.logspace(0, -3, 8, dtype=torch.float64))
    assert_polar((scale * A).float(), 2e-7)
    Q, nuclear = polar(scale * A)
    assert torch.allclose(Q, polar(A)[0], atol=1e-9)
    assert float(nuclear) == pytest.approx(scale * float(polar(A)[1]))


@settings(max_examples=50, deadline=None)
@given(r=st.integers(1, 9), n=st.integers(1, 14), exponent=st.integers(-6, 6), seed=st.integers(0, 10**6))
def test_equals_the_svd_at_every_shape_and_scale(r: int, n: int, exponent: int, seed: int) -> None:
    A = 10.0**exponent * random(r, n, seed=seed)
    Q, nuclear = polar(A)
    expected, total = by_svd(A)
    assert torch.allclose(Q, expected, atol=1e-6)
    assert float(nuclear) == pytest.approx(float(total), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rows_stay_zero_and_leave_the_others_alone(dtype: torch.dtype) -> None:
    A = random(6, 20).to(dtype)
    A[1] = A[4] = 0
    Q, _ = polar(A)
    assert Q.isfinite().all()
    assert (Q[[1, 4]] == 0).all()
    others = [0, 2, 3, 5]
    assert torch.allclose(Q[others].double(), by_svd(A[others])[0], atol=1e-6)


def test_the_zero_matrix_gives_zero_inside_a_batch_too() -> None:
    A = torch.stack([random(4, 7), torch.zeros(4, 7, dtype=torch.float64)])
    Q, nuclear = polar(A)
    assert Q.isfinite().all()
    assert (Q[1] == 0).all()
    assert float(nuclear[1]) == 0
    assert torch.allclose(Q[0], by_svd(A[0])[0])


@pytest.mark.parametrize(
    "spectrum", [[3.0, 3.0, 3.0, 3.0], [5.0, 5.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0], [4.0, 4.0, 0.0, 0.0]]
)
def test_repeated_singular_values_give_the_same_answer(spectrum: list[float]) -> None:
    A = planted(4, 12, torch.tensor(spectrum, dtype=torch.float64))
    exact_diagonal = torch.cat([torch.diag(torch.tensor(spectrum)), torch.zeros(4, 3)], 1)
    assert_polar(A, 1e-10)
    assert_polar(A.float(), 1e-6)
    assert polar(exact_diagonal)[0].diagonal().tolist() == [float(s > 0) for s in spectrum]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_batches_equal_a_loop(batch: tuple[int, ...]) -> None:
    A = random(*batch, 4, 9)
    Q, nuclear = polar(A)
    assert Q.shape == A.shape
    assert nuclear.shape == batch
    flat = A.reshape(-1, 4, 9)
    for k in range(len(flat)):
        one, norm = by_svd(flat[k])
        assert torch.allclose(Q.reshape(-1, 4, 9)[k], one, atol=1e-12)
        assert float(nuclear.reshape(-1)[k]) == pytest.approx(float(norm), rel=1e-12)
