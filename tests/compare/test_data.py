"""Data files are read alike in every format, split the same way every time, and refused with one sentence."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from rankwise.compare.data import draw, load_splits
from rankwise.compare.tasks import Data, Examples, Splits, Task
from rankwise.compare.tasks.classification import Classification, ClassificationData
from rankwise.compare.tasks.regression import Regression
from rankwise.errors import ArgumentError, DataError

Row = dict[str, Any]
FORMATS = ("jsonl", "jsonl.gz", "csv", "csv.gz", "parquet")
CLASSIFICATION, REGRESSION = Classification(), Regression()


def describe(splits: Splits) -> dict[str, int]:
    """How many examples each split has, and how many labels there are."""
    counts = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
    return counts if splits.labels is None else counts | {"labels": len(splits.labels)}


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows in the format that the path's suffixes name."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
        return path
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "wt", newline="") as file:
        if ".csv" in path.suffixes:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def examples(labels: Sequence[object]) -> list[Row]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def files(
    folder: Path, train: Sequence[Row], test: Sequence[Row], kind: str = "jsonl", **fields: object
) -> ClassificationData:
    """The [data] section over freshly written train and test files."""
    paths = {name: write(folder / f"{name}.{kind}", rows) for name, rows in (("train", train), ("test", test))}
    return ClassificationData(**{"text": "text", "label": "label", **paths, **fields})


def numbers(splits: Splits, examples: Examples) -> list[int]:
    """What the model is trained to give."""
    return CLASSIFICATION.targets(examples, splits)


def changed(data: ClassificationData, **fields: object) -> ClassificationData:
    """The same section with other files."""
    return data.model_copy(update=fields)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_reads_alike(kind: str, tmp_path: Path) -> None:
    train = [
        {"text": 'one, "quoted"', "other": "a\nb", "label": "yes"},
        {"text": "NA", "other": "null", "label": "no"},  # words, to a reader that does not guess
        {"text": "123", "other": "naïve", "label": "None"},
    ]
    data = files(tmp_path, train, train[:2], kind, pair="other", validation=write(tmp_path / f"v.{kind}", train[2:]))
    splits = load_splits(data, CLASSIFICATION)
    assert splits.labels == ["None", "no", "yes"]
    texts, pairs, labels = ['one, "quoted"', "NA", "123"], ["a\nb", "null", "naïve"], ["yes", "no", "None"]
    assert splits.train.columns == {"text": texts, "pair": pairs, "label": labels}
    assert splits.test.columns == {"text": texts[:2], "pair": pairs[:2], "label": labels[:2]}
    assert splits.validation.columns == {"text": texts[2:], "pair": pairs[2:], "label": labels[2:]}
    assert numbers(splits, splits.train) == [2, 1, 0]


@pytest.mark.parametrize("kind", FORMATS)
def test_regression_with_pairs(kind: str, tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "other": f"o{i}", "label": i} for i in range(19)] + [
        {"text": "t", "other": "o", "label": -2.5}
    ]
    if kind == "parquet":  # a typed format
        rows = [row | {"label": float(row["label"])} for row in rows]
    splits = load_splits(files(tmp_path, rows, rows, kind, pair="other"), REGRESSION)
    assert splits.labels is None
    assert splits.test["label"] == [*map(float, range(19)), -2.5]
    assert all(type(target) is float for target in splits.test["label"])
    assert splits.test["pair"] == [*(f"o{i}" for i in range(19)), "o"]
    assert describe(splits) == {"train": 18, "validation": 2, "test": 20}
    assert sorted(splits.train["text"] + splits.validation["text"]) == sorted(splits.test["text"])


def test_integer_labels_sort_as_numbers(tmp_path: Path) -> None:
    rows = examples([10, 9, -1, 10, 9, -1])
    for kind in ("jsonl", "csv"):
        splits = load_splits(files(tmp_path, rows, rows, kind), CLASSIFICATION)
        assert splits.labels == ["-1", "9", "10"]
        assert numbers(splits, splits.test) == [2, 1, 0, 2, 1, 0]


def test_labels_of_csv_keep_their_zeros(tmp_path: Path) -> None:
    splits = load_splits(files(tmp_path, examples(["01", "02"] * 2), examples(["02"]), "csv"), CLASSIFICATION)
    assert splits.labels == ["01", "02"]


def test_validation_is_a_stratified_tenth_of_train(tmp_path: Path) -> None:
    labels = ["common"] * 100 + ["rare"] * 2 + ["single"]
    splits = load_splits(files(tmp_path, examples(labels), examples(["common"])), CLASSIFICATION)
    assert Counter(splits.validation["label"]) == {"common": 10, "rare": 1}
    assert Counter(splits.train["label"]) == {"common": 90, "rare": 1, "single": 1}
    assert not set(splits.train["text"]) & set(splits.validation["text"])
    assert splits.validation["text"] != [f"text {i}" for i in range(10)] + ["text 100"]  # drawn, not the first
    assert describe(splits) == {"train": 92, "validation": 11, "test": 1, "labels": 3}


def test_per_label_counts_what_is_trained_on(tmp_path: Path) -> None:
    data = files(tmp_path, examples(["a", "b", "b"] * 30 + ["c", "c"]), examples(["a"]), per_label=20)
    splits = load_splits(data, CLASSIFICATION)
    assert Counter(splits.train["label"]) == {"a": 20, "b": 20, "c": 1}
    assert Counter(splits.validation["label"]) == {"a": 3, "b": 6, "c": 1}


def test_per_label_leaves_a_given_validation_alone(tmp_path: Path) -> None:
    given = write(tmp_path / "validation.csv", examples(["a", "b"] * 8))
    data = files(tmp_path, examples(["a", "b"] * 30), examples(["a"]), per_label=5, validation=given)
    splits = load_splits(data, CLASSIFICATION)
    assert Counter(splits.train["label"]) == {"a": 5, "b": 5}
    assert len(splits.validation["text"]) == 16
    assert splits.train["text"] != [f"text {i}" for i in range(10)]  # drawn, not the first


def test_splits_are_the_same_every_time_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    data = files(tmp_path, examples(["a", "b", "c"] * 30), examples(["a"]), per_label=12)
    first = load_splits(data, CLASSIFICATION)
    assert first == load_splits(data, CLASSIFICATION)
    for part in (first.train, first.validation):
        places = [int(text.split()[1]) for text in part["text"]]
        assert places == sorted(places)
        assert [place % 3 for place in places] == numbers(first, part)  # rows stay together


def test_paths_with_glob_characters_and_hidden_folders(tmp_path: Path) -> None:
    folder = tmp_path / ".runs [1] *"
    folder.mkdir()
    splits = load_splits(files(folder, examples(["a", "b"] * 2), examples(["a"])), CLASSIFICATION)
    assert splits.test["text"] == ["text 0"]


def test_reading_is_silent_and_leaves_the_settings_of_datasets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = files(tmp_path, examples(["a", "b"] * 2), examples(["a"]))
    broken = write(tmp_path / "broken.csv", examples(["a"]))
    broken.write_text("text,label\na,b\na,b,c\n")
    datasets.enable_progress_bars()
    verbosity = datasets.utils.logging.get_verbosity()
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        load_splits(data, CLASSIFICATION)
        with pytest.raises(DataError):
            load_splits(changed(data, train=broken, test=broken), CLASSIFICATION)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("datasets")]
    assert not datasets.are_progress_bars_disabled()
    assert datasets.utils.logging.get_verbosity() == verbosity


GOOD = examples(["a", "b"] * 2)


@pytest.mark.parametrize("split", ["train", "test", "validation"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "is missing, or is not a file"),
        ("data.txt", b"x", r"is in no known format: its name must end in one of \.jsonl, "),
        ("data.parquet.gz", b"x", "is in no known format"),
        ("data.jsonl", b"", "holds no rows"),
        ("data.jsonl", b"\n\n", "holds no rows"),
        ("data.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("data.csv", b"", "cannot be read: No columns to parse from file"),
        ("data.csv", b"text,label\n", "holds no rows"),
        ("data.jsonl", b'{"text": "a", "label"', "cannot be read: JSON parse error"),
        ("data.csv", b"text,label\na,b\na,b,c\n", "cannot be read: .*Expected 2 fields in line 3, saw 3"),
        ("data.csv", b"text,label\na,b,c\na,b,d\n", "has rows with more fields than its header names"),
        ("data.csv", b"text,label\n\xff,b\n", "cannot be read: 'utf-8' codec"),
        ("data.parquet", b"PAR1 and no more", "cannot be read: .*[Pp]arquet"),
        ("data.jsonl.gz", gzip.compress(bytes(range(256)) * 9, mtime=0)[:-20], "cannot be read: Compressed file ended"),
        ("data.csv.gz", b"text,label\na,b\n", "cannot be read: Not a gzipped file"),
        ("data.csv", b"txt,label\na,b\n", r"has no column 'text', as `data.text` asks: .* txt, .* are txt, label$"),
        ("data.csv", b"text,lable\na,b\n", r"has no column 'label', as `data.label` asks: .* lable, "),
        ("data.csv", b"text,label\na,b\n,b\n", "has no value in column 'text' of row 2"),
        ("data.csv", b"text,label\na,b\nb\n", "has no value in column 'label' of row 2"),
        ("data.jsonl", b'{"text": null, "label": "a"}', "has no value in column 'text' of row 1"),
        ("data.jsonl", b'{"text": "a", "label": 1}\n{"text": "a"}', "has no value in column 'label' of row 2"),
        ("data.jsonl", b'{"text": 7, "label": "a"}', "has values that are not strings in column 'text': 7"),
        ("data.jsonl", b'{"text": "a", "label": 1.5}', "has a label in row 1 that is neither an .* name: 1.5"),
        ("data.jsonl", b'{"text": "a", "label": ""}', "has a label in row 1 that is neither .*: ''"),
    ],
)
def test_files_that_cannot_be_used(split: str, name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {message}") as raised:
        load_splits(changed(files(tmp_path, GOOD, GOOD), **{split: path}), CLASSIFICATION)
    assert "\n" not in str(raised.value)


def test_pair_columns_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl has no column 'others', as `data.pair` asks"):
        load_splits(files(tmp_path, GOOD, GOOD, pair="others"), CLASSIFICATION)
    rows = [row | {"other": None if i == 2 else "x"} for i, row in enumerate(GOOD)]
    with pytest.raises(DataError, match=r"train.jsonl has no value in column 'other' of row 3"):
        load_splits(files(tmp_path, rows, rows, pair="other"), CLASSIFICATION)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_labels_that_training_never_saw(split: str, tmp_path: Path) -> None:
    path = write(tmp_path / "odd.csv", examples(["a", "zebra"]))
    with pytest.raises(DataError, match=r"odd.csv has the label 'zebra', which .*train.jsonl never shows"):
        load_splits(changed(files(tmp_path, GOOD, GOOD), **{split: path}), CLASSIFICATION)


def test_a_single_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.jsonl has the single label 'a': classification needs two"):
        load_splits(files(tmp_path, examples(["a", "a"]), GOOD), CLASSIFICATION)


@pytest.mark.parametrize(("train", "task"), [(["a", "b", "c"], CLASSIFICATION), ([1.0], REGRESSION)])
def test_too_few_rows_to_validate_on(train: list[object], task: Task, tmp_path: Path) -> None:
    rows = examples(train)
    with pytest.raises(DataError, match=r"train.jsonl has too few rows .*give `data.validation`"):
        load_splits(files(tmp_path, rows, rows), task)
    given = write(tmp_path / "validation.jsonl", rows)
    assert describe(load_splits(files(tmp_path, rows, rows, validation=given), task))["train"] == len(rows)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        (b'{"text": "a", "label": 1}\n{"text": "a", "label": NaN}', "2 .*: nan"),
        (b'{"text": "a", "label": -Infinity}', "1 .*: -inf"),
        (b'{"text": "a", "label": "high"}', "1 .*: 'high'"),
        (b'{"text": "a", "label": true}', "1 .*: True"),
        (b'{"text": "a", "label": [1]}', r"1 .*: \[1\]"),
    ],
)
def test_regression_targets_that_are_no_finite_numbers(content: bytes, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"odd.jsonl has a target in row {seen}$"):
        load_splits(changed(files(tmp_path, examples([1, 2]), GOOD), test=path), REGRESSION)


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[Row]]) -> Data:
    """A stand-in for the hub, which tests do not reach."""
    found = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"some/set": found}[name])
    return ClassificationData(text="text", label="label", dataset="some/set")


def test_a_hub_data_set_by_the_names_of_its_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    data = hub(monkeypatch, {"test": GOOD[:1], "train": GOOD, "validation": GOOD[:3], "unsupervised": []})
    assert describe(load_splits(data, CLASSIFICATION)) == {"train": 4, "validation": 3, "test": 1, "labels": 2}


def test_a_hub_data_set_without_a_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = hub(monkeypatch, {"train": GOOD, "dev": GOOD})
    with pytest.raises(DataError, match=r"data set some/set has no split 'test'; its splits are train, dev"):
        load_splits(data, CLASSIFICATION)


def test_a_hub_data_set_with_an_empty_split(monkeypatch: pytest.MonkeyPatch) -> None:
    data = hub(monkeypatch, {"train": [], "test": GOOD})
    with pytest.raises(DataError, match=r"^some/set \(train\) holds no rows$"):
        load_splits(data, CLASSIFICATION)


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    data = files(tmp_path, GOOD, GOOD)
    path = tmp_path / "empty.parquet"
    datasets.Dataset.from_list(GOOD).select([]).to_parquet(path)
    with pytest.raises(DataError, match=r"empty.parquet holds no rows$"):
        load_splits(changed(data, test=path), CLASSIFICATION)


def test_a_hub_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError(f"no route to {name}\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"^the data set some/set cannot be read: no route to some/set$"):
        load_splits(ClassificationData(text="text", label="label", dataset="some/set"), CLASSIFICATION)


def test_files_are_read_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: object, **kwargs: object) -> None:
        called.append(args)
        raise OSError("no network")

    called: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", reached)
    for kind in FORMATS:
        load_splits(files(tmp_path, GOOD, GOOD, kind), CLASSIFICATION)
    assert called == []


# --- a draw for each seed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "counts"),
    [
        (3, {"a": 1, "b": 1, "c": 1}),
        (10, {"a": 6, "b": 3, "c": 1}),
        (99, {"a": 59, "b": 30, "c": 10}),
        (100, {"a": 60, "b": 30, "c": 10}),
    ],
)
def test_each_label_gets_its_share_of_the_draw(samples: int, counts: dict[str, int], tmp_path: Path) -> None:
    rows = examples(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
    splits = load_splits(files(tmp_path, rows, rows, validation=write(tmp_path / "v.jsonl", rows)), CLASSIFICATION)
    drawn = draw(splits, CLASSIFICATION, samples, seed=0)
    assert Counter(drawn.train["label"]) == counts
    assert set(drawn.train["text"]) <= set(splits.train["text"])
    assert len(set(drawn.train["text"])) == samples
    assert (drawn.validation, drawn.test, drawn.labels) == (splits.validation, splits.test, splits.labels)


def test_another_seed_draws_other_examples(tmp_path: Path) -> None:
    splits = load_splits(files(tmp_path, examples(range(100)), examples([1])), REGRESSION)
    texts = [draw(splits, REGRESSION, 20, seed).train["text"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == len(set(texts[2])) == 20
    assert draw(splits, REGRESSION, None, 0) is splits


@pytest.mark.parametrize(
    ("task", "samples", "message"),
    [
        (CLASSIFICATION, 1, r"^`data.samples` must be from 2, one for each label, to 18, the training ex.*; found 1$"),
        (CLASSIFICATION, 19, r"^`data.samples` must be from 2, one for each label, to 18, .*train.jsonl; found 19$"),
        (REGRESSION, 19, r"^`data.samples` must be at most 18, the training examples of .*train.jsonl; found 19$"),
    ],
)
def test_draws_that_cannot_be_made(task: Task, samples: int, message: str, tmp_path: Path) -> None:
    rows = examples([0, 1] * 10)
    with pytest.raises(ArgumentError, match=message):
        load_splits(files(tmp_path, rows, rows, samples=samples), task)
