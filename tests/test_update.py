"""Every reading of an update against the dense matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.update import Factors

SHAPES = pytest.mark.parametrize(
    ("out", "into", "r"), [(7, 5, 3), (5, 7, 5), (3, 5, 8), (5, 3, 8), (6, 2, 4), (1, 1, 1), (1, 4, 3), (4, 5, 0)]
)


def factors(*shape: int, seed: int = 0) -> Factors:
    """Random float64 factors of shape (…, out, in, r)."""
    *batch, out, into, r = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((*batch, out, r), (*batch, r), (*batch, r, into))
    return Factors(*(torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes))


def dense(f: Factors) -> Tensor:
    """ΔW entry by entry as a sum of outer products."""
    W = torch.zeros(f.B.shape[0], f.A.shape[1], dtype=torch.float64)
    for k in range(len(f.s)):
        W += f.s[k].double() * torch.outer(f.B[:, k].double(), f.A[k].double())
    return W


@SHAPES
def test_delta_is_the_sum_of_its_rank_one_terms(out: int, into: int, r: int) -> None:
    f = factors(out, into, r)
    assert f.r == r
    assert f.delta().shape == (out, into)
    assert torch.allclose(f.delta(), dense(f), atol=1e-12)


@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_delta_of_a_stack_is_the_stack_of_deltas(batch: tuple[int, ...]) -> None:
    f = factors(*batch, 6, 5, 2)
    flat = Factors(f.B.flatten(0, -3), f.s.flatten(0, -2), f.A.flatten(0, -3))
    each = [dense(Factors(*layer)) for layer in zip(*flat, strict=True)]
    assert torch.allclose(f.delta(), torch.stack(each).view(*batch, 6, 5), atol=1e-12)


@SHAPES
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_add_to_adds_the_update_of_the_input(out: int, into: int, r: int, batch: tuple[int, ...]) -> None:
    f = factors(out, into, r)
    x, result = torch.randn(*batch, into, dtype=torch.float64), torch.randn(*batch, out, dtype=torch.float64)
    before = result.clone()
    assert torch.allclose(f.add_to(result, x), before + x @ dense(f).T, atol=1e-12)
    assert torch.equal(result, before)


@pytest.mark.parametrize(
    ("zero_s", "zero_B", "zero_A", "left"),
    [
        ([], [], [], [0, 1, 2, 3]),
        ([1], [], [], [0, 2, 3]),
        ([], [0], [], [1, 2, 3]),
        ([], [], [3], [0, 1, 2]),
        ([0], [1], [2], [3]),
        ([2], [2], [2], [0, 1, 3]),
        ([0, 1, 2, 3], [], [], []),
    ],
)
def test_kept_drops_zero_ranks_and_only_those(
    zero_s: list[int], zero_B: list[int], zero_A: list[int], left: list[int]
) -> None:
    f = factors(6, 5, 4)
    f.s[zero_s], f.B[:, zero_B], f.A[zero_A] = 0, 0, 0
    f.B[0], f.A[:, 0] = 0, 0  # single zero entries say nothing about a rank
    kept = f.kept()
    assert kept.r == len(left)
    assert torch.equal(kept.s, f.s[left])
    assert torch.equal(kept.B, f.B[:, left])
    assert torch.equal(kept.A, f.A[left])
    assert torch.allclose(kept.delta(), dense(f), atol=1e-12)


@SHAPES
def test_orthogonal_is_a_thin_svd_of_the_update(out: int, into: int, r: int) -> None:
    f = factors(out, into, r)
    k = min(out, into, r)
    B, s, A = f.orthogonal()
    eye = torch.eye(k, dtype=torch.float64)
    assert (B.shape, s.shape, A.shape) == ((out, k), (k,), (k, into))
    assert torch.allclose(B.T @ B, eye, atol=1e-12)
    assert torch.allclose(A @ A.T, eye, atol=1e-12)
    assert torch.allclose((B * s) @ A, dense(f), atol=1e-10)
    assert torch.allclose(s, torch.linalg.svdvals(dense(f))[:k], atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(
    out=st.integers(1, 8),
    into=st.integers(1, 8),
    r=st.integers(0, 10),
    zeros=st.integers(0, 10),
    exponent=st.integers(-6, 6),
    seed=st.integers(0, 10**6),
)
def test_singular_values_are_those_of_the_dense_update(
    out: int, into: int, r: int, zeros: int, exponent: int, seed: int
) -> None:
    f = factors(out, into, r, seed=seed)
    f.s[:zeros] = 0
    f.s.mul_(10.0**exponent)
    values = f.singular_values()
    expected = torch.linalg.svdvals(dense(f))
    assert len(values) == min(r, out, into)
    assert torch.allclose(values, expected[: len(values)], rtol=1e-8, atol=1e-12 * 10.0**exponent)
    assert (expected[len(values) :] <= 1e-12 * 10.0**exponent).all()
    assert torch.allclose(f.kept().delta(), dense(f), rtol=1e-10, atol=1e-12 * 10.0**exponent)


def test_spectra_of_float32_factors_are_float64() -> None:
    f = Factors(*(t.float() for t in factors(9, 7, 3)))
    assert f.singular_values().dtype == torch.float64
    assert f.singular_values().tolist() == pytest.approx(torch.linalg.svdvals(dense(f))[:3].tolist(), rel=1e-12)


def test_orthogonal_of_a_stack_is_the_stack_of_spectra() -> None:
    f = factors(3, 6, 5, 2)
    each = [torch.linalg.svdvals(dense(Factors(*layer)))[:2] for layer in zip(*f, strict=True)]
    assert torch.allclose(f.singular_values(), torch.stack(each), atol=1e-12)
    assert torch.allclose(f.orthogonal().delta(), f.delta(), atol=1e-12)


def test_a_float32_diagonal_between_bfloat16_factors_is_read_as_the_matrix_it_stands_for() -> None:
    f = factors(6, 5, 3)
    mixed = Factors(f.B.bfloat16(), f.s.float(), f.A.bfloat16())
    x = torch.eye(5, dtype=torch.bfloat16)
    moved = mixed.add_to(torch.zeros(5, 6, dtype=torch.bfloat16), x)
    assert moved.dtype == torch.bfloat16
    assert torch.allclose(moved.double().T, dense(mixed), rtol=0.05, atol=0.05)
    assert torch.allclose(mixed.kept().orthogonal().delta(), dense(mixed), atol=1e-10)
    assert torch.allclose(mixed.delta().double(), dense(mixed), rtol=0.05, atol=0.05)
