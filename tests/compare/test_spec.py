"""The SPEC is read as it is documented, and every mistake in it is one sentence that names the key."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from rankwise.cli.spec import starting_spec
from rankwise.compare.spec import Budget, Entry, Training, parse_spec, read_spec, schema, spec_class
from rankwise.compare.tasks import TASKS
from rankwise.compare.tasks.classification import Classification, ClassificationData
from rankwise.compare.tasks.regression import Regression
from rankwise.compare.tasks.sequence import TextData
from rankwise.errors import ArgumentError

FULL = """
model   = "tiny"
output  = "runs/clinc"
seeds   = [0, 1, 2]
[data]
train      = "train.jsonl.gz"
test       = "test.jsonl.gz"
validation = "../validation.jsonl.gz"
text       = "text"
pair       = "other_text"
label      = "intent"
[task]
type           = "regression"
target_modules = ["query", "value"]
max_length     = 64
[training]
steps         = 300
batch_size    = 16
learning_rate = 1
head_learning_rate = 3e-2
warmup        = 0
[budget]
r = 4
[[method]]
name           = "nnm"
nuclear_weight = 1.0
learning_rate  = 5e-4
[[method]]
name = "lora"
"""
SMALL = {
    "model": "tiny",
    "output": "runs",
    "methods": ["lora"],
    "data": {"train": "a.csv", "test": "b.csv", "text": "t", "label": "l"},
    "training": {"epochs": 2},
}
DELETE = object()


def changed(path: str, value: object) -> dict[str, object]:
    """SMALL with one dotted key set, or deleted."""
    table = copy.deepcopy(SMALL)
    *sections, key = path.split(".")
    inner = table
    for section in sections:
        inner = inner.setdefault(section, {})
    if value is DELETE:
        del inner[key]
    else:
        inner[key] = value
    return table


def test_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(FULL)
    spec = read_spec(tmp_path / "spec.toml")
    assert (spec.model, spec.output, spec.seeds) == ("tiny", tmp_path / "runs/clinc", (0, 1, 2))
    assert spec.data == TextData(
        text="text",
        label="intent",
        train=tmp_path / "train.jsonl.gz",
        test=tmp_path / "test.jsonl.gz",
        validation=tmp_path / "../validation.jsonl.gz",
        pair="other_text",
    )
    assert spec.task == Regression(target_modules=("query", "value"), max_length=64)
    assert spec.training == Training(steps=300, batch_size=16, learning_rate=1.0, head_learning_rate=3e-2, warmup=0.0)
    assert spec.budget == Budget(r=4)
    first, second = spec.entries
    assert (first.name, first.fields, first.learning_rate) == ("nnm", {"nuclear_weight": 1.0}, 5e-4)
    assert (second.name, second.fields, second.learning_rate) == ("lora", {}, None)


def test_defaults(tmp_path: Path) -> None:
    spec = parse_spec(SMALL, tmp_path)
    assert spec.seeds == (0,)
    assert spec.entries == (Entry(name="lora"),)
    assert isinstance(spec.data, ClassificationData)
    assert spec.data.validation is spec.data.pair is spec.data.per_label is spec.data.dataset is None
    assert spec.task == Classification(target_modules="all-linear", max_length=128)
    assert (spec.training.steps, spec.training.epochs, spec.training.batch_size) == (None, 2.0, 32)
    assert (spec.training.learning_rate, spec.training.head_learning_rate, spec.training.warmup) == (None, 1e-2, 0.1)
    assert spec.budget == Budget(r=8)


def test_a_hub_data_set_replaces_the_files(tmp_path: Path) -> None:
    spec = parse_spec(changed("data", {"dataset": "some/set", "text": "t", "label": "l"}), tmp_path)
    assert (spec.data.dataset, spec.data.train, spec.data.test) == ("some/set", None, None)


def test_a_model_folder_beside_the_spec_is_found(tmp_path: Path) -> None:
    assert parse_spec(SMALL, tmp_path).model == "tiny"
    (tmp_path / "tiny").mkdir()
    assert parse_spec(SMALL, tmp_path).model == str(tmp_path / "tiny")


def test_the_same_method_with_other_fields_is_another_entry(tmp_path: Path) -> None:
    table = changed("methods", DELETE) | {"method": [{"name": "nnm", "nuclear_weight": w} for w in (0.1, 1.0)]}
    assert [entry.fields for entry in parse_spec(table, tmp_path).entries] == [
        {"nuclear_weight": 0.1},
        {"nuclear_weight": 1.0},
    ]


def test_to_dict_is_json_and_does_not_know_the_folder(tmp_path: Path) -> None:
    tables = []
    for name in ("one", "two"):
        (tmp_path / name / "tiny").mkdir(parents=True)
        (tmp_path / name / "spec.toml").write_text(FULL)
        tables.append(read_spec(tmp_path / name / "spec.toml").to_dict())
    assert tables[0] == tables[1] == json.loads(json.dumps(tables[0]))
    assert str(tmp_path) not in json.dumps(tables)
    assert tables[0]["model"] == "tiny"
    assert tables[0]["data"]["validation"] == "../validation.jsonl.gz"
    assert tables[0]["task"]["target_modules"] == ["query", "value"]
    assert tables[0]["methods"][0] == {"name": "nnm", "nuclear_weight": 1.0, "learning_rate": 5e-4}


def test_to_dict_tells_different_specs_apart(tmp_path: Path) -> None:
    spec = parse_spec(SMALL, tmp_path)
    assert spec.to_dict() != spec.model_copy(update={"budget": Budget(r=9)}).to_dict()
    assert spec.to_dict() == parse_spec(changed("training.epochs", 2.0), tmp_path).to_dict()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # unknown keys
        ("modle", "x", r"`modle` must be a known key \(the nearest names are model, .*\); found 'x'"),
        ("training.stesp", 3, r"`training.stesp` must be a known key \(the nearest names are steps, .*; found 3"),
        ("data.lable", "x", r"`data.lable` .*nearest names are label"),
        ("task.kind", "x", r"`task.kind` must be a known key"),
        ("budget.rank", 3, r"`budget.rank` must be a known key \(the nearest names are r\)"),
        # missing keys
        ("model", DELETE, r"`model` must be among the keys of the SPEC; found \['data', 'methods'"),
        ("output", DELETE, r"`output` must be among"),
        ("data", DELETE, r"`data.train` must be among"),
        ("data.train", DELETE, r"`data.train` must be among the keys of \[data\], or `data.dataset` in its place"),
        ("data.test", DELETE, r"`data.test` must be among the keys of \[data\]; found \['label', 'text', 'train'\]"),
        ("data.text", DELETE, r"`data.text` must be among"),
        ("data.label", DELETE, r"`data.label` must be among"),
        ("methods", DELETE, r"`methods` must be given, or \[\[method\]\] .* not both; found \[\]"),
        ("training", DELETE, r"`training.steps` must be given, or `training.epochs` .*; found \{\}"),
        # keys that exclude each other
        ("training.steps", 3, r"`training.steps` must .* not both; found \{'steps': 3, 'epochs': 2\}"),
        ("method", [{"name": "nnm"}], r"`methods` must .* not both; found \['methods', 'method'\]"),
        ("data.dataset", "some/set", r"`data.dataset` must stand alone.*; found 'some/set'"),
        # types
        ("model", 3, r"`model` must be a non-empty string; found 3"),
        ("output", "", r"`output` must be a non-empty string; found ''"),
        ("data", "x", r"`data` must be a table; found 'x'"),
        ("data.train", ["a.csv"], r"`data.train` must be a non-empty string"),
        ("data.pair", 1, r"`data.pair` must be a non-empty string"),
        ("methods", "lora", r"`methods` must be a non-empty list of method names; found 'lora'"),
        ("methods", [], r"`methods` must be a non-empty list"),
        ("methods", ["lora", 3], r"`methods` must be a non-empty list"),
        ("methods", ["lora", "lora"], r"`methods` must be distinct; found 'lora'"),
        ("task.type", "clasification", r"`task.type` must be one of classification, regression.*; found 'clasif"),
        ("task.type", ["regression"], r"`task.type` must be"),
        ("task.target_modules", [], r"`task.target_modules` must be a non-empty string or list of strings"),
        ("task.target_modules", ["q", ""], r"`task.target_modules` must be"),
        ("training.batch_size", True, r"`training.batch_size` must be an integer of at least 1; found True"),
        ("training.batch_size", 8.0, r"`training.batch_size` must be an integer"),
        ("training.learning_rate", True, r"`training.learning_rate` must be a finite number"),
        ("training.learning_rate", "1e-3", r"`training.learning_rate` must be a finite number"),
        ("budget.r", True, r"`budget.r` must be an integer"),
        # ranges
        ("training", {"steps": 0}, r"`training.steps` must be an integer of at least 1; found 0"),
        ("training.epochs", 0, r"`training.epochs` must be a finite number above 0"),
        ("training.batch_size", 0, r"`training.batch_size` must be an integer of at least 1"),
        ("training.learning_rate", 0.0, r"`training.learning_rate` must be a finite number above 0"),
        ("training.learning_rate", float("inf"), r"`training.learning_rate` must be .* found inf"),
        ("training.learning_rate", float("nan"), r"`training.learning_rate` must be .* found nan"),
        ("training.learning_rate", 10**400, r"`training.learning_rate` must be a finite number"),
        ("training.head_learning_rate", 0, r"`training.head_learning_rate` must be a finite number above 0; found 0"),
        ("training.warmup", 1, r"`training.warmup` must be a number from 0 up to, but not including, 1; found 1"),
        ("training.warmup", -0.1, r"`training.warmup` must be"),
        ("budget.r", 0, r"`budget.r` must be an integer of at least 1; found 0"),
        ("data.per_label", 0, r"`data.per_label` must be an integer of at least 1"),
        ("data.samples", 0, r"`data.samples` must be an integer of at least 1; found 0"),
        ("data", SMALL["data"] | {"samples": 4, "per_label": 2}, r"`data.per_label` must be left out where data.sampl"),
        ("training", {"steps": 1, "learning_rate": []}, r"`training.learning_rate` must be .* list of different ones"),
        ("training", {"steps": 1, "quantise": "2bit"}, r"`training.quantise` must be 4bit or 8bit; found '2bit'"),
        ("task.max_length", 1, r"`task.max_length` must be an integer of at least 2"),
        ("seeds", [], r"`seeds` must be a non-empty list of distinct integers"),
        ("seeds", 0, r"`seeds` must be"),
        ("seeds", [-1], r"`seeds` must be"),
        ("seeds", [1, 1], r"`seeds` must be"),
        ("seeds", [True], r"`seeds` must be"),
        ("seeds", [2**32], r"`seeds` must be"),
    ],
)
def test_mistakes(path: str, value: object, message: str, tmp_path: Path) -> None:
    parse_spec(SMALL, tmp_path)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        parse_spec(changed(path, value), tmp_path)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"name": "nnm"}, r"`method` must be written as \[\[method\]\] tables"),
        ([], r"`method` must be written as"),
        ([{"nuclear_weight": 1.0}], r"`method\[0\].name` must be among the keys of \[method\[0\]\]; found \['nuclear"),
        ([{"name": "nnm"}, {"name": 3}], r"`method\[1\].name` must be a non-empty string; found 3"),
        ([{"name": "nnm", "learning_rate": -1}], r"`method\[0\].learning_rate` must be a finite number above 0"),
        ([{"name": "nnm", "r": 4}] * 2, r"`methods` must be distinct; found 'nnm'"),
    ],
)
def test_mistakes_in_method_tables(tables: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        parse_spec(changed("methods", DELETE) | {"method": tables}, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"`spec` must be a file that can be read \(No such file or directory\); found '.*spec.toml'"),
        (b"model = = 1", r"`spec` must be valid TOML \(.*line 1.*\); found '.*spec.toml'"),
        (b"model = '\xff'", r"`spec` must be valid TOML"),
    ],
)
def test_files_that_are_no_spec(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "spec.toml").write_bytes(content)
    with pytest.raises(ArgumentError, match=f"^{message}") as raised:
        read_spec(tmp_path / "spec.toml")
    assert "\n" not in str(raised.value)


def test_reading_a_spec_imports_nothing_heavy() -> None:
    check = "import sys, rankwise.compare.spec; print([m for m in ('torch', 'datasets', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_measures_something(task: str) -> None:
    assert TASKS[task]().metrics


@pytest.mark.parametrize("task", TASKS)
def test_the_starting_spec_of_every_task_is_read(task: str, tmp_path: Path) -> None:
    """It lists every key, and uncommenting nothing leaves every default as it is."""
    text = starting_spec(task)
    spec = parse_spec(tomllib.loads(text), tmp_path)
    assert spec.task == TASKS[task]()
    assert spec.training == Training(steps=300)
    kind = spec_class(task)
    for name in ("data", "task", "training", "budget"):
        for key, field in kind.model_fields[name].annotation.model_fields.items():  # type: ignore[union-attr]
            assert re.search(rf"^(# )?{key} =", text, re.MULTILINE), key
            assert field.description or key == "type", f"{name}.{key} says what it means"
    assert max(map(len, text.splitlines())) <= 110


def test_the_schema_that_ships_is_the_present_one() -> None:
    shipped = Path(str(files("rankwise"))) / "data" / "spec.schema.json"
    assert json.loads(shipped.read_text()) == schema(), "rankwise spec --schema > src/rankwise/data/spec.schema.json"


def test_the_schema_knows_the_specs_of_this_project() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    root = Path(__file__).parents[2]
    for file in (root / "src/rankwise/data/demo.toml", *sorted((root / "examples").glob("*.toml"))):
        validator.validate(tomllib.loads(file.read_text()))
        assert read_spec(file).entries
    wrong = tomllib.loads((root / "examples/clinc150.toml").read_text()) | {"modle": "x"}
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_spec_travels_to_another_process(name: str, tmp_path: Path) -> None:
    """It is pickled for the processes that Ray starts, and means there what it means here."""
    spec = parse_spec(tomllib.loads(starting_spec(name)), tmp_path).with_output(tmp_path / "elsewhere")
    copied = pickle.loads(pickle.dumps(spec))
    assert type(copied) is spec_class(name)
    assert copied == spec
    assert copied.to_dict() == spec.to_dict()
