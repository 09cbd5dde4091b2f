"""Gradient descent on a product, step by step, against loops in NumPy written from equations 3, 4, 10 and 11."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from planted import planted, relative_error
from rankwise.completion import DeepMatrixCompletion, DeepMatrixFactorization
from rankwise.completion.descent import descent, sides
from rankwise.completion.entries import Dense, Entries, Sparse
from rankwise.completion.misfit import misfit
from rankwise.completion.standard import standardised
from rankwise.completion.starts import compressed_start, full_start
from rankwise.linalg.subspace import gradient_subspace, signed_permutation

SHAPES = pytest.mark.parametrize(("m", "n"), [(8, 8), (9, 6), (6, 9)])


def seen_in_part(m: int, n: int, share: float = 0.6, seed: int = 0) -> tuple[Dense, Sparse]:
    """A matrix of rank 2, seen in part: the same entries dense and sparse."""
    M, X = planted(m, n, 2, share, seed)
    seen = torch.from_numpy(np.isfinite(X))
    data = torch.from_numpy(M) * seen
    rows, columns = seen.nonzero().T
    return Dense(data, seen.double()), Sparse(rows, columns, data[rows, columns], (m, n))


def product(chain: Sequence[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.matmul, chain)


def random_chain(*sides_of: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=shape) for shape in itertools.pairwise(sides_of)]


def gradients(chain: Sequence[np.ndarray], R: np.ndarray) -> list[np.ndarray]:
    """∂/∂M_l of ½‖M_1 ⋯ M_k − M‖² for a residual R: (M_1 ⋯ M_{l−1})ᵀ · R · (M_{l+1} ⋯ M_k)ᵀ."""
    found = []
    for at in range(len(chain)):
        before = product([np.eye(len(R)), *chain[:at]])
        after = product([*chain[at + 1 :], np.eye(R.shape[1])])
        found.append(before.T @ R @ after.T)
    return found


def as_tensors(chain: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(factor) for factor in chain]


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_sides_of_a_product_are_in_its_order() -> None:
    """Equation 1: f = W_L ⋯ W_1; the factors have one order in which they fit together."""
    for shapes in [(5, 4), (5, 3, 4), (5, 3, 3, 4), (5, 2, 6, 3, 4)]:
        chain = random_chain(*shapes) if len(shapes) > 2 else [*random_chain(*shapes), np.eye(4)]
        P, Q = sides(as_tensors(chain))
        np.testing.assert_allclose((P @ Q.T).numpy(), product(chain), atol=1e-12)
        assert Q.shape[1] == chain[-1].shape[0]


def test_the_loss_is_half_the_squared_distance() -> None:
    """Equation 2: ½‖f − M‖_F² of a matrix seen in full; (10): the same over Ω; 12.5 for one entry that is 5 off."""
    M = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    whole, corner = torch.ones_like(M), torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    P, Q = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    assert float(misfit(Dense(M, whole), P, Q, center=False)) == 0.5 * 30
    assert float(misfit(Dense(M * corner, corner), P, Q, center=False)) == 0.5 * 16
    ones = torch.ones(2, 1, dtype=torch.float64)
    assert float(misfit(Dense(M * corner, corner), -ones, ones, center=False)) == 0.5 * 25


# --- the start ------------------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_every_full_width_factor_starts_orthogonal_and_their_product_is_the_signed_permutation(
    m: int, n: int, depth: int
) -> None:
    """Equation 3: W_l(0) = ε·(orthogonal) of width max(m, n), semi-orthogonal where W_L or W_1 closes a side."""
    scale, d = 0.3, max(m, n)
    chain = full_start((m, n), depth, scale, seed=5, dtype=torch.float64)
    assert [factor.shape for factor in chain] == [
        (m if at == 0 else d, n if at == depth - 1 else d) for at in range(depth)
    ]
    for factor in chain:
        values = torch.linalg.svdvals(factor)
        assert torch.allclose(values, torch.full_like(values, scale), atol=1e-12)
    S = signed_permutation(m, n, seed=5).apply(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.multi_dot(chain), scale**depth * S)
    assert not torch.allclose(chain[0], chain[0].abs())


@SHAPES
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_compressed_start_lies_in_the_subspace_of_the_gradient(m: int, n: int, kind: str) -> None:
    """At f ≈ 0 the gradient is −Ω ⊙ M: its leading singular vectors, their images under S, and ε·I between."""
    dense, sparse = seen_in_part(m, n)
    U, *core, Vt = compressed_start(dense if kind == "dense" else sparse, 4, 3, 0.1, seed=7)
    assert len(core) == 3
    assert all(torch.equal(factor, 0.1 * torch.eye(4, dtype=torch.float64)) for factor in core)
    u, _, vh = torch.linalg.svd(dense.data)
    S = signed_permutation(m, n, seed=7).apply(torch.eye(n, dtype=torch.float64))
    home, own, image = (Vt.T, vh[:2].T, S.T @ u[:, :2]) if m <= n else (U, u[:, :2], S @ vh[:2].T)
    torch.testing.assert_close(home.T @ home, torch.eye(4, dtype=torch.float64))
    for inside in (own, image):
        torch.testing.assert_close(home @ (home.T @ inside), inside, rtol=0, atol=1e-6)
    torch.testing.assert_close(U if m <= n else Vt.T, (S if m <= n else S.T) @ home)


# --- the steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_a_step_is_the_equation(kind: str, ratio: float | None, decay: float) -> None:
    """(4): W_l ← (1 − ηλ)·W_l − η·∂loss/∂W_l. (11): U and Vᵀ by γ·η and without decay; at γ = 0 they stay (9)."""
    dense, sparse = seen_in_part(7, 5)
    entries: Entries = dense if kind == "dense" else sparse
    chain, rate = random_chain(7, 3, 4, 5), 1e-3
    walk = descent(entries, as_tensors(chain), rate=rate, outer_ratio=ratio, weight_decay=decay)
    for _ in range(3):
        R = (product(chain) - dense.data.numpy()) * dense.ones.numpy()
        found, loss = next(walk)
        assert loss == pytest.approx(0.5 * (R**2).sum(), rel=1e-10)
        for factor, expected in zip(found, chain, strict=True):
            np.testing.assert_allclose(factor.numpy(), expected, rtol=1e-9, atol=1e-12)
        slopes = gradients(chain, R)
        outer = {0, len(chain) - 1} if ratio is not None else set()
        chain = [
            W - rate * float(ratio or 0) * slope if at in outer else (1 - rate * decay) * W - rate * slope
            for at, (W, slope) in enumerate(zip(chain, slopes, strict=True))
        ]


@pytest.mark.parametrize("width", ["compressed", "full"])
@pytest.mark.parametrize("rate", [None, 0.1])
def test_a_factorisation_walks_at_the_rate_it_says(width: str, rate: float | None) -> None:
    """M is divided by its spectral norm, η is 1/L by default, and U and V of the compressed form stay."""
    M, _ = planted(9, 7, 2, 1.0, 0)
    model = DeepMatrixFactorization(2, width=width, learning_rate=rate, init_scale=0.3, weight_decay=0.1)
    eta, whole = rate or 1 / 3, np.linalg.norm(M, 2)
    walk = model.set_params(random_state=0).iterate(M)
    chain = next(walk).weights
    for _ in range(3):
        R = product(chain) - M / whole
        slopes = gradients(chain, R)
        moving = range(len(chain)) if width == "full" else range(1, len(chain) - 1)
        chain = [(1 - 0.1 * eta) * W - eta * slopes[at] if at in moving else W for at, W in enumerate(chain)]
        step = next(walk)
        for found, expected in zip(step.weights, chain, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)
        distance = np.linalg.norm(product(chain) - M / whole) / np.linalg.norm(M / whole)
        assert step.error == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("rate", [None, 0.1])
@pytest.mark.parametrize("center", [False, True])
def test_a_completion_by_descent_is_the_papers_loop(ratio: float, rate: float | None, center: bool) -> None:
    """A hundred steps of (11) from the gradient's subspace, the loss divided by the share observed, η = 1/L."""
    _, X = planted(14, 10, 2, 0.7, 3, offset=0.5)
    scale, rank, depth = 0.3, 3, 3
    model = DeepMatrixCompletion(
        rank,
        depth=depth,
        solver="gd",
        center=center,
        init_scale=scale,
        learning_rate=rate,
        outer_lr_ratio=ratio,
        max_iter=100,
        tol=0,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    seen = np.isfinite(X)
    entries = Dense(torch.from_numpy(np.nan_to_num(X)), torch.from_numpy(seen).double())
    data, units = standardised(entries, center=center, seed=model._seed())
    U, V = (basis.numpy() for basis in gradient_subspace(data.data, 2 * rank, seed=model._seed()))
    chain = [U, *[scale * np.eye(2 * rank)] * depth, V.T]
    eta = (rate or 1 / depth) / seen.mean()

    def residual(chain: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
        R = (product(chain) - data.data.numpy()) * seen
        offset = -R.sum() / seen.sum() if center else 0.0
        return (R + offset) * seen, offset

    first = np.linalg.norm(residual(chain)[0]) / np.linalg.norm(data.data)
    for _ in range(100):
        slopes = gradients(chain, residual(chain)[0])
        own = [ratio, *[1.0] * depth, ratio]
        chain = [W - eta * share * slope for W, share, slope in zip(chain, own, slopes, strict=True)]
    R, offset = residual(chain)
    assert model.loss_curve_[0] == pytest.approx(first, rel=1e-10)
    assert model.loss_curve_[1] == pytest.approx(np.linalg.norm(R) / np.linalg.norm(data.data), rel=1e-8)
    assert model.loss_curve_[1] < 0.9 * first
    expected = units.scale * (product(chain) + offset) + units.offset
    assert relative_error(model.reconstruct(), expected) < 1e-8
