"""Condition numbers against planted spectra and a plain decomposition of the dense product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.spectral import condition_number, condition_numbers
from rankwise.update import Factors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m: int, n: int, spectrum: list[float]) -> Tensor:
    k = len(spectrum)
    U, V = torch.linalg.qr(random(m, k)).Q, torch.linalg.qr(random(n, k, seed=1)).Q
    return (U * torch.tensor(spectrum, dtype=torch.float64)) @ V.T


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 9), n=st.integers(1, 9), exponent=st.integers(-6, 6), seed=st.integers(0, 10**6))
def test_is_the_ratio_of_the_extreme_singular_values(m: int, n: int, exponent: int, seed: int) -> None:
    W = 10.0**exponent * random(m, n, seed=seed)
    S = np.linalg.svd(W.numpy(), compute_uv=False)
    assert float(condition_number(W)) == pytest.approx(S[0] / S[-1], rel=1e-6)


@pytest.mark.parametrize("kappa", [1.0, 7.0, 1e3, 1e8, 1e12])
@pytest.mark.parametrize(("m", "n"), [(9, 4), (4, 9)])
def test_a_planted_condition_number_is_found(kappa: float, m: int, n: int) -> None:
    W = planted(m, n, [1.0, kappa**-0.3, kappa**-0.7, 1 / kappa])
    assert float(condition_number(W)) == pytest.approx(kappa, rel=1e-3)
    assert float(condition_number(W.T)) == pytest.approx(kappa, rel=1e-3)


@pytest.mark.parametrize("W", [planted(9, 4, [2.0, 1.0]), torch.ones(5, 3), torch.eye(4)[:, [0, 0, 1]]])
def test_a_matrix_short_of_full_rank_is_infinitely_ill_conditioned(W: Tensor) -> None:
    assert float(condition_number(W)) == math.inf


def test_the_zero_matrix_has_none_inside_a_stack_too() -> None:
    found = condition_number(torch.stack([torch.eye(3), torch.zeros(3, 3), torch.diag(torch.tensor([4.0, 2.0, 1.0]))]))
    assert found[[0, 2]].tolist() == [1, 4]
    assert math.isnan(float(found[1]))


def test_of_the_product_the_first_r_values_count() -> None:
    """The dense W_p of rank 3 has a condition number of its own, infinite; eq. 30 means σ_1/σ_r."""
    U, S, Vh = random(9, 3), torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64), random(3, 7, seed=1)
    found = condition_numbers(Factors(U, S, Vh))
    of_product = np.linalg.svd(((U * S) @ Vh).numpy(), compute_uv=False)
    assert float(found.W) == pytest.approx(of_product[0] / of_product[2], rel=1e-10)
    assert float(found.U) == pytest.approx(np.linalg.cond(U.numpy()), rel=1e-10)
    assert float(found.V) == pytest.approx(np.linalg.cond(Vh.numpy()), rel=1e-10)
    assert float(condition_number((U * S) @ Vh)) == math.inf


def test_orthonormal_factors_leave_the_spread_of_the_diagonal() -> None:
    U, V = torch.linalg.qr(random(9, 4)).Q, torch.linalg.qr(random(6, 4, seed=1)).Q
    S = torch.tensor([8.0, 4.0, 2.0, 0.5], dtype=torch.float64)
    found = condition_numbers(Factors(U, S, V.T))
    assert [float(kappa) for kappa in found] == pytest.approx([16, 1, 1])
    turned = condition_numbers(Factors(-U, S, V.T @ torch.linalg.qr(random(6, 6, seed=2)).Q))
    assert [float(kappa) for kappa in turned] == pytest.approx([16, 1, 1])
    assert [float(kappa) for kappa in condition_numbers(Factors(3 * U, S, V.T / 7))] == pytest.approx([16, 1, 1])


@pytest.mark.parametrize("kappa", [1e6, 1e10])
def test_an_ill_conditioned_diagonal_is_still_told_from_a_collapsed_one(kappa: float) -> None:
    U, V = torch.linalg.qr(random(9, 3)).Q, torch.linalg.qr(random(7, 3, seed=1)).Q
    found = condition_numbers(Factors(U, torch.tensor([kappa, 2.0, 1.0], dtype=torch.float64), V.T))
    assert float(found.W) == pytest.approx(kappa, rel=1e-4)


def test_the_product_is_no_worse_than_its_parts_together() -> None:
    for seed in range(20):
        U, S, Vh = random(9, 3, seed=seed), random(3, seed=seed + 1).abs() + 0.1, random(3, 7, seed=seed + 2)
        found = condition_numbers(Factors(U, S, Vh))
        assert float(found.W) <= float(found.U * found.V * S.max() / S.min()) * (1 + 1e-9)


def test_a_stack_gives_the_numbers_of_its_layers() -> None:
    B, s, A = random(2, 3, 8, 4), random(2, 3, 4, seed=1), random(2, 3, 4, 5, seed=2)
    found = condition_numbers(Factors(B, s, A))
    assert found.W.shape == found.U.shape == found.V.shape == (2, 3)
    alone = condition_numbers(Factors(B[1, 2], s[1, 2], A[1, 2]))
    assert [float(kappa[1, 2]) for kappa in found] == pytest.approx([float(kappa) for kappa in alone], rel=1e-9)


def test_more_ranks_than_rows_and_none_at_all() -> None:
    found = condition_numbers(Factors(random(3, 5), torch.ones(5), random(5, 8, seed=1)))
    expected = np.linalg.svd((random(3, 5) @ random(5, 8, seed=1)).numpy(), compute_uv=False)
    assert float(found.W) == pytest.approx(expected[0] / expected[2], rel=1e-9)
    assert all(kappa.isnan() for kappa in condition_numbers(Factors(random(3, 0), random(0), random(0, 4))))


def test_a_collapsed_triplet_is_infinite_and_a_zero_update_undefined() -> None:
    U, V = torch.eye(5, 3), torch.eye(3, 6)
    assert float(condition_numbers(Factors(U, torch.tensor([2.0, 1.0, 0.0]), V)).W) == math.inf
    assert math.isnan(float(condition_numbers(Factors(U, torch.zeros(3), V)).W))


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"`W` must be a matrix or a stack of matrices .*; found \(3,\)"):
        condition_number(torch.ones(3))
    with pytest.raises(ArgumentError, match="`W` must hold finite numbers only; found nan"):
        condition_number(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ArgumentError, match="`S` must hold finite numbers only; found -inf"):
        condition_numbers(Factors(torch.eye(3, 2), torch.tensor([1.0, -torch.inf]), torch.eye(2, 3)))
