"""Completion within a ball: the bound, the optimum and its certificate, and NB-LoRA's parameters of it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse
from scipy.sparse.linalg import svds
from sklearn.exceptions import ConvergenceWarning

from planted import planted
from rankwise.completion import NormBoundedCompletion
from rankwise.completion.balls import dual_norm, onto_ball, values_onto_ball
from rankwise.completion.bounded_factors import Free, factors, free_of
from rankwise.completion.bounded_solvers import projected, projected_thin, trained
from rankwise.completion.entries import Dense

NORMS = {"spectral": 2, "frobenius": "fro", "nuclear": "nuc"}
named = pytest.mark.parametrize("norm", NORMS)


def norm_of(X: np.ndarray, norm: str) -> float:
    return float(np.linalg.norm(X, NORMS[norm]))  # type: ignore[arg-type]


def problem(norm: str, share: float = 0.6) -> tuple[np.ndarray, float]:
    """A planted matrix seen in part, and a bound that binds."""
    M, X = planted(20, 15, 2, 0.6, 0)
    return X, share * norm_of(M, norm)


@named
@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.floats(0.1, 20))
@settings(max_examples=50, deadline=None)
def test_values_are_projected_onto_the_nearest_within(norm: str, values: list[float], bound: float) -> None:
    """Against a general solver: no feasible point is nearer."""
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    found = values_onto_ball(S, bound, norm).numpy()
    p = {"spectral": np.inf, "frobenius": 2, "nuclear": 1}[norm]
    assert np.linalg.norm(found, p) <= bound * (1 + 1e-12)
    assert (found >= 0).all()
    # Optimal for a convex set: ⟨S − found, Y − found⟩ ≤ 0 for the extreme points Y that could violate it most.
    pull = S.numpy() - found
    farthest = {
        "spectral": bound * np.sign(pull),
        "frobenius": bound * pull / max(np.linalg.norm(pull), 1e-300),
        "nuclear": bound * np.eye(len(found))[np.argmax(np.abs(pull))] * np.sign(pull[np.argmax(np.abs(pull))]),
    }[norm]
    assert pull @ (farthest - found) <= 1e-9 * max(1.0, bound**2, float(S @ S))


@named
def test_the_dual_norm_is_the_largest_product(norm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    for _ in range(100):
        other = 100 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
        U, S, Vh = onto_ball(other, 1.0, norm, rank=4)
        assert float((G * ((U * S) @ Vh)).sum()) <= dual_norm(G, norm) + 1e-12
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    best = {"spectral": U @ Vh, "frobenius": G / G.norm(), "nuclear": U[:, :1] @ Vh[:1]}[norm]
    assert norm_of(best.numpy(), norm) <= 1 + 1e-12
    assert float((G * best).sum()) == pytest.approx(dual_norm(G, norm))


@named
@pytest.mark.parametrize("share", [0.2, 0.6, 2.0])
def test_the_default_ends_with_a_certificate(norm: str, share: float) -> None:
    X, bound = problem(norm, share)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        model = NormBoundedCompletion(bound, norm=norm).fit(X)
    assert model.gap_ <= 1e-6
    assert norm_of(model.reconstruct(), norm) <= bound * (1 + 1e-12)
    assert model.offset_ == 0


@named
def test_the_certificate_holds_against_a_general_solver(norm: str) -> None:
    """The gap bounds how far the loss is from the least: that of a long Frank–Wolfe run is no lower."""
    X, bound = problem(norm)
    model = NormBoundedCompletion(bound, norm=norm).fit(X)
    mask, M = np.isfinite(X), np.nan_to_num(X)
    loss = lambda Y: 0.5 * float((((Y - M) * mask) ** 2).sum())  # noqa: E731
    Y = np.zeros_like(M)
    for _ in range(3000):
        G = (Y - M) * mask
        U, _, Vh = np.linalg.svd(G, full_matrices=False)
        corner = {"spectral": U @ Vh, "frobenius": G / np.linalg.norm(G), "nuclear": U[:, :1] @ Vh[:1]}[norm]
        way = -bound * corner - Y
        step = optimize.minimize_scalar(lambda t, way=way, Y=Y: loss(Y + t * way), bounds=(0, 1), method="bounded").x
        Y = Y + step * way
    assert loss(model.reconstruct()) <= loss(Y) + 1e-6 * loss(0 * M)


@named
def test_the_bound_holds_at_every_iterate_of_both_solvers(norm: str) -> None:
    X, bound = problem(norm)
    seen = np.isfinite(X)
    data = Dense(torch.from_numpy(np.nan_to_num(X)), torch.from_numpy(seen.astype(float)))
    solvers = [projected(data, bound, norm, 15), (now for _, now in trained(data, bound, norm, 4, seed=0))]
    if norm == "nuclear":
        solvers.append(now for _, now in projected_thin(data, bound, 15, seed=0))
    for looks in solvers:
        for _, now in zip(range(60), looks, strict=False):
            assert norm_of(((now.U * now.S) @ now.Vh).numpy(), norm) <= bound * (1 + 1e-10)


@named
def test_training_nb_lora_comes_near_the_optimum(norm: str) -> None:
    X, bound = problem(norm)
    best = NormBoundedCompletion(bound, norm=norm).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = NormBoundedCompletion(bound, norm=norm, solver="nb", max_iter=2000, random_state=0).fit(X)
    assert norm_of(model.reconstruct(), norm) <= bound * (1 + 1e-10)
    seen = np.isfinite(X)
    loss, least = (((m.reconstruct() - X)[seen] ** 2).sum() for m in (model, best))
    assert loss <= least + 0.02 * (X[seen] ** 2).sum()


@pytest.mark.parametrize("norm", ["spectral", "nuclear"])  # a Frobenius ball's optimum is the first projection
@pytest.mark.parametrize("solver", ["pg", "nb"])
def test_a_doubtful_end_is_said(norm: str, solver: str) -> None:
    X, bound = problem(norm)
    with pytest.warns(ConvergenceWarning, match="its duality gap is"):
        NormBoundedCompletion(bound, norm=norm, solver=solver, max_iter=2, tol=0).fit(X)


@named
@given(st.integers(0, 1000), st.sampled_from([0.3, 1.0]), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_every_matrix_in_the_ball_has_parameters(norm: str, seed: int, share: float, r: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(7, r, generator=generator, dtype=torch.float64) @ torch.randn(r, 5, generator=generator).double()
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    U, S, Vh = U[:, :r], S[:r], Vh[:r]
    bound = norm_of(X.numpy(), norm) / share
    free = free_of(U, S, Vh, bound, norm)
    torch.testing.assert_close(factors(free, bound, norm).delta(), X, rtol=1e-6, atol=1e-7 * float(X.norm()))


@named
def test_a_fit_is_told_in_nb_loras_parameters(norm: str) -> None:
    X, bound = problem(norm)
    model = NormBoundedCompletion(bound, norm=norm).fit(X)
    free = Free(*(torch.from_numpy(part) for part in (model.A_free_, model.B_free_, model.z_)))
    scale = np.linalg.norm(X[np.isfinite(X)])
    again = scale * factors(free, bound / scale, norm).delta().numpy()
    np.testing.assert_allclose(again, model.reconstruct(), atol=1e-6 * scale)


@named
@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_scale_passes_through(norm: str, c: float) -> None:
    X, bound = problem(norm)
    one, other = NormBoundedCompletion(bound, norm=norm).fit(X), NormBoundedCompletion(c * bound, norm=norm).fit(c * X)
    np.testing.assert_allclose(other.reconstruct(), c * one.reconstruct(), atol=1e-6 * c * np.nanmax(np.abs(X)))


def test_fewer_ranks_are_kept_to() -> None:
    X, bound = problem("spectral")
    with pytest.warns(ConvergenceWarning):
        model = NormBoundedCompletion(bound, norm="spectral", rank=2, max_iter=300).fit(X)
    assert model.rank_ <= 2
    assert norm_of(model.reconstruct(), "spectral") <= bound * (1 + 1e-12)


@named
def test_sparse_entries_are_those_of_the_array(norm: str) -> None:
    X, bound = problem(norm)
    rows, columns = np.isfinite(X).nonzero()
    coo = sparse.coo_array((X[rows, columns], (rows, columns)), shape=X.shape)
    one, other = (NormBoundedCompletion(bound, norm=norm).fit(given) for given in (X, coo))
    np.testing.assert_allclose(
        one.reconstruct(), other.reconstruct(), atol=1e-3 if norm == "nuclear" else 1e-9
    )  # one optimum, two ways to it


def large() -> sparse.coo_array:
    """30,000 entries of a matrix that would take 2.4 GB."""
    rng = np.random.default_rng(0)
    m, n, count = 20_000, 15_000, 30_000
    places = rng.choice(m * 100, count, replace=False)
    return sparse.coo_array((rng.normal(size=count), np.divmod(places, 100)), shape=(m, n))


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
def test_large_sparse_matrices_are_trained_without_being_formed(norm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = NormBoundedCompletion(5.0, norm=norm, rank=3, solver="nb", max_iter=20, random_state=0).fit(large())
    s = model.factors_.s.numpy()
    assert (s.sum() if norm == "nuclear" else np.linalg.norm(s)) <= 5.0 * (1 + 1e-10)
    assert model.loss_curve_[-1] < 1


def test_the_default_takes_large_sparse_matrices_to_their_optimum() -> None:
    M = large()
    model = NormBoundedCompletion(30.0, tol=1e-5).fit(M)
    assert model.gap_ <= 1e-5
    assert model.factors_.s.sum() <= 30.0 * (1 + 1e-10)
    rows, columns = M.coords
    residual = sparse.coo_array((model.entries(rows, columns) - M.data, (rows, columns)), shape=M.shape)
    gap = residual.data @ (residual.data + M.data) + 30.0 * svds(residual, 1, return_singular_vectors=False)[0]
    assert gap / (0.5 * M.data @ M.data) <= 1.1e-5


@pytest.mark.parametrize(("shape", "seed"), [((100, 80), 0), ((100, 80), 9), ((700, 600), 0)])
def test_the_default_certifies_sparse_matrices_whose_residual_has_equal_singular_values(
    shape: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))
    rows, columns = (rng.random(shape) < 0.1).nonzero()
    coo = sparse.coo_array((M[rows, columns], (rows, columns)), shape=shape)
    assert NormBoundedCompletion(0.8 * norm_of(M, "nuclear")).fit(coo).gap_ <= 1e-6


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_sparse_default_answers_odd_input() -> None:
    assert NormBoundedCompletion(10.0).fit(([4], [5], [3.0])).reconstruct()[4, 5] == pytest.approx(3)
    assert not NormBoundedCompletion(10.0).fit(([0, 4], [0, 5], [0.0, 0.0])).reconstruct().any()
    tight = NormBoundedCompletion(1.0).fit(1e17 * sparse.random(60, 50, 0.3, rng=0))
    assert tight.factors_.s.sum() <= 1 + 1e-12


@pytest.mark.parametrize("settings", [{"norm": "spectral"}, {"norm": "frobenius"}, {"norm": "nuclear", "solver": "nb"}])
def test_a_sparse_matrix_too_large_to_be_formed_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="`X` must have at most 100,000,000 places where norm="):
        NormBoundedCompletion(1.0, **settings).fit(large())  # type: ignore[arg-type]


@named
@pytest.mark.parametrize("solver", ["pg", "nb"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_odd_input_has_an_answer(norm: str, solver: str) -> None:
    model = NormBoundedCompletion(2.0, norm=norm, solver=solver, max_iter=200, random_state=0)
    X, _ = problem(norm)
    X[3], X[:, 5] = np.nan, np.nan
    with pytest.warns(ConvergenceWarning, match="2 rows or columns have no observed entry"):
        found = model.fit(X).reconstruct()
    np.testing.assert_allclose(found[3], 0, atol=1e-12)
    np.testing.assert_allclose(found[:, 5], 0, atol=1e-12)
    np.testing.assert_array_equal(model.fit_transform(np.ones((3, 2))), np.ones((3, 2)))
    np.testing.assert_allclose(model.fit([[1.5]]).reconstruct(), [[1.5]], atol=1e-3)
    assert model.fit(np.arange(6).reshape(2, 3)).reconstruct().dtype == np.float64
    single = model.fit(X.astype(np.float32)).reconstruct()
    assert single.dtype == np.float32
    assert norm_of(single.astype(float), norm) <= 2.0 * (1 + 1e-6)
    for bad in ([[np.nan]], [[np.inf]], ([0, 0], [1, 1], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"`X` must|contains infinity"):
            model.fit(bad)


@pytest.mark.parametrize("c", [1e-200, 1e200])
def test_no_square_overflows(c: float) -> None:
    X, bound = problem("nuclear")
    model = NormBoundedCompletion(c * bound, norm="nuclear").fit(c * X)
    assert model.gap_ <= 1e-6
    assert norm_of(model.reconstruct() / c, "nuclear") <= bound * (1 + 1e-9)


def test_nothing_but_zeros() -> None:
    model = NormBoundedCompletion(1.0).fit([[0.0, np.nan], [0.0, 0.0]])
    np.testing.assert_array_equal(model.reconstruct(), np.zeros((2, 2)))


@pytest.mark.parametrize(
    "settings",
    [{"bound": 0.0}, {"bound": np.nan}, {"norm": "max"}, {"rank": 0}, {"solver": "gd"}, {"max_iter": 0}, {"tol": -1.0}],
)
def test_a_bad_parameter_is_named(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must"):
        NormBoundedCompletion(**settings).fit([[1.0, np.nan], [2.0, 3.0]])  # type: ignore[arg-type]
