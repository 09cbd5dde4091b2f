"""Matrices with missing entries in files, and completing one."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning

from rankwise.checks import require_int, require_number
from rankwise.completion.deep_completion import DeepMatrixCompletion
from rankwise.errors import ArgumentError, DataError
from rankwise.files import write_bytes_whole
from rankwise.spectral.rank import effective_rank

SUFFIXES = (".csv", ".parquet", ".npy", ".npz")


class Table(NamedTuple):
    """A matrix with what names its rows and columns, where a file does."""

    values: Any
    """An array, or a scipy sparse matrix."""
    frame: pandas.DataFrame | None


class CompletionReport(NamedTuple):
    """What `complete_file` found."""

    out: Path
    shape: tuple[int, int]
    observed: int
    held_out: int
    held_out_error: float
    """‖X − M‖_F/‖M‖_F over held-out entries, of a fit without them."""
    constant_error: float
    """The same of the mean of the other entries."""
    rank: int
    effective_rank: float
    """The exponential of the entropy of the singular values: `rankwise.spectral.effective_rank`."""
    offset: float


def complete_file(
    matrix: Path,
    out: Path,
    *,
    rank: int | None = None,
    depth: int = 3,
    held_out: float = 0.1,
    seed: int = 0,
    verbose: bool = False,
    overwrite: bool = False,
    row_names: bool | None = None,
    column_names: bool | None = None,
) -> CompletionReport:
    """Complete the matrix of a file into another, and tell the error of entries held out of a first fit.

    The result is of the fit with all entries; a sparse matrix's is its factors B, s, A and the offset.

    Raises:
        ArgumentError: an argument that breaks its rule; an unknown suffix; `out` exists and is not to be replaced.
        DataError: a file that is missing or does not hold a matrix of numbers.
    """
    _require_paths(matrix, out, overwrite)
    require_number("held_out", held_out, least=1e-6, below=1.0)
    require_int("seed", seed, least=0)
    table = read_matrix(matrix, row_names=row_names, column_names=column_names)
    if sparse.issparse(table.values) and out.suffix != ".npz":
        raise ArgumentError("out", "end in .npz for a sparse matrix: its completion is told by factors", str(out))
    model = DeepMatrixCompletion(rank, depth=depth, random_state=seed, verbose=verbose)
    told = _held_out(model, table.values, held_out, seed)
    model.fit(table.values)
    _write(out, model, table)
    effective = float(effective_rank(model.factors_.s))
    return CompletionReport(out, table.values.shape, *told, model.rank_, effective, model.offset_)


class _Told(NamedTuple):
    """How many entries are observed and held out, and the relative errors of those by a fit and by a mean of others."""

    observed: int
    held_out: int
    held_out_error: float
    constant_error: float


def _held_out(model: DeepMatrixCompletion, X: Any, share: float, seed: int) -> _Told:
    rows, columns, values = _observed(X)
    if len(values) < 2:
        raise DataError(f"the matrix holds {len(values)} observed entries, of which none can be held out")
    if not np.isfinite(values).all():
        raise DataError("the matrix holds an infinity")
    order = np.random.default_rng(seed).permutation(len(values))
    held, rest = np.split(order, [min(max(1, round(share * len(values))), len(values) - 1)])
    if sparse.issparse(X):
        left = sparse.coo_array((values[rest], (rows[rest], columns[rest])), shape=X.shape)
    else:
        left = np.array(X, dtype=np.float64)
        left[rows[held], columns[held]] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the fit of all entries says the same again
        model.fit(left)
    size = float(np.linalg.norm(values[held])) or 1.0
    fitted, mean = model.entries(rows[held], columns[held]), values[rest].mean()
    fit_error, mean_error = (float(np.linalg.norm(told - values[held])) / size for told in (fitted, mean))
    return _Told(len(values), len(held), fit_error, mean_error)


def _observed(X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values of what is not missing."""
    if sparse.issparse(X):
        seen = ~np.isnan(X.data)
        return X.coords[0][seen], X.coords[1][seen], X.data[seen]
    rows, columns = np.nonzero(~np.isnan(X))
    return rows, columns, X[rows, columns].astype(np.float64)


def read_matrix(file: Path, *, row_names: bool | None = None, column_names: bool | None = None) -> Table:
    """The matrix of a .csv, .parquet, .npy or .npz file.

    A CSV's first line are names if it holds anything but numbers, and its first column, too; both are if the first cell
    of all is empty and the rest of them is not. `row_names` and `column_names` say it where that guess is wrong. An
    .npz holds a sparse matrix as `scipy.sparse.save_npz` writes it, or one array.

    Raises:
        DataError: a file that is missing or does not hold a matrix of numbers.
    """
    if not file.is_file():
        raise DataError(f"{file} is not a file")
    try:
        if file.suffix == ".npy":
            return Table(_matrix(np.load(file, allow_pickle=False), file), None)
        if file.suffix == ".npz":
            return Table(_from_npz(file), None)
        frame = pandas.read_parquet(file) if file.suffix == ".parquet" else _read_csv(file, row_names, column_names)
    except DataError:
        raise
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} cannot be read as a matrix: {error}") from error
    bad = [name for name, kind in frame.dtypes.items() if not pandas.api.types.is_numeric_dtype(kind)]
    if bad:
        raise DataError(f"{file} has a column that is not of numbers: {bad[0]!r}")
    return Table(frame.to_numpy(dtype=np.float64, na_value=np.nan), frame)


def _require_paths(matrix: Path, out: Path, overwrite: bool) -> None:
    for argument, path in {"matrix": matrix, "out": out}.items():
        if path.suffix not in SUFFIXES:
            raise ArgumentError(argument, f"end in one of {', '.join(SUFFIXES)}", str(path))
    if out.resolve() == matrix.resolve():
        raise ArgumentError("out", "be another file than the matrix's", str(out))
    if out.exists() and (not overwrite or not out.is_file()):
        raise ArgumentError(
            "out", "not exist yet, unless it is a file that may be replaced (--force, or overwrite=True)", str(out)
        )


def _matrix(array: np.ndarray, file: Path) -> np.ndarray:
    if array.ndim != 2 or array.dtype.kind not in "fiu":
        raise DataError(f"{file} must hold a matrix of real numbers; found shape {array.shape} of {array.dtype}")
    return array


def _from_npz(file: Path) -> Any:
    with np.load(file, allow_pickle=False) as held:
        names = list(held)
        if "format" not in names:
            if len(names) != 1:
                raise DataError(f"{file} must hold one array or a scipy sparse matrix; found {', '.join(names)}")
            return _matrix(held[names[0]], file)
    return sparse.coo_array(sparse.load_npz(file))


def _read_csv(file: Path, row_names: bool | None, column_names: bool | None) -> pandas.DataFrame:
    """A CSV file as numbers, its names taken off; None lets the file's own looks decide whether it has names."""
    frame = pandas.read_csv(file, header=None, dtype=str, skipinitialspace=True, skip_blank_lines=False)
    first_row, rest_of_first_column = frame.iloc[0], frame.iloc[1:, 0]

    # An empty corner between whole names means that rows and columns both have names, even where these are numbers.
    has_empty_corner = frame.shape > (1, 1) and pandas.isna(first_row.iloc[0])
    names_are_whole = not first_row[1:].isna().any() and not rest_of_first_column.isna().any()
    has_corner = has_empty_corner and names_are_whole
    if column_names is None:
        column_names = has_corner or _holds_words(first_row)
    if row_names is None:
        row_names = has_corner or _holds_words(rest_of_first_column)

    if column_names:
        names = ["" if pandas.isna(name) else str(name) for name in first_row]
        frame = frame.iloc[1:].set_axis(names, axis=1)
    if row_names:
        frame = frame.set_index(frame.columns[0])
    # Column by column and by place, since two columns may have the same name.
    columns = [pandas.Series(pandas.to_numeric(frame.iloc[:, j])) for j in range(frame.shape[1])]
    return pandas.concat(columns, axis=1)


def _holds_words(line: pandas.Series) -> bool:
    """Whether it holds anything but numbers and gaps."""
    return bool(pandas.Series(pandas.to_numeric(line.dropna(), errors="coerce")).isna().any())


def _write(out: Path, model: DeepMatrixCompletion, table: Table) -> None:
    buffer = io.BytesIO()
    if sparse.issparse(table.values):
        B, s, A = (part.numpy() for part in model.factors_)
        np.savez(buffer, B=B, s=s, A=A, offset=np.float64(model.offset_))
    else:
        filled = model.transform(table.values)
        if out.suffix == ".npy":
            np.save(buffer, filled)
        elif out.suffix == ".npz":
            np.savez(buffer, matrix=filled)
        else:
            _write_frame(buffer, out.suffix, filled, table.frame)
    write_bytes_whole(out, buffer.getvalue())


def _write_frame(buffer: io.BytesIO, suffix: str, filled: np.ndarray, like: pandas.DataFrame | None) -> None:
    """With the names that the matrix came with."""
    frame = pandas.DataFrame(filled)
    if like is not None:
        frame = frame.set_axis(like.columns, axis=1).set_axis(like.index)
    named_rows = not isinstance(frame.index, pandas.RangeIndex)
    named_columns = any(isinstance(name, str) for name in frame.columns)
    if suffix == ".parquet":
        frame.set_axis([str(name) for name in frame.columns], axis=1).to_parquet(buffer, index=named_rows)
    else:
        buffer.write(frame.to_csv(header=named_columns, index=named_rows).encode())
