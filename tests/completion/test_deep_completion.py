"""Deep matrix completion on planted matrices: rank, exactness, invariances, doubts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from planted import planted, relative_error
from rankwise.completion import DeepMatrixCompletion

CASES = [(120, 100, 3, 0.5), (100, 100, 3, 0.3), (100, 100, 3, 0.2)]
LARGE = [(1000, 1000, 5, 0.1), (1000, 1000, 5, 0.05)]


def fitted(X: object, rank: int | None, **settings: object) -> DeepMatrixCompletion:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        return DeepMatrixCompletion(rank, random_state=0, **settings).fit(X)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)])
@pytest.mark.parametrize("seed", range(5))
def test_the_rank_is_found_and_the_matrix_exactly(case: tuple[int, int, int, float], seed: int) -> None:
    M, X = planted(*case, seed)
    model = fitted(X, 10 * case[2])
    assert model.rank_ == case[2]
    assert relative_error(model.reconstruct(), M) <= 1e-8


@pytest.mark.parametrize("case", [LARGE[0]])
def test_a_thousand_by_a_thousand(case: tuple[int, int, int, float]) -> None:
    M, X = planted(*case, 0)
    model = fitted(X, 10 * case[2])
    assert model.rank_ == case[2]
    assert relative_error(model.reconstruct(), M) <= 1e-8


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)])
@pytest.mark.parametrize("seed", range(5))
def test_single_precision(case: tuple[int, int, int, float], seed: int) -> None:
    M, X = planted(*case, seed)
    model = fitted(X.astype(np.float32), 10 * case[2])
    assert model.rank_ == case[2]
    assert model.reconstruct().dtype == np.float32
    assert relative_error(model.reconstruct(), M) <= 1e-5


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGE)])
def test_with_noise_the_true_rank_in_nine_of_ten(case: tuple[int, int, int, float]) -> None:
    m, n, r, _ = case
    found = []
    for seed in range(10):
        M, X = planted(*case, seed, noise=0.05)
        model = DeepMatrixCompletion(10 * r, random_state=0).fit(X)
        found.append(model.rank_)
        if model.rank_ == r:  # no worse than what least squares over the true subspaces would leave, twice over
            floor = 0.05 * np.sqrt(r * (m + n - r) / np.isfinite(X).sum())
            assert relative_error(model.reconstruct(), M) < 2 * floor
    assert found.count(r) >= 9, found


@pytest.mark.parametrize("spectrum", [(1, 0.3, 1e-3), (1, 1e-2, 1e-4), (1, 0.5, 0.2, 0.05, 1e-5)])
def test_faint_ranks_are_found(spectrum: tuple[float, ...]) -> None:
    """Singular values far below what L-BFGS is run to."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(side, len(spectrum))))[0] for side in (90, 80))
    M = (U * spectrum) @ V.T
    model = fitted(np.where(rng.random(M.shape) < 0.6, M, np.nan), 20)
    assert model.rank_ == len(spectrum)
    assert relative_error(model.reconstruct(), M) < 1e-8


@pytest.mark.parametrize("depth", [2, 4])
def test_other_depths(depth: int) -> None:
    M, X = planted(100, 80, 3, 0.4, 1)
    model = fitted(X, 30, depth=depth)
    assert model.rank_ == 3
    assert relative_error(model.reconstruct(), M) <= 1e-8


@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("deviations", [0.0, 10.0])
def test_scale_and_offset_pass_through(c: float, deviations: float) -> None:
    M, X = planted(80, 60, 3, 0.5, 2)
    b = deviations * c * M.std()
    one, other = fitted(X, 30), fitted(c * X + b, 30)
    assert relative_error(other.reconstruct(), c * one.reconstruct() + b) <= 1e-6
    assert one.rank_ == other.rank_ == 3


@given(st.integers(12, 30), st.integers(12, 30), st.integers(1, 2), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
@example(12, 14, 2, 952)  # L-BFGS comes to an offset that takes a third rank
def test_what_is_seen_in_full_is_factorised(m: int, n: int, r: int, seed: int) -> None:
    M, _ = planted(m, n, r, 1.0, seed)
    model = fitted(M, 8)
    assert model.rank_ == r
    assert relative_error(model.reconstruct(), M) <= 1e-8
    np.testing.assert_array_equal(model.fit_transform(M), M)


def test_observed_entries_stay_and_missing_ones_are_filled() -> None:
    M, X = planted(60, 50, 2, 0.5, 0)
    model = DeepMatrixCompletion(20, random_state=0)
    filled = model.fit_transform(X)
    seen = np.isfinite(X)
    np.testing.assert_array_equal(filled[seen], X[seen])
    np.testing.assert_allclose(filled, M, atol=1e-8)


def test_new_rows_are_told_from_what_is_seen_of_them() -> None:
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(2, 40))
    M = rng.normal(size=(90, 2)) @ loadings + 3
    X = np.where(rng.random(M.shape) < 0.5, M, np.nan)
    model = DeepMatrixCompletion(20, random_state=0).fit(X[:60])
    np.testing.assert_allclose(model.transform(X[60:]), M[60:], atol=1e-6)
    np.testing.assert_allclose(model.transform(np.full((1, 40), np.nan)), model.offset_)
    np.testing.assert_allclose(model.transform(sparse_of(X[60:])), M[60:], atol=1e-6)


def sparse_of(X: np.ndarray) -> sparse.coo_array:
    """Its observed entries."""
    rows, columns = np.isfinite(X).nonzero()
    return sparse.coo_array((X[rows, columns], (rows, columns)), shape=X.shape)


def test_arrays_sparse_matrices_and_triplets_are_one() -> None:
    M, X = planted(70, 60, 3, 0.5, 4)
    coo = sparse_of(X)
    expected = fitted(X, 20).reconstruct()
    for same in (coo, coo.tocsr(), sparse.csc_matrix(coo), (coo.row, coo.col, coo.data)):
        model = fitted(same, 20)
        assert relative_error(model.reconstruct(), expected) < 1e-9
        np.testing.assert_allclose(model.entries(coo.row, coo.col), coo.data, atol=1e-8)
    assert relative_error(expected, M) < 1e-8


def test_stored_zeros_are_observed() -> None:
    M = np.outer(np.arange(30.0) - 10, np.ones(20))
    rows, columns = (np.random.default_rng(0).random(M.shape) < 0.6).nonzero()
    coo = sparse.coo_array((M[rows, columns], (rows, columns)), shape=M.shape)
    assert (coo.data == 0).any()
    assert relative_error(fitted(coo, 5).reconstruct(), M) < 1e-8


def test_gradient_descent_finds_it_too() -> None:
    M, X = planted(60, 50, 2, 0.5, 0)
    model = DeepMatrixCompletion(10, solver="gd", center=False, random_state=0, tol=1e-5).fit(X)
    assert relative_error(model.reconstruct(), M) < 1e-4
    assert model.loss_curve_[0] == pytest.approx(1, abs=1e-3)
    assert model.loss_curve_[-1] <= 1e-5


@pytest.mark.parametrize("solver", ["lbfgs", "gd"])
def test_held_out_entries_stop_and_choose(solver: str) -> None:
    M, X = planted(80, 70, 3, 0.5, 0, noise=0.2)
    model = DeepMatrixCompletion(20, solver=solver, early_stopping=True, random_state=0, max_iter=3000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    assert model.validation_score_ is not None
    assert model.validation_score_ < 0.4
    assert relative_error(model.reconstruct(), M) < 0.2


def test_without_a_break_in_the_spectrum_ranks_are_chosen() -> None:
    """Singular values that fall evenly, with noise: better than the mean and than any rank without a ridge is asked."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(side, 60)))[0] for side in (90, 70))
    M = (U * 0.85 ** np.arange(60)) @ V.T
    X = np.where(rng.random(M.shape) < 0.5, M + 0.005 * rng.normal(size=M.shape), np.nan)
    model = DeepMatrixCompletion(random_state=0).fit(X)
    unseen = np.isnan(X)
    error = np.linalg.norm((model.reconstruct() - M)[unseen]) / np.linalg.norm(M[unseen])
    assert model.validation_score_ is not None
    assert error < 0.6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seen", [0.03, 0.06, 0.1])
def test_too_few_entries_are_said_and_answered_within_bounds(seen: float, seed: int) -> None:
    """Rank 5 has 975 degrees of freedom; rows have 3, 6 or 10 entries."""
    M, X = planted(100, 100, 5, seen, seed)
    with pytest.warns(ConvergenceWarning):
        model = DeepMatrixCompletion(30, random_state=0).fit(X)
    assert np.isfinite(model.reconstruct()).all()
    assert np.abs(model.reconstruct()).max() <= 10 * np.nanmax(np.abs(X))
    assert relative_error(model.reconstruct(), M) < 3


@pytest.mark.parametrize(
    ("shape", "rank", "seen", "seed"), [((40, 30), 2, 0.16, 25), ((100, 100), 3, 0.1, 41), ((40, 30), 2, 0.16, 1)]
)
def test_what_few_entries_do_not_tell_does_not_grow(shape: tuple[int, int], rank: int, seen: float, seed: int) -> None:
    """Least squares alone made these 371 and 2189 times the data."""
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    X = np.where(rng.random(shape) < seen, M, np.nan)
    with pytest.warns(ConvergenceWarning, match="held-out entries are met with a relative error of 0"):
        model = DeepMatrixCompletion(30, random_state=0).fit(X)
    assert np.abs(model.reconstruct()).max() <= 3 * np.nanmax(np.abs(X))
    assert relative_error(model.reconstruct(), M) < 1


@pytest.mark.parametrize("values", [(1, 0.5, 1e-5), (1, 0.5, 1e-7), (1, 0.5, 0.2, 1e-4, 1e-8)])
@pytest.mark.parametrize("offset", [0, 10])
def test_a_faint_rank_is_not_taken_for_the_offsets(values: tuple[float, ...], offset: float) -> None:
    rng = np.random.default_rng(3)
    U, V = (np.linalg.qr(rng.normal(size=(side, len(values))))[0] for side in (90, 80))
    M = U * values @ V.T
    model = DeepMatrixCompletion(30, random_state=0).fit(np.where(rng.random(M.shape) < 0.6, M + offset, np.nan))
    assert model.rank_ == len(values)
    assert relative_error(model.reconstruct() - offset, M) < 1e-11


def test_noise_alone_has_no_rank() -> None:
    rng = np.random.default_rng(0)
    X = np.where(rng.random((60, 50)) < 0.5, rng.normal(size=(60, 50)), np.nan)
    with pytest.warns(ConvergenceWarning, match="tell no low rank"):
        model = DeepMatrixCompletion(random_state=0).fit(X)
    assert model.rank_ == 0
    np.testing.assert_allclose(model.reconstruct(), np.nanmean(X))
    np.testing.assert_allclose(model.transform(X[:2])[np.isnan(X[:2])], np.nanmean(X))
    assert model.transform(sparse_of(X[:2])).shape == (2, 50)


def test_few_iterations_are_said() -> None:
    _, X = planted(60, 50, 2, 0.5, 0)
    with pytest.warns(ConvergenceWarning, match="had not settled after 100 iterations"):
        DeepMatrixCompletion(5, solver="gd", max_iter=100, random_state=0).fit(X)


@pytest.mark.parametrize("X", [[[7.0]], [[np.nan, 7.0], [np.nan, np.nan]], [[7.0, 7.0], [7.0, np.nan]]])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_one_value_is_the_whole_matrix(X: list[list[float]], early_stopping: bool) -> None:
    model = DeepMatrixCompletion(early_stopping=early_stopping).fit(X)
    np.testing.assert_allclose(model.reconstruct(), np.full(np.shape(X), 7.0))
    assert model.rank_ == 0


def test_empty_rows_and_columns_are_filled_with_the_offset_and_said() -> None:
    M, X = planted(60, 50, 2, 0.6, 0)
    X[3], X[:, [7, 9]] = np.nan, np.nan
    with pytest.warns(ConvergenceWarning, match="3 rows or columns have no observed entry"):
        model = DeepMatrixCompletion(20, random_state=0).fit(X)
    with pytest.warns(ConvergenceWarning, match="3 rows or columns have no observed entry"):
        slow = DeepMatrixCompletion(5, solver="gd", max_iter=100, random_state=0).fit(X)
    assert np.ptp(slow.reconstruct()[3]) == 0
    found = model.reconstruct()
    np.testing.assert_allclose(found[3], model.offset_, atol=1e-6)
    np.testing.assert_allclose(found[:, 7], model.offset_, atol=1e-6)
    kept = np.ix_(np.delete(np.arange(60), 3), np.delete(np.arange(50), [7, 9]))
    assert relative_error(found[kept], M[kept]) < 1e-8


@pytest.mark.parametrize(
    ("X", "sentence"),
    [
        ([[np.nan, np.nan]], "`X` must hold at least one entry that is not missing; found 'none'"),
        ([[1.0, np.inf]], "contains infinity"),
        (([0, 0], [1, 1], [1.0, 2.0]), r"`X` must hold each entry once.*\(0, 1\)"),
        (([0, 1], [1], [1.0, 2.0]), "three equally long"),
        (([0.5], [1], [1.0]), "whole numbers"),
        (([-1], [1], [1.0]), "whole numbers"),
        (([], [], []), "whole numbers"),
        (([0], [0], [np.inf]), "contains infinity"),
        ([["a", "b"]], "could not convert string to float|dtype"),
        ([1.0, 2.0], "2D array"),
    ],
)
def test_bad_input_is_told_in_a_sentence(X: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DeepMatrixCompletion().fit(X)


@pytest.mark.parametrize("X", [np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4).astype(object)])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_whole_numbers_and_objects_are_read_as_numbers(X: np.ndarray) -> None:
    model = DeepMatrixCompletion()
    np.testing.assert_array_equal(model.fit_transform(X), X.astype(float))
    assert model.reconstruct().dtype == np.float64


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": 2.5},
        {"depth": 1},
        {"solver": "adam"},
        {"center": "yes"},
        {"init_scale": 0.0},
        {"learning_rate": -1.0},
        {"outer_lr_ratio": -1},
        {"max_iter": 0},
        {"tol": -1.0},
        {"validation_fraction": 1.0},
        {"n_iter_no_change": 0},
    ],
)
def test_a_bad_parameter_is_named(settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"`{name}` must"):
        DeepMatrixCompletion(**settings).fit([[1.0, np.nan], [2.0, 3.0]])  # type: ignore[arg-type]


def test_numpys_numbers_are_numbers() -> None:
    _, X = planted(30, 20, 1, 0.6, 0)
    fitted(X, np.int64(5), depth=np.int64(3), tol=np.float64(1e-8))  # type: ignore[arg-type]


def test_sparse_input_is_never_filled_whole() -> None:
    with pytest.raises(ValueError, match="fit, then entries"):
        DeepMatrixCompletion().fit_transform(sparse.coo_array(np.eye(3)))


def test_progress_is_printed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    _, X = planted(40, 30, 2, 0.6, 0)
    fitted(X, 10)
    assert capsys.readouterr().out == ""
    fitted(X, 10, verbose=True)
    told = capsys.readouterr().out
    assert "DeepMatrixCompletion: 5 iterations, relative error" in told
    assert "singular values fall most after the first 2" in told


def test_in_a_pipeline_and_the_same_seed_gives_the_same_bits() -> None:
    _, X = planted(40, 30, 2, 0.6, 0)
    one, two = (
        make_pipeline(DeepMatrixCompletion(10, random_state=3), StandardScaler()).fit_transform(X) for _ in "ab"
    )
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one.mean(0), 0, atol=1e-9)
    names = DeepMatrixCompletion(10).fit(X).get_feature_names_out()
    assert list(names[:2]) == ["x0", "x1"]
