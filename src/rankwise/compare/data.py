"""The examples of a SPEC: read, checked, split and numbered, as plain lists.

Every mistake is found here, before a model is loaded, and told in one sentence that names the file.
"""

from __future__ import annotations

import glob
import math
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.utils import logging as datasets_logging
from sklearn.model_selection import train_test_split

from rankwise.compare.spec import DataSpec, TaskSpec
from rankwise.errors import ArgumentError, DataError, nearest

# the builders themselves: `load_dataset("csv", ...)` would report each use of a local file over the network
_BUILDERS = {".jsonl": Json, ".jsonl.gz": Json, ".csv": Csv, ".csv.gz": Csv, ".parquet": Parquet}
_VALIDATION_PART = 0.1
_SEED = 0  # splits are a property of the data: the same for every method and every seed of a comparison


@dataclass(frozen=True)
class Table:
    """One split: a target for every text, an index into the labels or a number."""

    text: list[str]
    pair: list[str] | None
    target: list[int] | list[float]


@dataclass(frozen=True)
class Splits:
    """The three splits, and the label names that targets index; None in regression."""

    train: Table
    validation: Table
    test: Table
    labels: list[str] | None


@dataclass(frozen=True)
class _Rows:
    """A split before its labels are numbered; `source` is what errors call it."""

    source: str
    text: list[str]
    pair: list[str] | None
    label: list[Any]

    def take(self, rows: Iterable[int]) -> _Rows:
        rows = sorted(rows)
        pair = None if self.pair is None else [self.pair[i] for i in rows]
        return _Rows(self.source, [self.text[i] for i in rows], pair, [self.label[i] for i in rows])


def load_splits(data: DataSpec, task: TaskSpec) -> Splits:
    """Read the splits that `data` names, and check them for `task`.

    Without a validation split, a tenth of train becomes it, drawn with a fixed seed, and in classification label by
    label: at least one of every label that has two. `per_label` then keeps that many training examples of each label
    (all, where there are fewer), also drawn with a fixed seed: it counts what is trained on, and nothing else.

    An empty field of a CSV file is a missing value; a validation or test split may lack labels that train has.
    """
    if task.type == "regression" and data.per_label is not None:
        raise ArgumentError("data.per_label", "be left out in regression", data.per_label)
    rows = {split: _typed(raw, task) for split, raw in _read(data).items()}
    if task.type == "classification":
        _check_labels(rows)
    if "validation" not in rows:
        rows["train"], rows["validation"] = _split(rows["train"], task)
    if data.per_label is not None:
        rows["train"] = rows["train"].take(_few(rows["train"].label, data.per_label))
    labels = _sorted_labels(rows["train"].label) if task.type == "classification" else None
    return Splits(**{split: _table(part, labels) for split, part in rows.items()}, labels=labels)


def _read(data: DataSpec) -> dict[str, _Rows]:
    """The given splits, from files or from the hub; train and test are always among them."""
    if data.dataset is not None:
        return {split: _rows(part, f"{data.dataset} ({split})", data) for split, part in _hub(data.dataset).items()}
    files = {"train": data.train, "test": data.test, "validation": data.validation}
    return {split: _rows(_file(path, data), str(path), data) for split, path in files.items() if path is not None}


def _hub(name: str) -> dict[str, datasets.Dataset]:
    with _quiet(), _one_sentence(f"the data set {name}"):
        found = datasets.load_dataset(name)
    for split in ("train", "test"):
        if split not in found:
            raise DataError(f"the data set {name} has no split {split!r}; its splits are {', '.join(map(str, found))}")
    return {split: found[split] for split in ("train", "test", "validation") if split in found}


def _file(path: Path, data: DataSpec) -> datasets.Dataset:
    if not path.is_file():
        raise DataError(f"{path} is missing, or is not a file")
    kind = _builder(path)
    columns = [name for name in (data.text, data.pair, data.label) if name is not None]
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


def _rows(table: datasets.Dataset, source: str, data: DataSpec) -> _Rows:
    if len(table) == 0:
        raise DataError(f"{source} holds no rows")
    pair = None if data.pair is None else _texts(table, source, "pair", data.pair)
    label = _column(table, source, "label", data.label)
    return _Rows(source, _texts(table, source, "text", data.text), pair, label)


def _column(table: datasets.Dataset, source: str, key: str, name: str) -> list[Any]:
    """The values of the column that `data.<key>` names, none of them null."""
    columns = table.column_names
    if name not in columns:
        raise DataError(
            f"{source} has no column {name!r}, as `data.{key}` asks: {nearest(name, columns)}, "
            f"its columns are {', '.join(columns)}"
        )
    values = list(table[name][:])  # one slice: row by row takes a thousand times as long
    if None in values:
        raise DataError(f"{source} has no value in column {name!r} of row {values.index(None) + 1}")
    return values


def _texts(table: datasets.Dataset, source: str, key: str, name: str) -> list[str]:
    values = _column(table, source, key, name)
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{source} has values that are not strings in column {name!r}: {value!r}")
    return values


def _typed(rows: _Rows, task: TaskSpec) -> _Rows:
    """The same rows with labels as names, or as finite numbers in regression."""
    read = _number if task.type == "regression" else _name
    label = [read(value, rows.source, row) for row, value in enumerate(rows.label, start=1)]
    return _Rows(rows.source, rows.text, rows.pair, label)


def _name(value: object, source: str, row: int) -> str:
    if not isinstance(value, str | int) or value == "":
        raise DataError(f"{source} has a label in row {row} that is neither an integer nor a name: {value!r}")
    return str(value)


def _number(value: Any, source: str, row: int) -> float:
    """A target as a float; CSV files hold theirs as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{source} has a target in row {row} that is not a finite number: {value!r}")
    return number


def _check_labels(rows: dict[str, _Rows]) -> None:
    seen = set(rows["train"].label)
    if len(seen) < 2:
        raise DataError(f"{rows['train'].source} has the single label {seen.pop()!r}: classification needs two")
    for part in rows.values():
        for label in part.label:
            if label not in seen:
                raise DataError(f"{part.source} has the label {label!r}, which {rows['train'].source} never shows")


def _sorted_labels(labels: Iterable[str]) -> list[str]:
    """The distinct names in order, which is that of the numbers where all of them are integers."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(re.fullmatch("-?[0-9]+", name) for name in names) else names


def _by_label(labels: Sequence[str], order: Iterable[int]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for row in order:
        groups[labels[row]].append(row)
    return groups


def _few(labels: Sequence[str], per_label: int) -> list[int]:
    order = list(range(len(labels)))
    random.Random(_SEED).shuffle(order)
    return [row for group in _by_label(labels, order).values() for row in group[:per_label]]


def _split(train: _Rows, task: TaskSpec) -> tuple[_Rows, _Rows]:
    """Train without its validation part, and that part."""
    every = range(len(train.label))
    groups = [list(every)] if task.type == "regression" else list(_by_label(train.label, every).values())
    aside = {row for group in groups if len(group) > 1 for row in _aside(group)}
    if not aside:
        raise DataError(f"{train.source} has too few rows to set some aside: give `data.validation`")
    return train.take(set(every) - aside), train.take(aside)


def _aside(group: list[int]) -> list[int]:
    size = max(1, round(_VALIDATION_PART * len(group)))
    return list(train_test_split(group, test_size=size, random_state=_SEED)[1])


def _table(rows: _Rows, labels: list[str] | None) -> Table:
    if labels is None:
        return Table(rows.text, rows.pair, rows.label)
    index = {name: i for i, name in enumerate(labels)}
    return Table(rows.text, rows.pair, [index[name] for name in rows.label])
