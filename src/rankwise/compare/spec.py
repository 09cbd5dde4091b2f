"""The SPEC: the TOML file that says what to train, on what data, and for how long.

Reading it costs no time: nothing heavy is imported, and every mistake is one sentence that names the key as
`section.key`, the rule and the value. Whether a method exists and has the fields given is for the caller to check.
"""

from __future__ import annotations

import functools
import math
import operator
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from rankwise.compare.sections import (
    Count,
    File,
    Rate,
    Section,
    Text,
    Texts,
    as_tuple,
    broken_rule,
    distinct,
    has_unknown_key,
    rule,
    told,
)
from rankwise.compare.tasks import TASKS, Data, Task
from rankwise.errors import ArgumentError

HEAD = "head"
"""The method that trains the task head alone, on the frozen model: the floor of a task with a head."""
PRETRAINED = "pretrained"
"""The method that trains nothing: the floor of a task without a head."""
FLOORS = {
    HEAD: "the head alone on the frozen model",
    PRETRAINED: "the pretrained model as it is",
}
"""What every other method has to beat, and how a sentence calls it."""
CEILING = "full"
"""The method that trains every weight: what an adapter can hope to come near to."""
DEFAULT_TASK = "classification"
EVALUATIONS = 5
"""How often the validation score is measured where the best of them is taken."""
AnyTask = TypeVar("AnyTask", bound=Task)
AnyData = TypeVar("AnyData", bound=Data)
_MAX_SEED = 2**32 - 1  # what numpy's generator, which trainers seed too, accepts


AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False), rule("be a finite number of at least 0")]


Rates = Annotated[
    Rate | Annotated[tuple[Rate, ...], Field(min_length=1)],
    BeforeValidator(as_tuple),
    AfterValidator(distinct),
    rule("be a finite number above 0, or a non-empty list of different ones"),
]
"""A learning rate, or several to choose from."""


class Training(Section):
    """The [training] section: how long and how fast to train; exactly one of `steps` and `epochs` is set."""

    steps: Count | None = None
    """Optimiser steps."""
    epochs: Rate | None = None
    """Passes over the training data, instead of steps."""
    batch_size: Count = 32
    """Examples of one optimiser step."""
    learning_rate: Rates | None = None
    """Peak rate of the adapter; of a list, as [3e-4, 1e-3, 3e-3], each candidate takes the rate with the best
    validation score at the first seed. Left out: each method's suggested one, which was tuned on two small tasks;
    LoRA's for a config of stock PEFT; 5e-5 for full and partial fine-tuning."""
    head_learning_rate: Rate = 1e-2
    """Peak rate of what is trained in full beside the adapter: the task head. The same for every method, since a
    method that also set the head's rate would be ranked by it."""
    warmup: Annotated[float, Field(ge=0, lt=1), rule("be a number from 0 up to, but not including, 1")] = 0.1
    """Share of the steps in which the rate rises to its peak."""
    scheduler: Annotated[Literal["linear", "cosine", "constant"], rule("be one of linear, cosine, constant")] = "linear"
    """How the rate goes on from its peak: to 0 in a line or along a cosine, or not at all."""
    weight_decay: AtLeastZero = 0.0
    """AdamW's, of the adapter and the head alike."""
    clip: AtLeastZero = 1.0
    """The largest norm of the gradient over everything that trains; more is scaled down to it. 0: no limit."""
    accumulation: Count = 1
    """Backward passes of one optimiser step, each on batch_size / accumulation examples."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    precision: Annotated[Literal["float32", "bfloat16"], rule("be float32 or bfloat16")] = "float32"
    """What the model computes in; bfloat16 by autocast, the trained weights staying float32."""
    quantise: Annotated[Literal["4bit", "8bit"], rule("be 4bit or 8bit")] | None = None
    """Hold the frozen weights in so many bits, by bitsandbytes; adapters and heads stay float32."""
    evaluations: Annotated[int, Field(ge=0), rule("be an integer of at least 0")] | None = None
    """How often the validation score is measured on the way, at equal distances up to the last step; results keep the
    curve. Left out, 5 times where best is "validation", else never."""
    best: Annotated[Literal["last", "validation"], rule("be last or validation")] = "last"
    """Which weights are scored and saved: those of the last step, or those with the best validation score among the
    evaluated steps. An adaptive method's steps count from the one on that its ranks are final."""

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, table: Any) -> Any:
        if isinstance(table, dict) and not has_unknown_key(cls, table):
            given = {key: table[key] for key in ("steps", "epochs") if key in table}
            if len(given) != 1:
                words = "be given, or `training.epochs` in its place, but not both"
                broken_rule(words, key="steps", seen=given)
        return table

    @model_validator(mode="after")
    def _even_parts(self) -> Self:
        if self.batch_size % self.accumulation:
            broken_rule(f"divide batch_size, {self.batch_size}", key="accumulation", seen=self.accumulation)
        return self

    @model_validator(mode="after")
    def _something_to_choose_by(self) -> Self:
        if self.best == "validation" and self.evaluations == 0:
            broken_rule('be at least 1 where best is "validation"', key="evaluations", seen=0)
        return self

    def evaluated_at(self, steps: int) -> tuple[int, ...]:
        """The steps of a run after which the validation score is measured; the last one is among them, if any is."""
        needed = EVALUATIONS if self.best == "validation" else 0
        count = needed if self.evaluations is None else self.evaluations
        places = {math.ceil(steps * part / count) for part in range(1, count + 1)}
        return tuple(sorted(places))


class Budget(Section):
    """The [budget] section."""

    r: Count = 8
    """The rank that every method starts from or aims at."""


class Entry(Section):
    """One method to run: its own fields, and a learning rate where it differs from the training section's."""

    model_config = ConfigDict(extra="allow")

    name: Text
    """A method of rankwise; a config class of PEFT, as "peft.LoraConfig"; "full", "partial", "head" or "pretrained"."""
    label: Text | None = None
    """What tables and figures call it; left out, its name and what is set for it."""
    learning_rate: Rates | None = None
    """Peak rate of this method alone, or a list to search, as [3e-4, 1e-3, 3e-3]."""
    head_learning_rate: Rate | None = None
    """Peak rate of the head in this run alone: for a study of that rate, since it ranks methods if it differs."""

    @property
    def fields(self) -> dict[str, Any]:
        """The method's own fields, as they were given."""
        return dict(self.model_extra or {})


def _tables(value: Any) -> Any:
    """The [[method]] tables; what is wrong inside one of them is for the table to say."""
    if not isinstance(value, list) or not value or not all(isinstance(table, dict) for table in value):
        broken_rule("be written as [[method]] tables")
    return tuple(value)


Methods = Annotated[tuple[Entry, ...], BeforeValidator(_tables)]
Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]
Seeds = Annotated[
    tuple[Seed, ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    AfterValidator(distinct),
    rule(f"be a non-empty list of distinct integers from 0 to {_MAX_SEED}"),
]


class Spec(Section, Generic[AnyTask, AnyData]):
    """A whole SPEC, checked, with defaults filled in and paths joined to its folder."""

    model: Text
    """The pretrained model: a folder, a hub id, or the name of an embedded one."""
    output: File
    """The folder for results, adapters, exports, table and page."""
    methods: Annotated[Texts, rule("be a non-empty list of method names")] | None = None
    """Methods to run with their defaults; or [[method]] tables in its place."""
    method: Methods | None = None
    """Methods to run, each a table with its name and what is set for it."""
    seeds: Seeds = (0,)
    """Every method runs once with each."""
    reference: Text | None = None
    """The label of the method that all others are compared with; left out, plain LoRA, where it is run."""
    tracker: (
        Annotated[Literal["tensorboard", "wandb", "trackio"], rule("be one of tensorboard, wandb, trackio")] | None
    ) = None
    """Where to follow losses, the rank of every module and the scores while a run goes."""
    data: AnyData
    task: AnyTask
    training: Training
    budget: Budget = Budget()

    _folder: Path = PrivateAttr(Path())

    @model_validator(mode="before")
    @classmethod
    def _one_list(cls, table: Any) -> Any:
        if isinstance(table, dict) and not has_unknown_key(cls, table):
            given = [key for key in ("methods", "method") if key in table]
            if len(given) != 1:
                words = "be given, or [[method]] tables in its place, but not both"
                broken_rule(words, key="methods", seen=given)
        return table

    @model_validator(mode="after")
    def _distinct_methods(self) -> Self:
        for place, entry in enumerate(self.entries):
            if entry in self.entries[:place]:
                broken_rule("be distinct", key="methods", seen=entry.name)
        return self

    @property
    def folder(self) -> Path:
        """The folder of the SPEC, from which its relative paths start."""
        return self._folder

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The methods to run."""
        return self.method or tuple(Entry(name=name) for name in self.methods or ())

    def with_entries(self, entries: tuple[Entry, ...]) -> Self:
        """The same SPEC with other methods."""
        return self.model_copy(update={"methods": None, "method": entries})

    def with_floor(self) -> Self:
        """The same SPEC with its floor among the methods, which shows what every other method has to beat.

        The floor is the head alone on the frozen model, or, for a task without a head, the model as it is.
        """
        floor = HEAD if self.task.for_model(self.model).head_modules else PRETRAINED
        if any(entry.name == floor for entry in self.entries):
            return self
        return self.with_entries((*self.entries, Entry(name=floor)))

    def for_model(self) -> Self:
        """The same SPEC with whatever the model decides about the task."""
        return self.model_copy(update={"task": self.task.for_model(self.model)})

    def with_output(self, output: Path) -> Self:
        """The same SPEC, writing to another folder."""
        return self.model_copy(update={"output": output.absolute()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its kind of task: the class of each kind is made on demand, and has no name to import it by."""
        return _restored, (self.task.type, self.__getstate__())

    def to_dict(self) -> dict[str, Any]:
        """The SPEC as JSON values, paths as they were written, so that moving the folder changes no digest."""
        table = self.model_dump(mode="json", exclude={"methods", "method"}, context={"folder": self._folder})
        entries = [entry.model_dump(mode="json", exclude_none=True) for entry in self.entries]
        model = Path(self.model)
        beside = model.is_relative_to(self._folder)
        return table | {
            "methods": entries,
            "model": model.relative_to(self._folder).as_posix() if beside else self.model,
        }


def read_spec(path: str | Path) -> Spec:
    """Read and check the SPEC file at `path`.

    Raises:
        ArgumentError: the file cannot be read, or a key is missing, unknown or breaks its rule.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError("spec", f"be a file that can be read ({error.strerror})", str(path)) from error
    except ValueError as error:  # of TOML, or of its encoding
        raise ArgumentError("spec", f"be valid TOML ({error})", str(path)) from error
    return parse_spec(table, path.parent)


def parse_spec(table: dict[str, Any], folder: Path) -> Spec:
    """Check a SPEC's parsed TOML; its relative paths are taken from `folder`.

    Raises:
        ArgumentError: a key is missing, unknown or breaks its rule.
    """
    folder = Path(folder).absolute()
    kind = spec_class(_task_type(table))
    # Sections that are left out are read as empty, so that the error names the first key that they lack.
    whole = {"data": {}, "task": {}, "training": {}, **table}
    try:
        spec = kind.model_validate(whole, context={"folder": folder})
    except ValidationError as error:
        raise told(error, kind) from error
    # A folder beside the SPEC is the model if there is one of that name; else it is a hub id or an embedded model.
    beside = folder / spec.model
    spec = spec.model_copy(update={"model": str(beside)}) if beside.is_dir() else spec
    spec._folder = folder
    return spec


def spec_class(task_type: str) -> type[Spec]:
    """The SPEC of one kind of task, whose [task] and [data] sections have that task's keys."""
    task = TASKS[task_type]
    return Spec[task, task.data_section]


def _restored(task_type: str, state: dict[Any, Any]) -> Spec:
    """A SPEC from its pickled state."""
    kind = spec_class(task_type)
    spec = kind.__new__(kind)
    spec.__setstate__(state)
    return spec


def schema() -> dict[str, Any]:
    """The JSON schema of a SPEC, which editors check and complete SPEC files by."""
    kinds = tuple(spec_class(name) for name in TASKS)
    any_kind: Any = functools.reduce(operator.or_, kinds)  # a union, whose members are only known here
    whole = TypeAdapter(any_kind).json_schema()
    # A SPEC without [task] is of the kind that is taken where none is named.
    sections = spec_class(DEFAULT_TASK).model_json_schema()["properties"]["task"]
    for kind in whole["$defs"].values():
        if kind.get("properties", {}).get("task") == sections:
            kind["required"].remove("task")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A SPEC of rankwise", **whole}


def _task_type(table: Mapping[str, Any]) -> str:
    """The kind of task that a SPEC asks for.

    Raises:
        ArgumentError: there is no such kind.
    """
    section = table.get("task", {})
    if not isinstance(section, dict):
        raise ArgumentError("task", "be a table", section)
    kind = section.get("type", DEFAULT_TASK)
    if not isinstance(kind, str) or kind not in TASKS:
        raise ArgumentError("task.type", f"be one of {', '.join(TASKS)}", kind)
    return kind
