"""From a SPEC to the list of its runs, everything checked that can be checked before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from rankwise.base_models import open_tokenizer
from rankwise.compare.candidates import Candidate, candidate_of
from rankwise.compare.data import load_splits
from rankwise.compare.models import identity, skeleton_for
from rankwise.compare.spec import Entry, Spec
from rankwise.compare.tasks import Splits
from rankwise.errors import ArgumentError

LIBRARIES = ("rankwise", "torch", "peft", "transformers", "accelerate", "tokenizers")
"""What has a hand in a run's numbers: another version of one of them makes another run."""


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    label: str
    """Unique among the SPEC's methods: the method's name, and what sets it apart where a method comes twice."""
    entry: Entry
    seed: int
    learning_rate: float
    key: str
    """The name of its files; changes with anything that could change its result."""


@dataclass(frozen=True)
class Plan:
    """A checked SPEC: its data and its runs, in order."""

    spec: Spec
    splits: Splits
    steps: int
    """Optimiser steps of each run."""
    runs: tuple[Run, ...]


def make_plan(spec: Spec) -> Plan:
    """Read the data and check every method against the model, without loading its weights.

    Raises:
        ArgumentError: an unknown method or field, a value that breaks its rule, a module name that matches nothing.
        DataError: the data is not what the SPEC says.
    """
    if spec.output.exists() and not spec.output.is_dir():
        raise ArgumentError("output", "be a folder, or not exist yet", str(spec.output))
    candidates = [candidate_of(spec, entry) for entry in spec.entries]
    tokenizer = open_tokenizer(spec.model, argument="model")
    spec.task.check_tokenizer(tokenizer)
    splits = load_splits(spec.data, spec.task)
    steps = _steps(spec, len(splits.train))
    for candidate in candidates:
        model = skeleton_for(spec.task, spec.model, splits)
        _check_length(spec, model, tokenizer)
        candidate.check(model, steps)
    # What all runs share is hashed once: the data, the model and the library versions.
    shared = _shared_digest(spec, splits)
    runs = [
        _run(spec, entry, candidate, seed, shared)
        for seed in spec.seeds
        for entry, candidate in zip(spec.entries, candidates, strict=True)
    ]
    return Plan(spec, splits, steps, tuple(runs))


def library_versions() -> dict[str, str]:
    """The installed version of each of LIBRARIES."""
    return {name: version(name) for name in LIBRARIES}


def _check_length(spec: Spec, model: PreTrainedModel, tokenizer: Any) -> None:
    positions = min(getattr(model.config, "max_position_embeddings", None) or math.inf, tokenizer.model_max_length)
    if spec.task.max_length > positions:
        raise ArgumentError("task.max_length", f"be at most the model's positions, {positions}", spec.task.max_length)


def _steps(spec: Spec, examples: int) -> int:
    if spec.training.steps is not None:
        return spec.training.steps
    return math.ceil(spec.training.epochs * math.ceil(examples / spec.training.batch_size))  # type: ignore[operator]


def _run(spec: Spec, entry: Entry, candidate: Candidate, seed: int, shared: str) -> Run:
    label = _label(entry, spec.entries)
    rate = entry.learning_rate or spec.training.learning_rate or candidate.suggested_rate
    if not candidate.has_own_rate:
        rate = spec.training.head_learning_rate
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in entry.name)
    # Resolved fields, so that a changed default makes another run; and the rate once, whichever key gave it.
    told = {"method": entry.name, "given": entry.fields, "resolved": candidate.fields, "rate": rate}
    digest = _digest([shared, told, candidate.starting_scale])
    return Run(label, entry, seed, rate, f"{stem}--{digest}--seed{seed}")


def _label(entry: Entry, entries: tuple[Entry, ...]) -> str:
    """The label that was given, or the name; for a name that comes more than once, what was set for it too."""
    if entry.label is not None:
        return entry.label
    if sum(other.name == entry.name and other.label is None for other in entries) == 1:
        return entry.name
    rate = {"lr": entry.learning_rate} if entry.learning_rate else {}
    return " ".join([entry.name, *(f"{name}={value}" for name, value in (rate | entry.fields).items())])


def _shared_digest(spec: Spec, splits: Splits) -> str:
    """A digest of everything but the method that shapes a run's result.

    The data is hashed as it was read, so that a file and a hub data set are known by their contents alike, and a hub
    data set that has changed makes new runs.
    """
    settings = spec.to_dict()
    told = {name: settings[name] for name in ("task", "training", "budget")}
    # The adapter's rate is in each run's own digest.
    told["training"] = {name: value for name, value in settings["training"].items() if name != "learning_rate"}  # type: ignore[attr-defined]
    told["data"] = _digest(dataclasses.asdict(splits))
    told["model"] = identity(spec.model)
    told["libraries"] = library_versions()
    return _digest(told)


def _digest(value: Any) -> str:
    """Twelve hex digits of a value in JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
