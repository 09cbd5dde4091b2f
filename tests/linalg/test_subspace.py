"""The bases found from a gradient, and the signed permutation between them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankwise.linalg.subspace import gradient_subspace, signed_permutation

SHAPES = [(24, 24), (30, 18), (18, 30), (300, 7), (7, 300), (280, 270)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(m: int, n: int, k: int, seed: int = 0) -> Tensor:
    return random(m, k, seed=seed) @ random(k, n, seed=seed + 1)


def dense(m: int, n: int, seed: int = 0) -> Tensor:
    return signed_permutation(m, n, seed=seed).apply(torch.eye(n, dtype=torch.float64))


def is_orthonormal(P: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(P.mT @ P, torch.eye(P.shape[1], dtype=P.dtype), rtol=0, atol=tolerance)


def outside(P: Tensor, X: Tensor) -> float:
    """The norm of what the span of P's orthonormal columns leaves of X."""
    return float((X - P @ (P.mT @ X)).norm())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@settings(max_examples=50, deadline=None)
@given(m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_a_signed_permutation_is_semi_orthogonal_with_one_sign_in_each_line(m: int, n: int, seed: int) -> None:
    S = dense(m, n, seed)
    assert S.shape == (m, n)
    assert set(S.unique().tolist()) <= {-1.0, 0.0, 1.0}
    lines = S.abs().sum(int(m <= n))
    others = S.abs().sum(int(m > n))
    assert (lines == 1).all()
    assert (others <= 1).all()
    assert torch.equal(S @ S.T if m <= n else S.T @ S, torch.eye(min(m, n), dtype=S.dtype))
    assert m == n or torch.equal(S.T, dense(n, m, seed))
    X, Y = random(n, 3), random(m, 2)
    compact = signed_permutation(m, n, seed=seed)
    assert torch.equal(compact.apply(X), S @ X)
    assert torch.equal(compact.mT.apply(Y), S.T @ Y)
    assert compact.rows.shape == compact.columns.shape == compact.signs.shape == (min(m, n),)


def test_signs_and_places_vary_with_the_seed() -> None:
    S = dense(40, 40)
    assert 5 < int((S == -1).sum()) < 35
    assert int(S.diagonal().count_nonzero()) < 10
    assert torch.equal(S, dense(40, 40))
    assert not torch.equal(S, dense(40, 40, seed=1))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("r", [2, 3, 6, 7])
def test_the_longer_side_is_orthonormal_and_the_other_its_image(m: int, n: int, r: int) -> None:
    U, V = gradient_subspace(random(m, n), r, seed=3)
    S = dense(m, n, seed=3)
    assert (U.shape, V.shape) == ((m, r), (n, r))
    if m <= n:
        assert is_orthonormal(V)
        assert torch.equal(U, S @ V)
    else:
        assert is_orthonormal(U)
        assert torch.equal(V, S.T @ U)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_span_is_that_of_the_leading_vectors_and_their_images(m: int, n: int) -> None:
    G = low_rank(m, n, 3)
    U, V = gradient_subspace(G, 6)
    u, _, vh = torch.linalg.svd(G)
    u, v, S = u[:, :3], vh[:3].T, dense(m, n)
    home, own, image = (V, v, S.T @ u) if m <= n else (U, u, S @ v)
    assert outside(home, own) < 1e-10
    assert outside(home, image) < 1e-10


@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize(("m", "n"), [(24, 24), (30, 18), (18, 30)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_odd_column_descends_whatever_the_sign_of_the_gradient(r: int, m: int, n: int, sign: int) -> None:
    G = sign * low_rank(m, n, (r + 1) // 2, seed=5)
    U, V = gradient_subspace(G, r)
    assert float(U[:, -1] @ G @ V[:, -1]) < 0
    even_U, even_V = gradient_subspace(G, r + 1)
    home, even = (V, even_V) if m <= n else (U, even_U)
    assert outside(even, home) < 1e-10


@pytest.mark.parametrize(("m", "n"), [(1, 9), (9, 1), (1, 1), (2, 2), (5, 5), (4, 9), (9, 4)])
def test_any_number_of_columns_up_to_the_shorter_side_will_do(m: int, n: int) -> None:
    for r in range(1, min(m, n) + 1):
        U, V = gradient_subspace(random(m, n), r)
        assert (U.shape, V.shape) == ((m, r), (n, r))
        assert is_orthonormal(V if m <= n else U)
        assert torch.linalg.matrix_norm(U if m <= n else V, 2) <= 1 + 1e-12


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("r", [5, 6])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_the_gradient_lacks_is_completed(m: int, n: int, r: int, rank: int) -> None:
    G = low_rank(m, n, rank) if rank else torch.zeros(m, n, dtype=torch.float64)
    U, V = gradient_subspace(G, r)
    assert U.isfinite().all()
    assert V.isfinite().all()
    home = V if m <= n else U
    assert is_orthonormal(home)
    assert outside(home, G.T if m <= n else G) <= 1e-10 * (1 + G.norm())


@pytest.mark.parametrize("noise", [0.0, 1e-14])
@pytest.mark.parametrize("shared", [1, 2, 3])
@pytest.mark.parametrize(("m", "n"), [(24, 24), (18, 30), (30, 18)])
def test_directions_shared_by_both_sides_are_replaced(m: int, n: int, shared: int, noise: float) -> None:
    """G = Σ_i σ_i·(S v_i)·v_iᵀ makes V_G and Sᵀ U_G the same; the first `shared` of three triplets are such."""
    S = dense(m, n)
    home = torch.linalg.qr(torch.cat([S.T @ random(m, 3), random(n, 3)], 1) if m <= n else random(m, 6)).Q
    u, v = (S @ home[:, :3], home[:, :3].clone()) if m <= n else (home[:, :3].clone(), S.T @ home[:, :3])
    if shared < 3:
        u[:, shared:] = random(m, 3 - shared, seed=8)
        u = torch.linalg.qr(u).Q
    G = (u * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ v.T + noise * random(m, n, seed=9)
    U, V = gradient_subspace(G, 6)
    basis = V if m <= n else U
    assert is_orthonormal(basis)
    assert outside(basis, v if m <= n else u) < 1e-6
    assert outside(basis, S.T @ u if m <= n else S @ v) < 1e-6


def test_the_same_seed_gives_the_same_bases_and_another_seed_others() -> None:
    before = torch.get_rng_state()
    for G in (random(280, 270).float(), random(20, 30), torch.zeros(9, 9)):
        one, again = gradient_subspace(G, 6, seed=4), gradient_subspace(G.clone(), 6, seed=4)
        other = gradient_subspace(G, 6, seed=5)
        assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
        assert not torch.equal(one[0], other[0])
    assert torch.equal(before, torch.get_rng_state())


def test_the_transposed_gradient_swaps_the_bases() -> None:
    G = random(30, 18)
    U, V = gradient_subspace(G, 6)
    swapped = gradient_subspace(G.T.contiguous(), 6)
    assert torch.allclose(U @ V.T, swapped[1] @ swapped[0].T, atol=1e-12)


@pytest.mark.parametrize("given_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n"), [(40, 40), (280, 280), (300, 280), (280, 300)])
def test_narrow_gradients_give_float32_bases(given_dtype: torch.dtype, m: int, n: int) -> None:
    U, V = gradient_subspace(random(m, n).to(given_dtype), 8)
    assert U.dtype == V.dtype == torch.float32
    assert is_orthonormal(V if m <= n else U, 1e-6)
    assert m != n or is_orthonormal(U, 1e-6)


@pytest.mark.parametrize(("m", "n"), [(20000, 64), (64, 20000), (700, 700), (900, 400)])
def test_nothing_larger_than_the_gradient_is_formed(m: int, n: int) -> None:
    G = random(m, n).float()
    with Largest() as largest:
        U, V = gradient_subspace(G, 8)
    assert largest.elements <= G.numel()
    assert (U.shape, V.shape) == ((m, 8), (n, 8))


def test_the_permutation_takes_memory_in_proportion_to_one_side() -> None:
    with Largest() as largest:
        S = signed_permutation(300_000, 200_000)
        S.apply(torch.ones(200_000, 2))
    assert largest.elements <= 2 * 300_000
