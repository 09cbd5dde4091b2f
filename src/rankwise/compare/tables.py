"""Reading the tables of a SPEC: files of one layout, or a data set of the hub.

Every mistake is found here, before a model is loaded, and told in one sentence that names the file.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils import logging as datasets_logging

from rankwise.compare.tasks import Data
from rankwise.errors import DataError, nearest

# The builders themselves: `load_dataset("csv", ...)` would report each use of a local file over the network.
_BUILDERS = {".jsonl": Json, ".jsonl.gz": Json, ".csv": Csv, ".csv.gz": Csv, ".parquet": Parquet}


@dataclass(frozen=True)
class Table:
    """One split as it was read."""

    source: str
    """What errors call it."""
    rows: datasets.Dataset
    folder: Path | None = None
    """Where its file lies; None for a data set of the hub."""

    def values(self, key: str, name: str) -> list[Any]:
        """The values of the column that `data.<key>` names, none of them null.

        Raises:
            DataError: there is no such column, or a value is missing.
        """
        columns = self.rows.column_names
        if name not in columns:
            raise DataError(
                f"{self.source} has no column {name!r}, as `data.{key}` asks: {nearest(name, columns)}, "
                f"its columns are {', '.join(columns)}"
            )
        values = list(self.rows[name][:])  # one slice: row by row takes a thousand times as long
        if None in values:
            raise DataError(f"{self.source} has no value in column {name!r} of row {values.index(None) + 1}")
        return values

    def texts(self, key: str, name: str) -> list[str]:
        """The values of a column of strings.

        Raises:
            DataError: there is no such column, or a value is missing or is no string.
        """
        values = self.values(key, name)
        for value in values:
            if not isinstance(value, str):
                raise DataError(f"{self.source} has values that are not strings in column {name!r}: {value!r}")
        return values


def read_tables(data: Data) -> dict[str, Table]:
    """The splits that `data` names; train and test are always among them.

    An empty field of a CSV file is a missing value.

    Raises:
        DataError: a file or data set is missing, broken, empty, or in no known format.
    """
    if data.dataset is not None:
        return {split: _table(rows, f"{data.dataset} ({split})") for split, rows in _hub(data.dataset).items()}
    files = {"train": data.train, "test": data.test, "validation": data.validation}
    columns = list(data.columns.values())
    return {split: read_table(path, columns) for split, path in files.items() if path is not None}


def read_table(path: Path, columns: list[str]) -> Table:
    """A file as a table.

    Args:
        path: a .jsonl, .csv or .parquet file, also .gz.
        columns: which of its columns a CSV file shall keep as text, whatever stands in them.

    Raises:
        DataError: the file is missing, broken, empty, or in no known format.
    """
    return _table(_file(path, columns), str(path), path.parent)


def _table(rows: datasets.Dataset, source: str, folder: Path | None = None) -> Table:
    if len(rows) == 0:
        raise DataError(f"{source} holds no rows")
    return Table(source, rows, folder)


def _hub(name: str) -> dict[str, datasets.Dataset]:
    with _quiet(), _one_sentence(f"the data set {name}"):
        found = datasets.load_dataset(name)
    for split in ("train", "test"):
        if split not in found:
            raise DataError(f"the data set {name} has no split {split!r}; its splits are {', '.join(map(str, found))}")
    return {split: found[split] for split in ("train", "test", "validation") if split in found}


def _file(path: Path, columns: list[str]) -> datasets.Dataset:
    if not path.is_file():
        raise DataError(f"{path} is missing, or is not a file")
    kind = _builder(path)
    with _quiet(), _one_sentence(str(path)):
        table = _load(kind, path, _csv_options(columns) if kind is Csv else {})
    if table is None:
        raise DataError(f"{path} holds no rows")
    if kind is Csv and "__index_level_0__" in table.column_names:  # pandas shifted the columns to fit
        raise DataError(f"{path} has rows with more fields than its header names")
    return table


def _csv_options(columns: list[str]) -> dict[str, Any]:
    """Read columns as text, whatever their first rows look like: "NA" is a word, "01" a label and "12" a message."""
    return {"converters": dict.fromkeys(columns, str), "keep_default_na": False, "na_values": [""]}


def _load(kind: type[datasets.ArrowBasedBuilder], path: Path, options: dict[str, Any]) -> datasets.Dataset | None:
    """The file as a table in memory, its cache thrown away; None where it has no rows."""
    name = glob.escape(str(path.absolute()))
    with tempfile.TemporaryDirectory() as cache:
        builder = kind(data_files=name, cache_dir=cache, **options)
        try:
            builder.download_and_prepare()
        except StopIteration:  # of the JSON reader, which finds no first row
            return None
        if not builder.info.splits or not builder.info.splits["train"].num_examples:
            return None
        return builder.as_dataset("train", in_memory=True)  # pyright: ignore[reportReturnType] # a split's name was given


def _builder(path: Path) -> type[datasets.ArrowBasedBuilder]:
    for suffix, kind in _BUILDERS.items():
        if path.name.lower().endswith(suffix):
            return kind
    raise DataError(f"{path} is in no known format: its name must end in one of {', '.join(_BUILDERS)}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of the reader's: what it has to say, our own error says."""
    bars_were_off, verbosity = datasets.are_progress_bars_disabled(), datasets_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        if not bars_were_off:
            datasets.enable_progress_bars()


@contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Tell whatever a reader raises, of pandas, Arrow, gzip or the network, by the first line of its root cause."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
        raise DataError(f"{source} cannot be read: {reason}") from error
