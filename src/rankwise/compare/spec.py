"""The SPEC: the TOML file that says what to train, on what data, and for how long.

Reading it costs no time: nothing heavy is imported, and every mistake is one sentence that names the key as
`section.key`, the rule and the value. Whether a method exists and has the fields given is for the caller to check.
"""

from __future__ import annotations

import dataclasses
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rankwise.errors import ArgumentError, nearest

_MAX_SEED = 2**32 - 1  # what numpy's generator, which trainers seed too, accepts
HEAD = "head"
"""The method that trains the task head alone, on the frozen model: the floor of a comparison."""

T = TypeVar("T")
D = TypeVar("D")


@dataclass(frozen=True)
class DataSpec:
    """Where the examples are: files of one layout, or a hub data set in their place."""

    text: str
    label: str
    train: Path | None = None
    test: Path | None = None
    validation: Path | None = None
    dataset: str | None = None
    pair: str | None = None
    per_label: int | None = None


@dataclass(frozen=True)
class TaskSpec:
    """What the model learns, and which of its modules are adapted."""

    type: str = "classification"
    target_modules: str | tuple[str, ...] = "all-linear"
    max_length: int = 128


@dataclass(frozen=True)
class TrainingSpec:
    """How long and how fast to train; exactly one of `steps` and `epochs` is set."""

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    """Of the adapter; None: each method's suggested one."""
    head_learning_rate: float = 1e-2
    """Of what is trained in full beside the adapter: the task head. The same for every method, since a method that
    also set the head's rate would be ranked by it."""
    warmup: float = 0.1


@dataclass(frozen=True)
class BudgetSpec:
    """The rank that every method starts from or aims at."""

    r: int = 8


@dataclass(frozen=True)
class MethodEntry:
    """One method to run: its own fields, and a learning rate where it differs from the training section's."""

    name: str
    fields: dict[str, object] = dataclasses.field(default_factory=dict)
    learning_rate: float | None = None


@dataclass(frozen=True)
class Spec:
    """A whole SPEC, checked, with defaults filled in and paths joined to its `folder`."""

    model: str
    output: Path
    methods: tuple[MethodEntry, ...]
    seeds: tuple[int, ...]
    data: DataSpec
    task: TaskSpec
    training: TrainingSpec
    budget: BudgetSpec
    folder: Path = Path()

    def with_floor(self) -> Spec:
        """The same SPEC with the head alone among its methods, which shows what every other method has to beat."""
        if any(entry.name == HEAD for entry in self.methods):
            return self
        return dataclasses.replace(self, methods=(*self.methods, MethodEntry(HEAD)))

    def to_dict(self) -> dict[str, object]:
        """The SPEC as JSON values, paths as they were written, so that moving the folder changes no digest."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "folder"]
        table = {name: _plain(getattr(self, name), self.folder) for name in names}
        return table | {"model": _as_written(Path(self.model), self.folder)}


def read_spec(path: str | Path) -> Spec:
    """Read and check the SPEC file at `path`."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError("spec", f"be a file that can be read ({error.strerror})", str(path)) from error
    except ValueError as error:  # of TOML, or of its encoding
        raise ArgumentError("spec", f"be valid TOML ({error})", str(path)) from error
    return parse_spec(table, path.parent)


def parse_spec(table: dict[str, object], folder: Path) -> Spec:
    """Check a SPEC's parsed TOML; its relative paths are taken from `folder`."""
    folder = Path(folder).absolute()
    top = _Section(table, "", ["model", "output", "methods", "method", "seeds", "data", "task", "training", "budget"])
    return Spec(
        model=_model(top.required("model", _TEXT), folder),
        output=folder / top.required("output", _TEXT),
        methods=_methods(top),
        seeds=top.optional("seeds", _SEEDS, (0,)),
        data=_data(top.section("data", DataSpec), folder),
        task=_task(top.section("task", TaskSpec)),
        training=_training(top.section("training", TrainingSpec)),
        budget=BudgetSpec(r=top.section("budget", BudgetSpec).optional("r", _integer(1), BudgetSpec.r)),
        folder=folder,
    )


def _model(name: str, folder: Path) -> str:
    """A folder beside the SPEC if there is one of that name; else the name, of a hub or an embedded model."""
    beside = folder / name
    return str(beside) if beside.is_dir() else name


def _methods(top: _Section) -> tuple[MethodEntry, ...]:
    if ("methods" in top.table) == ("method" in top.table):
        given = [key for key in ("methods", "method") if key in top.table]
        raise ArgumentError("methods", "be given, or [[method]] tables in its place, but not both", given)
    if "methods" in top.table:
        entries = tuple(MethodEntry(name) for name in top.required("methods", _NAMES))
    else:
        tables = enumerate(top.required("method", _TABLES))
        entries = tuple(_method(_Section(table, f"method[{i}]", None)) for i, table in tables)
    for i, entry in enumerate(entries):
        if entry in entries[:i]:
            raise ArgumentError("methods", "be distinct", entry.name)
    return entries


def _method(section: _Section) -> MethodEntry:
    own = ("name", "learning_rate")
    return MethodEntry(
        name=section.required("name", _TEXT),
        fields={key: value for key, value in section.table.items() if key not in own},
        learning_rate=section.optional("learning_rate", _POSITIVE, None),
    )


def _data(section: _Section, folder: Path) -> DataSpec:
    dataset = section.optional("dataset", _TEXT, None)
    files = {key: section.optional(key, _TEXT, None) for key in ("train", "test", "validation")}
    if dataset is not None and any(files.values()):
        raise ArgumentError("data.dataset", "stand alone, without train, test or validation files", dataset)
    if dataset is None:
        section.need("train", ", or `data.dataset` in its place")
        section.need("test")
    return DataSpec(
        text=section.required("text", _TEXT),
        label=section.required("label", _TEXT),
        dataset=dataset,
        pair=section.optional("pair", _TEXT, None),
        per_label=section.optional("per_label", _integer(1), None),
        **{key: folder / name for key, name in files.items() if name is not None},
    )


def _task(section: _Section) -> TaskSpec:
    return TaskSpec(
        type=section.optional("type", _TASK, TaskSpec.type),
        target_modules=section.optional("target_modules", _TARGETS, TaskSpec.target_modules),
        max_length=section.optional("max_length", _integer(2), TaskSpec.max_length),
    )


def _training(section: _Section) -> TrainingSpec:
    given = {key: section.table[key] for key in ("steps", "epochs") if key in section.table}
    if len(given) != 1:
        raise ArgumentError("training.steps", "be given, or `training.epochs` in its place, but not both", given)
    return TrainingSpec(
        steps=section.optional("steps", _integer(1), None),
        epochs=section.optional("epochs", _POSITIVE, None),
        batch_size=section.optional("batch_size", _integer(1), TrainingSpec.batch_size),
        learning_rate=section.optional("learning_rate", _POSITIVE, None),
        head_learning_rate=section.optional("head_learning_rate", _POSITIVE, TrainingSpec.head_learning_rate),
        warmup=section.optional("warmup", _WARMUP, TrainingSpec.warmup),
    )


@dataclass(frozen=True)
class _Rule(Generic[T]):
    """What a value must be: in words, and as a reader that answers None where they do not hold (TOML has no null)."""

    words: str
    read: Callable[[Any], T | None]


class _Section:
    """One table of the SPEC, read key by key; `known=None` lets any key be."""

    def __init__(self, table: object, name: str, known: Sequence[str] | None) -> None:
        if not isinstance(table, dict):
            raise ArgumentError(name or "spec", "be a table", table)
        self.table: dict[str, object] = table
        self.name = name
        for key in table:
            if known is not None and key not in known:
                raise ArgumentError(self.dotted(key), f"be a known key ({nearest(key, known)})", table[key])

    def dotted(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def section(self, key: str, fields_of: type) -> _Section:
        """The table under `key`, empty if there is none, whose keys are the fields of a dataclass."""
        return _Section(self.table.get(key, {}), self.dotted(key), [f.name for f in dataclasses.fields(fields_of)])

    def need(self, key: str, instead: str = "") -> None:
        if key not in self.table:
            where = f"[{self.name}]" if self.name else "the SPEC"
            raise ArgumentError(self.dotted(key), f"be among the keys of {where}{instead}", sorted(self.table))

    def required(self, key: str, rule: _Rule[T]) -> T:
        self.need(key)
        return self._read(key, rule)

    def optional(self, key: str, rule: _Rule[T], default: D) -> T | D:
        return self._read(key, rule) if key in self.table else default

    def _read(self, key: str, rule: _Rule[T]) -> T:
        value = rule.read(self.table[key])
        if value is None:
            raise ArgumentError(self.dotted(key), rule.words, self.table[key])
        return value


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _texts(value: Any) -> tuple[str, ...] | None:
    whole = isinstance(value, list) and value and all(_text(item) for item in value)
    return tuple(value) if whole else None


def _tables(value: Any) -> list[dict[str, object]] | None:
    whole = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    return value if whole else None


def _seeds(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    seeds = tuple(value)
    whole = all(type(seed) is int and 0 <= seed <= _MAX_SEED for seed in seeds)  # a bool is not a seed
    return seeds if whole and len(set(seeds)) == len(seeds) else None


def _integer(low: int) -> _Rule[int]:
    def read(value: Any) -> int | None:
        return value if type(value) is int and value >= low else None  # a bool is not a count

    return _Rule(f"be an integer of at least {low}", read)


def _number(words: str, holds: Callable[[float], bool]) -> _Rule[float]:
    def read(value: Any) -> float | None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # the comparison turns away NaN, infinities, and integers too large for a float
        return float(value) if is_number and abs(value) <= sys.float_info.max and holds(value) else None

    return _Rule(words, read)


_TEXT = _Rule("be a non-empty string", _text)
_TARGETS = _Rule("be a non-empty string or list of strings", lambda value: _text(value) or _texts(value))
_NAMES = _Rule("be a non-empty list of method names", _texts)
_TABLES = _Rule("be written as [[method]] tables", _tables)
_SEEDS = _Rule(f"be a non-empty list of distinct integers from 0 to {_MAX_SEED}", _seeds)
_POSITIVE = _number("be a finite number above 0", lambda value: value > 0)
_WARMUP = _number("be a number from 0 up to, but not including, 1", lambda value: 0 <= value < 1)
_TASK = _Rule(
    "be 'classification' or 'regression'",
    lambda value: value if isinstance(value, str) and value in ("classification", "regression") else None,
)


def _as_written(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _plain(value: object, folder: Path) -> object:
    """`value` in JSON's types; paths below `folder` are told from there."""
    if isinstance(value, Path):
        return _as_written(value, folder)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), folder) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, folder) for item in value]
    return value
