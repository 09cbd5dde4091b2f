"""Deep matrix factorisation: the theory of the paper's equations (1) to (9), seen through the estimator."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from planted import planted, relative_error
from rankwise.completion import DeepMatrixCompletion, DeepMatrixFactorization, repeated_singular_values
from rankwise.completion.deep_factorization import Step
from rankwise.completion.descent import sides
from rankwise.completion.entries import Dense
from rankwise.completion.misfit import misfit
from rankwise.completion.standard import standardised
from rankwise.completion.starts import compressed_start
from rankwise.errors import ArgumentError

D, R = 30, 3


def target(m: int = D, n: int = D, seed: int = 0) -> np.ndarray:
    """Of rank 3 and spectral norm 1."""
    M, _ = planted(m, n, R, 1.0, seed)
    return M / np.linalg.norm(M, 2)


def steps(model: DeepMatrixFactorization, M: np.ndarray, count: int) -> list[Step]:
    return list(itertools.islice(model.iterate(M), count))


def product(step: Step) -> np.ndarray:
    return functools.reduce(np.matmul, step.weights)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("depth", [2, 3])
def test_the_repeated_singular_value_follows_its_law(depth: int, decay: float) -> None:
    """Theorem 2.1: d − 2r̂ singular values of every factor are ρ_l(t) of equation 6, at every step."""
    M, scale, rate = target(), 0.1, 0.2
    model = DeepMatrixFactorization(
        R, depth=depth, width="full", init_scale=scale, learning_rate=rate, weight_decay=decay, random_state=0
    )
    law = repeated_singular_values((scale,) * depth, learning_rate=rate, weight_decay=decay)
    walk = steps(model, M, 200)
    assert walk[-1].error < 0.5 * walk[0].error
    for step, rho in zip(walk, law, strict=False):
        for weight, value in zip(step.weights, reversed(rho), strict=True):
            away = np.abs(np.linalg.svd(weight)[1] - value)
            assert (np.sort(away)[: D - 2 * R] < 1e-12).all()


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_repeated_singular_value_stays_within_its_bounds(decay: float) -> None:
    """Lemma E.2: ε(1 − η(λ + ε^(2L−2)))^t ≤ ρ(t) ≤ ε(1 − ηλ)^t."""
    depth, scale, rate = 3, 0.1, 0.2
    law = repeated_singular_values((scale,) * depth, learning_rate=rate, weight_decay=decay)
    for t, rho in enumerate(itertools.islice(law, 2000)):
        low = scale * (1 - rate * (decay + scale ** (2 * depth - 2))) ** t
        assert all(low * (1 - 1e-12) <= r <= scale * (1 - rate * decay) ** t * (1 + 1e-12) for r in rho)
    assert decay == 0 or rho[0] < 0.05 * scale


def test_the_subspaces_of_every_factor_are_invariant() -> None:
    """Theorem 2.1: W_l(t) − ρ_l(t)/ε·W_l(0) has its rows and columns in fixed subspaces of dimension 2r̂."""
    scale, rate = 0.1, 0.2
    model = DeepMatrixFactorization(R, width="full", init_scale=scale, learning_rate=rate, random_state=0)
    walk = steps(model, target(), 300)
    law = list(itertools.islice(repeated_singular_values((scale,) * 3, learning_rate=rate), 300))
    for layer in range(3):
        moved = [s.weights[layer] - rho[0] / scale * walk[0].weights[layer] for s, rho in zip(walk, law, strict=True)]
        for stacked in (np.hstack(moved[1:]), np.vstack(moved[1:])):
            values = np.linalg.svd(stacked, compute_uv=False)
            assert values[2 * R] < 1e-10 * values[0]


def test_the_compressed_product_takes_the_same_way() -> None:
    """Proposition 2.2: ‖f − f_C‖_F² ≤ (d − 2r̂)·∏ε_l² at every step, on the square."""
    M, scale = target(), 0.05
    shared = {"init_scale": scale, "learning_rate": 0.3, "random_state": 0}
    full = steps(DeepMatrixFactorization(R, width="full", **shared), M, 400)  # type: ignore[arg-type]
    compressed = steps(DeepMatrixFactorization(R, **shared), M, 400)  # type: ignore[arg-type]
    apart = [np.linalg.norm(product(a) - product(b)) ** 2 for a, b in zip(full, compressed, strict=True)]
    assert max(apart) <= (D - 2 * R) * scale**6 * (1 + 1e-6)
    assert full[-1].error < 1e-2


def test_training_ends_at_low_rank_from_any_small_start() -> None:
    """The low-rank bias: beyond 2r̂ nothing of the product exceeds ∏ρ_l; with weight decay that goes to 0."""
    model = DeepMatrixFactorization(
        R, width="full", init_scale=0.1, learning_rate=0.2, weight_decay=0.02, max_iter=1500, tol=0, random_state=0
    )
    with pytest.warns(ConvergenceWarning):
        model.fit(target())
    values = np.linalg.svd(functools.reduce(np.matmul, model.weights_))[1]
    assert values[2 * R] < 1e-8
    assert values[R - 1] > 0.1


@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
@pytest.mark.parametrize("width", ["compressed", "full"])
@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_it_is_a_decomposition(shape: tuple[int, int], width: str, scale: float) -> None:
    M = scale * target(*shape)
    model = DeepMatrixFactorization(R, width=width, tol=1e-5, random_state=0).fit(M)
    assert relative_error(model.reconstruct(), M) <= 1e-5
    np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(R), atol=1e-9)
    np.testing.assert_allclose(model.singular_values_, np.linalg.svd(M)[1][:R], rtol=1e-4)
    coefficients = model.transform(M)
    assert coefficients.shape == (shape[0], R)
    assert relative_error(model.inverse_transform(coefficients), M) < 1e-4
    assert model.get_feature_names_out()[0] == "deepmatrixfactorization0"
    assert model.n_iter_ == len(model.loss_curve_) - 1


def test_missing_entries_are_refused_and_few_steps_said() -> None:
    with pytest.raises(ArgumentError, match=r"`X` must be a full matrix, not \(rows, columns, values\)"):
        DeepMatrixFactorization(2).fit(([0], [0], [1.0]))
    with pytest.raises(ValueError, match="contains NaN"):
        DeepMatrixFactorization(1).fit([[1.0, np.nan], [2.0, 3.0]])
    with pytest.warns(ConvergenceWarning, match="after max_iter=3 steps"):
        DeepMatrixFactorization(R, max_iter=3).fit(target())


def test_the_step_is_the_papers() -> None:
    """Equation 4, written out: W_l ← (1 − ηλ)·W_l − η·W_{L:l+1}ᵀ·(f − M)·W_{l−1:1}ᵀ."""
    M, rate, decay = target(20, 14), 0.2, 0.05
    model = DeepMatrixFactorization(R, width="full", learning_rate=rate, weight_decay=decay, random_state=0)
    (C, B, A), (C1, B1, A1) = (step.weights for step in steps(model, M, 2))
    E = C @ B @ A - M
    np.testing.assert_allclose(C1, (1 - rate * decay) * C - rate * E @ (B @ A).T, atol=1e-15)
    np.testing.assert_allclose(B1, (1 - rate * decay) * B - rate * C.T @ E @ A.T, atol=1e-15)
    np.testing.assert_allclose(A1, (1 - rate * decay) * A - rate * (C @ B).T @ E, atol=1e-15)


def test_progress_is_printed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    DeepMatrixFactorization(R, verbose=True).fit(target())
    assert "DeepMatrixFactorization: 100 steps, error" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"depth": 1},
        {"width": "narrow"},
        {"init_scale": 0},
        {"learning_rate": 0},
        {"weight_decay": -1.0},
        {"max_iter": 0},
        {"tol": -1.0},
    ],
)
def test_a_bad_parameter_is_named(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must"):
        DeepMatrixFactorization(**settings).fit(target())  # type: ignore[arg-type]


def descended(seed: int, seen: float, depth: int, scale: float, rank: int = 30, max_iter: int = 8000) -> float:
    """Relative error of gradient descent on 100 × 100 matrices of rank 3."""
    M, X = planted(100, 100, 3, seen, seed)
    model = DeepMatrixCompletion(
        rank, depth=depth, solver="gd", center=False, init_scale=scale, max_iter=max_iter, tol=0, random_state=0
    )
    with pytest.warns(ConvergenceWarning):
        model.fit(X)
    return relative_error(model.reconstruct(), M)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [0.3, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_depth_keeps_an_overestimated_rank_from_overfitting(seen: float, seed: int) -> None:
    """Figure 2, left: rank 30 for a true 3, few entries, plain gradient descent."""
    assert descended(seed, seen, 3, 3e-3) <= 5e-6
    assert all(descended(seed, seen, 2, scale) >= 5e-4 for scale in (1e-2, 1e-3, 1e-4))


def test_depth_helps_gradient_descent() -> None:
    """The same in short: 40 % seen, 2500 steps."""
    deep, shallow = descended(0, 0.4, 3, 1e-2, max_iter=2500), descended(0, 0.4, 2, 1e-2, max_iter=2500)
    assert deep < 0.05 * shallow


def test_width_saves_steps_and_the_compressed_product_needs_no_more_than_full_width() -> None:
    """Figure 2, right, and figure 10: random factors of width 6 to 30, and the compressed form of the widest."""
    M, scale, rate, tol = target(), 0.05, 0.3, 2e-2
    by_width = [narrow_steps(M, width, scale, rate, tol) for width in (2 * R, 4 * R, D)]
    assert by_width == sorted(by_width, reverse=True)
    assert by_width[-1] < 0.8 * by_width[0]
    compressed = DeepMatrixFactorization(R, init_scale=scale, learning_rate=rate, tol=tol, random_state=0).fit(M)
    assert compressed.n_iter_ < 0.8 * by_width[0]
    assert compressed.n_iter_ <= 1.1 * by_width[-1]


def test_adam_loses_the_bias_toward_few_ranks() -> None:
    """The same product, start and data, fitted as closely: what is not seen is met ten times worse than by descent."""
    M, X = planted(100, 100, 3, 0.4, 0)
    seen = torch.from_numpy(np.isfinite(X))
    data, units = standardised(Dense(torch.from_numpy(np.nan_to_num(X)), seen.double()), center=False, seed=0)
    chain = compressed_start(data, 60, 3, 1e-2, seed=0)
    factors = [factor.contiguous().clone().requires_grad_() for factor in chain]
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    for _ in range(3000):
        optimizer.zero_grad()
        loss = misfit(data, *sides(factors), center=False)
        if float(loss.detach()) < 0.5 * (1e-4 * float(data.data.norm())) ** 2:
            break
        loss.backward()
        optimizer.step()
    P, Q = (side.detach() for side in sides(factors))
    model = DeepMatrixCompletion(30, solver="gd", center=False, init_scale=1e-2, tol=1e-4, random_state=0).fit(X)
    assert relative_error(units.scale * (P @ Q.T).numpy(), M) > 10 * relative_error(model.reconstruct(), M)


def narrow_steps(M: np.ndarray, width: int, scale: float, rate: float, tol: float) -> int:
    """Steps of gradient descent on random ε-orthogonal factors of the given width until the relative error is `tol`."""
    rng = np.random.default_rng(0)
    m, n = M.shape

    def orthogonal(a: int, b: int) -> np.ndarray:
        Q = np.linalg.qr(rng.normal(size=(max(a, b), min(a, b))))[0]
        return scale * (Q if a >= b else Q.T)

    A, B, C = orthogonal(m, width), orthogonal(width, width), orthogonal(width, n)
    for step in itertools.count():
        E = A @ B @ C - M
        if np.linalg.norm(E) <= tol * np.linalg.norm(M):
            return step
        A, B, C = A - rate * E @ (B @ C).T, B - rate * A.T @ E @ C.T, C - rate * (A @ B).T @ E
    raise AssertionError
