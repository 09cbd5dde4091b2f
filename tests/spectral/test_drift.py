"""The drift of singular values and vectors against eq. 1–4 of SORSA (Cao, arXiv 2409.00055), written out as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.spectral import Drift, weight_drift, weight_drift_top_k

SHAPES = pytest.mark.parametrize(("m", "n"), [(7, 7), (9, 4), (4, 9), (1, 6), (6, 1), (1, 1)])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(m, k, seed=seed)).Q


def written_out(W0: Tensor, Wt: Tensor, k: int) -> tuple[float, float]:
    """ΔΣ_t and ΔD_t entry by entry, from numpy's decomposition."""
    U0, S0, V0h = np.linalg.svd(W0.double().numpy(), full_matrices=False)
    Ut, St, Vth = np.linalg.svd(Wt.double().numpy(), full_matrices=False)
    moved, overlaps = 0.0, 0.0
    for i in range(k):
        moved += abs(St[i] - S0[i])
        overlaps += abs(sum(Ut[j, i] * U0[j, i] for j in range(U0.shape[0])))
        overlaps += abs(sum(Vth[i, j] * V0h[i, j] for j in range(V0h.shape[1])))
    return moved / k, 1 - overlaps / (2 * k)


def assert_equal(found: Drift, expected: tuple[float, float]) -> None:
    assert float(found.values) == pytest.approx(expected[0], rel=1e-10, abs=1e-13)
    assert float(found.vectors) == pytest.approx(expected[1], abs=1e-7)


# --- the equations --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    share=st.floats(0, 1),
    exponent=st.integers(-3, 1),
    seed=st.integers(0, 10**6),
)
def test_equal_the_loops_at_every_shape_and_distance(m: int, n: int, share: float, exponent: int, seed: int) -> None:
    W0 = random(m, n, seed=seed)
    Wt = W0 + 10.0**exponent * random(m, n, seed=seed + 1)
    least, k = min(m, n), max(1, round(share * min(m, n)))
    assert_equal(weight_drift(W0, Wt), written_out(W0, Wt, least))
    assert_equal(weight_drift_top_k(W0, Wt, k), written_out(W0, Wt, k))


@SHAPES
def test_the_parts_are_what_the_whole_is_made_of(m: int, n: int) -> None:
    W0, Wt = random(m, n), random(m, n, seed=1)
    found, k = weight_drift(W0, Wt), min(m, n)
    assert found.left.shape == found.right.shape == (k,)
    assert 0 <= float(found.vectors) <= 1
    assert ((found.left >= 0) & (found.left <= 1) & (found.right >= 0) & (found.right <= 1)).all()
    assert float(found.vectors) == pytest.approx(1 - float((found.left + found.right).sum()) / (2 * k), abs=1e-12)


@SHAPES
def test_all_triplets_are_the_top_k_at_k_the_smaller_side(m: int, n: int) -> None:
    W0, Wt = random(m, n), random(m, n, seed=1)
    whole, top = weight_drift(W0, Wt), weight_drift_top_k(W0, Wt, min(m, n))
    assert all(torch.equal(a, b) for a, b in zip(whole, top, strict=True))


@SHAPES
def test_nothing_drifts_from_itself_and_nothing_is_negative(m: int, n: int) -> None:
    W = random(m, n)
    for found in (weight_drift(W, W), weight_drift_top_k(W, W, 1)):
        assert float(found.values) == 0
        assert 0 <= float(found.vectors) < 1e-14


# --- planted drifts -------------------------------------------------------------------------------------------------


def test_moved_values_move_nothing_else() -> None:
    U, V = orthonormal(9, 4), orthonormal(6, 4, seed=1)
    before = torch.tensor([8.0, 5.0, 3.0, 1.0], dtype=torch.float64)
    after = torch.tensor([9.0, 5.0, 2.5, 1.0], dtype=torch.float64)
    found = weight_drift((U * before) @ V.T, (U * after) @ V.T)
    assert float(found.values) == pytest.approx((1.0 + 0.5) / 6)  # two of the six singular values are 0
    top = weight_drift_top_k((U * before) @ V.T, (U * after) @ V.T, 4)
    assert float(top.values) == pytest.approx((1.0 + 0.5) / 4)
    assert float(top.vectors) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi / 2])
def test_a_planted_rotation_is_read_as_its_cosine(angle: float) -> None:
    """u_1 and u_2 turn in their plane; the right vectors and all values stay."""
    U, V = orthonormal(9, 5), orthonormal(5, 5, seed=1)
    S = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    turned = U.clone()
    turned[:, 0] = math.cos(angle) * U[:, 0] + math.sin(angle) * U[:, 1]
    turned[:, 1] = math.cos(angle) * U[:, 1] - math.sin(angle) * U[:, 0]
    found = weight_drift((U * S) @ V.T, (turned * S) @ V.T)
    assert found.left.tolist() == pytest.approx([math.cos(angle), math.cos(angle), 1, 1, 1], abs=1e-10)
    assert found.right.tolist() == pytest.approx([1] * 5, abs=1e-10)
    assert float(found.vectors) == pytest.approx((1 - math.cos(angle)) * 2 / 10, abs=1e-10)
    assert float(found.values) == pytest.approx(0, abs=1e-12)


def test_triplets_are_paired_by_order_so_that_a_crossing_counts_as_two_turned_vectors() -> None:
    found = weight_drift(torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([2.0, 3.0, 1.0])))
    assert found.left.tolist() == found.right.tolist() == [0, 0, 1]
    assert float(found.vectors) == pytest.approx(2 / 3)
    assert float(found.values) == 0


def test_a_low_rank_update_moves_the_top_more_than_the_whole() -> None:
    U, V = orthonormal(40, 30), orthonormal(30, 30, seed=1)
    S = torch.linspace(3, 1, 30, dtype=torch.float64)
    W0 = (U * S) @ V.T
    Wt = W0 + 2 * torch.outer(U[:, 0], V[:, 0])
    assert float(weight_drift(W0, Wt).values) == pytest.approx(2 / 30)
    assert float(weight_drift_top_k(W0, Wt, 4).values) == pytest.approx(2 / 4)


# --- invariances ----------------------------------------------------------------------------------------------------


@SHAPES
def test_the_sign_of_a_singular_vector_does_not_count(m: int, n: int) -> None:
    """−W has the singular values of W, and its vectors up to sign on one side: the modulus in eq. 2 and 3."""
    W0, Wt = random(m, n), random(m, n, seed=1)
    mirrored, found = weight_drift(W0, -Wt), weight_drift(W0, Wt)
    assert_equal(mirrored, (float(found.values), float(found.vectors)))
    assert_equal(weight_drift(W0, -W0), (0, 0))


@SHAPES
def test_common_rotations_change_nothing(m: int, n: int) -> None:
    W0, Wt = random(m, n), random(m, n, seed=1)
    Q, P = orthonormal(m, m, seed=2), orthonormal(n, n, seed=3)
    found = weight_drift(W0, Wt)
    assert_equal(weight_drift(Q @ W0 @ P, Q @ Wt @ P), (float(found.values), float(found.vectors)))


def test_a_rotation_of_one_side_only_changes_that_sides_vectors() -> None:
    W0 = random(6, 6)
    found = weight_drift(W0, orthonormal(6, 6, seed=2) @ W0)
    assert float(found.values) == pytest.approx(0, abs=1e-12)
    assert found.right.tolist() == pytest.approx([1] * 6, abs=1e-9)
    assert float(found.left.min()) < 0.9


@SHAPES
def test_transposing_swaps_left_and_right(m: int, n: int) -> None:
    W0, Wt = random(m, n), random(m, n, seed=1)
    found, transposed = weight_drift(W0, Wt), weight_drift(W0.T, Wt.T)
    assert_equal(transposed, (float(found.values), float(found.vectors)))
    assert torch.allclose(transposed.left, found.right, atol=1e-9)
    assert torch.allclose(transposed.right, found.left, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_values_have_the_units_of_the_weight_and_vectors_none(scale: float) -> None:
    W0, Wt = random(8, 5), random(8, 5, seed=1)
    found = weight_drift(W0, Wt)
    assert_equal(weight_drift(scale * W0, scale * Wt), (scale * float(found.values), float(found.vectors)))


# --- stacks, dtypes, bad input --------------------------------------------------------------------------------------


def test_one_start_serves_a_stack_of_steps() -> None:
    W0, steps = random(6, 4), random(3, 2, 6, 4, seed=1)
    found = weight_drift(W0, steps)
    assert found.values.shape == found.vectors.shape == (3, 2)
    assert found.left.shape == (3, 2, 4)
    for a in range(3):
        for b in range(2):
            assert_equal(Drift(*(part[a, b] for part in found)), written_out(W0, steps[a, b], 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_any_precision_are_read_in_float64(dtype: torch.dtype) -> None:
    W0, Wt = random(8, 5).to(dtype), random(8, 5, seed=1).to(dtype).requires_grad_()
    found = weight_drift(W0, Wt)
    assert found.values.dtype == found.vectors.dtype == torch.float64
    assert not found.values.requires_grad
    assert_equal(found, written_out(W0, Wt.detach(), 5))


@pytest.mark.parametrize(
    ("W0", "Wt", "message"),
    [
        (torch.ones(3), torch.ones(3, 2), r"`W0` must be a matrix or a stack.*found \(3,\)"),
        (torch.ones(3, 0), torch.ones(3, 0), r"`W0` must be a matrix or a stack.*found \(3, 0\)"),
        (torch.ones(3, 2), torch.ones(2, 3), r"`Wt` must fit the shape of W0, \(3, 2\); found \(2, 3\)"),
        (torch.ones(2, 3, 2), torch.ones(4, 3, 2), r"`Wt` must fit the shape of W0, \(2, 3, 2\); found \(4, 3, 2\)"),
        (torch.ones(3, 2), torch.full((3, 2), torch.inf), "`Wt` must hold finite numbers only; found inf"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 2), "`W0` must hold finite numbers only; found nan"),
    ],
)
def test_what_cannot_be_compared_is_named(W0: Tensor, Wt: Tensor, message: str) -> None:
    for compare in (weight_drift, lambda W0, Wt: weight_drift_top_k(W0, Wt, 1)):
        with pytest.raises(ArgumentError, match=message):
            compare(W0, Wt)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "`k` must be a whole number ≥ 1; found 0"),
        (1.0, r"`k` must be a whole number ≥ 1; found 1\.0"),
        (3, r"`k` must be at most min\(m, n\) = 2; found 3"),
    ],
)
def test_k_is_between_one_and_the_smaller_side(k: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        weight_drift_top_k(torch.ones(3, 2), torch.ones(3, 2), k)
