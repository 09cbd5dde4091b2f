"""From a SPEC to the list of its runs, everything checked that can be checked before training."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rankwise.compare.candidates import Candidate, candidate_of
from rankwise.compare.data import draw, load_splits
from rankwise.compare.forgetting import read_general_text
from rankwise.compare.models import identity, skeleton_for
from rankwise.compare.provenance import QUANTISES, library_versions
from rankwise.compare.results import Result
from rankwise.compare.spec import Entry, Spec
from rankwise.compare.summary import best_rates, reference_among
from rankwise.compare.tasks import Splits, Task
from rankwise.compare.tracking import check_tracker
from rankwise.errors import ArgumentError


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    label: str
    """Unique among the SPEC's methods: the method's name, and what sets it apart where a method comes twice."""
    entry: Entry
    seed: int
    learning_rate: float
    head_learning_rate: float
    key: str
    """The name of its files; changes with anything that could change its result."""


@dataclass(frozen=True)
class Choice:
    """One method with the learning rates that it may take."""

    label: str
    runs: tuple[Run, ...]
    """Every seed at every rate."""

    @property
    def settled(self) -> bool:
        """Whether there is only one rate."""
        return len({run.learning_rate for run in self.runs}) == 1

    def runs_with(self, seed: int) -> list[Run]:
        """The runs of one seed, one for each rate."""
        return [run for run in self.runs if run.seed == seed]


@dataclass(frozen=True)
class Plan:
    """A checked SPEC: its data and its runs, in order."""

    spec: Spec
    splits: Splits
    steps: int
    """Optimiser steps of each run."""
    choices: tuple[Choice, ...]
    """The learning rates of every method."""
    data_digest: str
    """A digest of everything that was read of the data."""
    general_text: tuple[str, ...] = ()
    """Text whose loss is measured before and after training; none for most tasks."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """What can be trained at once: every seed of a method with one rate, and the search of every other."""
        seeds = self.spec.seeds
        first = [run for choice in self.choices for run in choice.runs_with(seeds[0])]
        rest = [
            run for seed in seeds[1:] for choice in self.choices if choice.settled for run in choice.runs_with(seed)
        ]
        return tuple(first + rest)

    @property
    def count(self) -> int:
        """How many runs there are in all: the search with the first seed, and the other seeds at the chosen rate."""
        return sum(len(choice.runs_with(self.spec.seeds[0])) + len(self.spec.seeds) - 1 for choice in self.choices)

    def splits_of(self, seed: int) -> Splits:
        """The data of the runs with one seed, whose training examples may be a draw of that seed."""
        return draw(self.splits, self.spec.task, self.spec.data.samples, seed)

    def search_of(self, choice: Choice) -> list[Run]:
        """The runs that find the best learning rate of a method: those of the first seed."""
        return choice.runs_with(self.spec.seeds[0])

    def chosen_runs(self, choice: Choice, results: Sequence[Result]) -> tuple[Run, ...]:
        """The other seeds of a method whose rate was searched, at its best rate.

        Args:
            choice: the method.
            results: the finished runs of its search, at least one.
        """
        best = best_rates(results)[choice.label]
        others = [run for seed in self.spec.seeds[1:] for run in choice.runs_with(seed)]
        return tuple(run for run in others if run.learning_rate == best)


def make_plan(spec: Spec) -> Plan:
    """Read the data and check every method against the model, without loading its weights.

    Raises:
        ArgumentError: an unknown method or field, a value that breaks its rule, a module name that matches nothing.
        DataError: the data is not what the SPEC says.
    """
    if spec.output.exists() and not spec.output.is_dir():
        raise ArgumentError("output", "be a folder, or not exist yet", str(spec.output))
    check_tracker(spec.tracker)
    spec = spec.for_model()
    candidates = [candidate_of(spec, entry) for entry in spec.entries]
    spec.task.check_packages()
    check_quantising(spec)
    processor = spec.task.open_processor(spec.model)
    splits = load_splits(spec.data, spec.task)
    steps = _steps(spec, spec.data.samples or len(splits.train))
    for candidate in candidates:
        model = skeleton_for(spec.task, spec.model, splits)
        spec.task.check_model(model, processor)
        candidate.check(model, steps)
    text_file = spec.task.general_text(spec.data)
    general_text = () if text_file is None else tuple(read_general_text(text_file))
    # What all runs share is hashed once: the data, the model and the library versions.
    data_digest = _data_digest(spec.task, splits, general_text)
    shared = _shared_digest(spec, data_digest)
    choices = [
        _choice(spec, entry, candidate, shared) for entry, candidate in zip(spec.entries, candidates, strict=True)
    ]
    labels = [choice.label for choice in choices]
    for place, label in enumerate(labels):
        if label in labels[:place]:
            raise ArgumentError("method.label", "be different for every method", label)
    reference_among(labels, spec.reference)
    return Plan(spec, splits, steps, tuple(choices), data_digest, general_text)


def check_quantising(spec: Spec) -> None:
    """Refuse quantised weights where the package that makes them is not installed."""
    if spec.training.quantise and find_spec(QUANTISES) is None:
        rule = f"come with {QUANTISES} installed (pip install {QUANTISES})"
        raise ArgumentError("training.quantise", rule, spec.training.quantise)


def _steps(spec: Spec, examples: int) -> int:
    if spec.training.steps is not None:
        return spec.training.steps
    return math.ceil(spec.training.epochs * math.ceil(examples / spec.training.batch_size))  # type: ignore[operator]


def _choice(spec: Spec, entry: Entry, candidate: Candidate, shared: str) -> Choice:
    """Every run of one method."""
    label = _label(entry, spec.entries)
    head_rate = entry.head_learning_rate or spec.training.head_learning_rate
    asked = entry.learning_rate or spec.training.learning_rate or candidate.suggested_rate
    rates = asked if isinstance(asked, tuple) else (asked,)
    if not candidate.has_own_rate:
        rates = (head_rate,)
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in entry.name)
    runs = []
    for rate in rates:
        # Resolved fields, so that a changed default makes another run; and the rate once, whichever key gave it.
        told = {"method": entry.name, "given": entry.fields, "resolved": candidate.fields, "rate": rate}
        digest = _digest([shared, told, candidate.starting_scale, head_rate])
        runs += [Run(label, entry, seed, rate, head_rate, f"{stem}--{digest}--seed{seed}") for seed in spec.seeds]
    return Choice(label, tuple(runs))


def _label(entry: Entry, entries: tuple[Entry, ...]) -> str:
    """The label that was given, or the name; for a name that comes more than once, what was set for it too."""
    if entry.label is not None:
        return entry.label
    if sum(other.name == entry.name and other.label is None for other in entries) == 1:
        return entry.name
    rates = {"lr": entry.learning_rate, "head lr": entry.head_learning_rate}
    given = {name: rate for name, rate in rates.items() if rate is not None and not isinstance(rate, tuple)}
    return " ".join([entry.name, *(f"{name}={value}" for name, value in (given | entry.fields).items())])


def _data_digest(task: Task, splits: Splits, general_text: Sequence[str]) -> str:
    """A digest of the data as it was read.

    A file and a hub data set are known by their contents alike, and a hub data set that has changed makes new runs.
    """
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    contents = {name: task.contents(examples) for name, examples in parts.items()}
    return _digest([splits.labels, contents, list(general_text)])


def _shared_digest(spec: Spec, data_digest: str) -> str:
    """A digest of everything but the method that shapes a run's result."""
    settings = spec.to_dict()
    told = {name: settings[name] for name in ("task", "training", "budget")}
    # The rates are in each run's own digest.
    rates = ("learning_rate", "head_learning_rate")
    told["training"] = {name: value for name, value in settings["training"].items() if name not in rates}
    told["data"] = [data_digest, spec.data.samples]
    told["model"] = identity(spec.model)
    told["libraries"] = library_versions(quantised=spec.training.quantise is not None)
    return _digest(told)


def _digest(value: Any) -> str:
    """Twelve hex digits of a value in JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
