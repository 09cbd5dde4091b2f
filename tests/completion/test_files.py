"""Matrices in files, and `rankwise complete`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import pytest
from scipy import sparse
from typer.testing import CliRunner

from planted import planted
from rankwise.cli.main import app
from rankwise.completion.files import complete_file, read_matrix
from rankwise.errors import DataError


@pytest.fixture
def matrix() -> tuple[np.ndarray, np.ndarray]:
    return planted(40, 30, 2, 0.6, 0)


def write(file: Path, X: np.ndarray) -> Path:
    if file.suffix == ".npy":
        np.save(file, X)
    elif file.suffix == ".npz":
        np.savez(file, anything=X)
    else:
        frame = pandas.DataFrame(X, columns=[f"c{j}" for j in range(X.shape[1])])
        frame.to_parquet(file) if file.suffix == ".parquet" else frame.to_csv(file, index=False)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy", ".npz"])
@pytest.mark.parametrize("into", [".csv", ".parquet", ".npy", ".npz"])
def test_every_kind_of_file_into_every_other(
    tmp_path: Path, matrix: tuple[np.ndarray, np.ndarray], suffix: str, into: str
) -> None:
    M, X = matrix
    out = tmp_path / f"filled{into}"
    report = complete_file(write(tmp_path / f"in{suffix}", X), out)
    np.testing.assert_allclose(read_matrix(out).values, M, atol=1e-6)
    assert report.rank == 2
    assert report.held_out_error < 1e-6
    assert report.constant_error > 0.5
    assert 1 < report.effective_rank <= 2
    assert report.observed == np.isfinite(X).sum()
    assert report.held_out == round(0.1 * report.observed)


def test_names_of_rows_and_columns_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "ratings.csv"
    file.write_text("who,film a,film b,film c\nann,1,2,3\nbob,2,,6\ncyd,3,6,9\ndon,4,8,\n")
    table = read_matrix(file)
    np.testing.assert_array_equal(table.values, [[1, 2, 3], [2, np.nan, 6], [3, 6, 9], [4, 8, np.nan]])
    complete_file(file, tmp_path / "out" / "filled.csv", rank=1)
    filled = pandas.read_csv(tmp_path / "out" / "filled.csv", index_col=0)
    assert list(filled.columns) == ["film a", "film b", "film c"]
    assert list(filled.index) == ["ann", "bob", "cyd", "don"]
    assert filled.loc["ann", "film b"] == 2


def test_numbers_as_names_are_guessed_by_an_empty_corner_or_told(tmp_path: Path) -> None:
    X = np.array([[1, 2, np.nan], [4, np.nan, 6]])
    file = tmp_path / "numbered.csv"
    pandas.DataFrame(X).to_csv(file)
    np.testing.assert_array_equal(read_matrix(file).values, X)
    file.write_text("user,1,2,3\n101,1,2,\n102,4,,6\n")
    assert read_matrix(file).values.shape == (2, 4)
    np.testing.assert_array_equal(read_matrix(file, row_names=True).values, X)
    assert read_matrix(file, row_names=True, column_names=True).values.shape == (2, 3)


def test_numbers_alone_have_no_names(tmp_path: Path) -> None:
    file = tmp_path / "plain.csv"
    file.write_text("1,2,NaN\n4,,6\n")
    np.testing.assert_array_equal(read_matrix(file).values, [[1, 2, np.nan], [4, np.nan, 6]])


def test_a_blank_line_is_a_row_of_which_nothing_is_known(tmp_path: Path) -> None:
    file = tmp_path / "one.csv"
    file.write_text("1\n\n3\n")
    np.testing.assert_array_equal(read_matrix(file).values, [[1], [np.nan], [3]])


def test_rows_numbered_in_a_parquet_file_keep_their_numbers(tmp_path: Path) -> None:
    X = np.outer([1.0, 2, 3, 4], [1, 2, 3])
    X[1, 2] = np.nan
    pandas.DataFrame(X, index=[7, 8, 9, 11], columns=list("abc")).to_parquet(tmp_path / "in.parquet")
    complete_file(tmp_path / "in.parquet", tmp_path / "out.parquet", rank=1)
    filled = pandas.read_parquet(tmp_path / "out.parquet")
    assert list(filled.index) == [7, 8, 9, 11]
    assert filled.loc[8, "c"] == pytest.approx(6, abs=1e-6)


def test_a_sparse_matrix_is_told_by_factors(tmp_path: Path, matrix: tuple[np.ndarray, np.ndarray]) -> None:
    M, X = matrix
    rows, columns = np.isfinite(X).nonzero()
    sparse.save_npz(tmp_path / "in.npz", sparse.csr_array((X[rows, columns], (rows, columns)), shape=X.shape))
    complete_file(tmp_path / "in.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose((found["B"] * found["s"]) @ found["A"] + found["offset"], M, atol=1e-6)
    with pytest.raises(ValueError, match=r"`out` must end in \.npz"):
        complete_file(tmp_path / "in.npz", tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"", "cannot be read as a matrix"),
        ("a.csv", b"x,y\n1,2\n3,four\n", "cannot be read as a matrix"),
        ("a.npy", b"no numpy", "cannot be read as a matrix"),
        ("a.npz", b"no zip", "cannot be read as a matrix"),
        ("a.parquet", b"no parquet", "cannot be read as a matrix"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as raised:
        complete_file(tmp_path / name, tmp_path / "out.csv")
    assert name in str(raised.value)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), dtype=complex), np.array([["a"]])])
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match="must hold a matrix of real numbers"):
        read_matrix(tmp_path / "a.npy")


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[object()]]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_matrix(tmp_path / "a.npy")


def test_the_command_tells_what_it_found(tmp_path: Path, matrix: tuple[np.ndarray, np.ndarray]) -> None:
    file, out = write(tmp_path / "in.csv", matrix[1]), tmp_path / "out.csv"
    done = CliRunner().invoke(app, ["complete", str(file), "--out", str(out), "--rank", "15"])
    assert done.exit_code == 0, done.output
    assert "40 by 30" in done.output
    assert "rank      2 (effective rank " in done.output
    assert out.exists()
    for arguments in (["--held-out", "1.5"], ["--rank", "0"], []):
        again = CliRunner().invoke(app, ["complete", str(file), "--out", str(out), *arguments])
        assert again.exit_code != 0
    assert CliRunner().invoke(app, ["complete", str(file), "--out", str(out), "--force"]).exit_code == 0


def test_what_cannot_be_is_said_before_anything_is_read(tmp_path: Path) -> None:
    for matrix, out, sentence in [
        ("a.txt", "b.csv", "`matrix` must end in one of"),
        ("a.csv", "b.txt", "`out` must end in one of"),
        ("a.csv", "a.csv", "`out` must be another file"),
        ("a.csv", "b.csv", "a.csv is not a file"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            complete_file(tmp_path / matrix, tmp_path / out)
