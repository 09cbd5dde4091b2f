"""Leading triplets by subspace iteration against the full decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.svd import leading_triplets, leading_triplets_full


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m: int, n: int, spectrum: Tensor) -> Tensor:
    k = len(spectrum)
    return (torch.linalg.qr(random(m, k)).Q * spectrum) @ torch.linalg.qr(random(n, k, seed=1)).Q.T


def slow_decay(m: int, n: int) -> Tensor:
    return planted(m, n, torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -0.5)


def captured(S: Tensor) -> float:
    return float(S.double().square().sum())


@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60), (50, 50), (8, 200), (200, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_a_planted_spectrum_is_recovered(m: int, n: int, dtype: torch.dtype, tolerance: float) -> None:
    spectrum = torch.tensor([9.0, 7.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    W = planted(m, n, spectrum).to(dtype)
    B, s, A = leading_triplets(W, 3).factors
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert (B.shape, s.shape, A.shape) == ((m, 3), (3,), (3, n))
    assert s.double().tolist() == pytest.approx(S[:3].tolist(), rel=tolerance)
    assert s.double().tolist() == pytest.approx(spectrum[:3].tolist(), rel=tolerance)
    product = (B * s).double() @ A.double()
    assert torch.allclose(product, (U[:, :3] * S[:3]) @ Vh[:3], atol=10 * tolerance)


@pytest.mark.parametrize(("m", "n"), [(256, 192), (192, 256)])
@pytest.mark.parametrize("r", [8, 32])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slow_decay_loses_less_than_a_thousandth_of_the_captured_energy(m: int, n: int, r: int, seed: int) -> None:
    W = slow_decay(m, n)
    best = captured(torch.linalg.svdvals(W)[:r])
    reached = leading_triplets(W, r, seed=seed)
    share = captured(reached.factors.s) / best
    assert 0.999 <= share <= 1 + 1e-12
    assert reached.energy == pytest.approx(captured(reached.factors.s) / captured(torch.linalg.svdvals(W)))


def test_iterates_until_it_settles_and_no_longer_than_allowed() -> None:
    quick = leading_triplets(planted(60, 40, torch.logspace(0, -8, 40, dtype=torch.float64)), 8)
    slow = leading_triplets(random(256, 192), 8)
    limited = leading_triplets(random(256, 192), 8, iterations=1)
    assert (quick.iterations, limited.iterations) == (2, 1)
    assert 2 < slow.iterations <= 12
    assert limited.energy < slow.energy


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 30), n=st.integers(1, 30), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_factors_are_orthonormal_and_never_beat_the_full_decomposition(m: int, n: int, share: float, seed: int) -> None:
    r = max(1, round(share * min(m, n)))
    W = random(m, n, seed=seed)
    B, s, A = leading_triplets(W, r).factors
    eye = torch.eye(r, dtype=torch.float64)
    assert torch.allclose(B.T @ B, eye, atol=1e-10)
    assert torch.allclose(A @ A.T, eye, atol=1e-10)
    best = torch.linalg.svdvals(W)[:r]
    assert (s <= best * (1 + 1e-10)).all()
    assert (s[:-1] >= s[1:]).all()
    assert captured(s) >= 0.99 * captured(best)


@pytest.mark.parametrize(("m", "n"), [(7, 7), (4, 50), (50, 4), (1, 6), (6, 1)])
def test_at_full_rank_the_matrix_comes_back(m: int, n: int) -> None:
    W = random(m, n)
    found = leading_triplets(W, min(m, n))
    assert torch.allclose(found.factors.delta(), W, atol=1e-12)
    assert found.factors.s.tolist() == pytest.approx(torch.linalg.svdvals(W).tolist(), rel=1e-12)
    assert found.energy == pytest.approx(1)


def test_the_same_seed_gives_the_same_triplets_and_another_seed_others() -> None:
    W = slow_decay(60, 50).float()
    torch.manual_seed(1)
    one = leading_triplets(W, 8, seed=5).factors
    torch.manual_seed(2)
    again = leading_triplets(W, 8, seed=5).factors
    other = leading_triplets(W, 8, seed=6).factors
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.s, other.s)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    leading_triplets(random(20, 10), 4)
    leading_triplets_full(random(20, 10), 4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("function", [leading_triplets, leading_triplets_full])
def test_the_zero_matrix_has_zero_singular_values(function: object) -> None:
    found = function(torch.zeros(6, 5), 2)  # type: ignore[operator]
    assert found.factors.s.tolist() == [0, 0]
    assert found.energy == 0
    assert all(t.isfinite().all() for t in found.factors)


@pytest.mark.parametrize(("m", "n", "r"), [(9, 6, 3), (6, 9, 6), (5, 5, 1)])
def test_the_full_version_is_the_svd(m: int, n: int, r: int) -> None:
    W = random(m, n)
    found = leading_triplets_full(W, r)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.equal(found.factors.B, U[:, :r])
    assert torch.equal(found.factors.s, S[:r])
    assert torch.equal(found.factors.A, Vh[:r])
    assert found.iterations == 0
    assert found.energy == pytest.approx(captured(S[:r]) / captured(W))
