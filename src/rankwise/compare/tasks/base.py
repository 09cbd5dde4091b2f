"""What a comparison asks of a kind of task: its keys in the SPEC, its data, its model, its trainer and its scores.

A task is one file here and one line in the registry of this package. Task files import torch, transformers and trl
inside their methods, since a SPEC must be readable, and its mistakes told, before anything heavy is loaded.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator

from rankwise.compare.sections import Count, File, Section, Text, Texts, broken_rule, has_unknown_key, rule
from rankwise.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

    from rankwise.compare.tables import Table

Targets = Annotated[Text | Texts, rule("be a non-empty string or list of strings")]
LOWER_IS_BETTER = ("loss", "mse")
"""Metrics that are the better the lower they are."""
Length = Annotated[int, Field(ge=2), rule("be an integer of at least 2")]


class Data(Section, ABC):
    """Where the examples are: files of one layout, or a hub data set in their place. Each task adds its columns."""

    train: File | None = None
    """Examples to train on: .jsonl, .csv or .parquet, also .gz."""
    test: File | None = None
    """Examples that are scored once, when a run has finished."""
    validation: File | None = None
    """Examples that choices are made on; left out, a tenth of train is set aside."""
    dataset: Text | None = None
    """A data set of the hub with the splits train and test, instead of files."""
    samples: Count | None = None
    """How many training examples to draw, others for each seed and each label in its share; left out, all are used."""

    @model_validator(mode="before")
    @classmethod
    def _one_source(cls, table: Any) -> Any:
        """Files or a data set of the hub, not both and not neither."""
        if not isinstance(table, dict) or has_unknown_key(cls, table):
            return table
        if "dataset" in table:
            if any(key in table for key in ("train", "test", "validation")):
                broken_rule(
                    "stand alone, without train, test or validation files", key="dataset", seen=table["dataset"]
                )
            return table
        if "train" not in table:
            broken_rule("be among the keys of [data], or `data.dataset` in its place", key="train", seen=sorted(table))
        if "test" not in table:
            broken_rule("be among the keys of [data]", key="test", seen=sorted(table))
        return table

    @property
    @abstractmethod
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the key that names them."""

    @property
    def examples_per_group(self) -> int | None:
        """How many training examples of each of the task's groups are kept; None for all."""
        return None


DataSection = type[Data]
"""A name for use in tasks, where `type` is a key of the SPEC."""


@dataclass(frozen=True)
class Examples:
    """One split: for each key of the SPEC that names a column, its values, row by row."""

    source: str
    """What errors call it."""
    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: str) -> list[Any]:
        return self.columns[key]

    def take(self, rows: Iterable[int]) -> Examples:
        """The given rows, in the order of the file."""
        kept = sorted(rows)
        return Examples(self.source, {key: [values[row] for row in kept] for key, values in self.columns.items()})


@dataclass(frozen=True)
class Splits:
    """The three splits, and the names of the labels; None for a task without labels."""

    train: Examples
    validation: Examples
    test: Examples
    labels: list[str] | None = None


class Task(Section, ABC):
    """The [task] section: what the model learns, and which of its modules are adapted."""

    type: Any
    """The kind of task; each kind allows its own name alone."""
    target_modules: Targets = "all-linear"
    """Names of the modules to adapt, or "all-linear"."""
    metrics: Any = ()
    """What is measured; the first one ranks. Each kind of task has its own."""

    data_section: ClassVar[DataSection]
    """The [data] section of this task."""
    opens_as: ClassVar[str]
    """The kind of model, by the names of `base_models.MODEL_OF_TASK`."""
    peft_type: ClassVar[str | None]
    """What PEFT calls the task; None where it has no name for it."""
    example_model: ClassVar[str] = "path/to/a/language/model"
    """A model for this task, in the SPEC that `rankwise spec` prints to start from."""
    head_modules: ClassVar[tuple[str, ...]] = ()
    """What trains in full beside an adapter, by module name; without a head, nothing. For a task that PEFT knows, it is
    what PEFT trains."""

    @property
    def lower_is_better(self) -> bool:
        """Whether the first metric is a loss or an error."""
        return self.metrics[0] in LOWER_IS_BETTER

    @property
    def title(self) -> str:
        """What results call the task: its kind, and whatever else one must know to read a score."""
        return self.type

    def for_model(self, model: str) -> Task:
        """The task with whatever the model decides about it.

        Raises:
            ArgumentError: the model's config does not open, or a key does not go with this model.
        """
        return self

    def packages(self) -> list[tuple[str, str, str]]:
        """What has to be installed beside rankwise: the key that asks for it, its value, and the package."""
        return []

    def check_packages(self) -> None:
        """Refuse what needs a package that is not installed.

        Raises:
            ArgumentError: naming the key that asks for the package.
        """
        for key, value, package in self.packages():
            if importlib.util.find_spec(package) is None:
                raise ArgumentError(key, f"come with {package} installed: rankwise's extra 'llm' brings it", value)

    # --- data ---------------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, table: Table, data: Data) -> Examples:
        """The columns of one split, every value checked.

        Raises:
            DataError: a column is missing, or a value is not what the task needs.
        """

    def check(self, examples: Mapping[str, Examples]) -> None:
        """Compare the splits with each other.

        Raises:
            DataError: they do not go together.
        """

    def labels(self, train: Examples) -> list[str] | None:
        """The names of the labels, in their order; None for a task without labels."""
        return None

    def groups(self, train: Examples) -> list[list[int]]:
        """Rows that are alike: the same share of each group is set aside for validation."""
        return [list(range(len(train)))]

    def contents(self, examples: Examples) -> Any:
        """What makes a split what it is, as JSON values: other contents make another run."""
        return examples.columns

    def open_processor(self, model: str) -> Any:
        """What turns examples into the model's inputs: its tokenizer.

        Raises:
            ArgumentError: the model has none.
        """
        from rankwise.base_models import open_tokenizer

        return open_tokenizer(model, argument="model")

    def check_model(self, model: PreTrainedModel, processor: Any) -> None:
        """Refuse a model, or its processor, that the task cannot work with: at first, a model without the task's head.

        Args:
            model: the model without weights.
            processor: what `open_processor` gave.

        Raises:
            ArgumentError: naming the key, its rule and the value.
        """
        if not self.head_modules:
            return
        if not any(name.rpartition(".")[2] in self.head_modules for name, _ in model.named_modules()):
            modules = [name for name, _ in model.named_children()]
            raise ArgumentError("model", f"have a head among {', '.join(self.head_modules)}", modules)

    def general_text(self, data: Data) -> Path | None:
        """A file of text that has nothing to do with the task, whose loss tells what training made the model forget."""
        return None

    # --- model --------------------------------------------------------------------------------------------------------

    def adapter_fields(self, modules_to_save: Iterable[str] = ()) -> dict[str, Any]:
        """What PEFT's configs are told of the task: its name or, where PEFT has none, the head to train in full.

        Args:
            modules_to_save: what the SPEC trains in full besides.
        """
        if self.peft_type is not None or not self.head_modules:
            return {"task_type": self.peft_type}
        return {"task_type": None, "modules_to_save": [*modules_to_save, *self.head_modules]}

    def config_changes(self, splits: Splits) -> dict[str, Any]:
        """Changes to the model's config that the data asks for, such as the number of labels."""
        return {}

    # --- training and scoring -----------------------------------------------------------------------------------------

    def arguments(self, common: dict[str, Any]) -> TrainingArguments:
        """The trainer's arguments, from those that are the same for every task."""
        from transformers import TrainingArguments

        return TrainingArguments(**common)

    @property
    def trainer_class(self) -> type[Trainer]:
        """The trainer of transformers or of trl that trains this task."""
        from transformers import Trainer

        return Trainer

    @abstractmethod
    def trainer_data(self, splits: Splits, processor: Any) -> dict[str, Any]:
        """What the trainer is given of the data: training and evaluation sets, and a collator where it needs one.

        The first evaluation set is the validation split: development data, for the rules that need some.
        """

    def check_trainer(self, trainer: Trainer, splits: Splits) -> None:
        """Refuse, before training, what the trainer has made of the data.

        Raises:
            DataError: examples have been lost.
        """

    @abstractmethod
    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """The metrics of a split."""


class TextTask(Task):
    """A task whose examples are tokens."""

    max_length: Length = 128
    """Tokens of an example; what is longer is cut."""

    def lengths(self) -> dict[str, int]:
        """The keys that say how many tokens the model reads, and their values."""
        return {"max_length": self.max_length}

    def check_model(self, model: PreTrainedModel, processor: Any) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            ArgumentError: naming the key.
        """
        super().check_model(model, processor)
        of_model = getattr(model.config, "max_position_embeddings", None) or processor.model_max_length
        positions = min(of_model, processor.model_max_length)
        for key, length in self.lengths().items():
            if length > positions:
                raise ArgumentError(f"task.{key}", f"be at most the model's positions, {positions}", length)
