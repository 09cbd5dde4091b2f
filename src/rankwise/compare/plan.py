"""From a SPEC to the list of its runs, everything checked that can be checked before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from peft import get_peft_model

from rankwise.adapters.configs import CONFIGS, AdapterConfig
from rankwise.compare.data import Splits, load_splits
from rankwise.compare.models import model_skeleton, open_tokenizer
from rankwise.compare.spec import MethodEntry, Spec
from rankwise.errors import ArgumentError, nearest


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    label: str
    """Unique among the SPEC's methods: the method's name, and what sets it apart where a method comes twice."""
    entry: MethodEntry
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
    for entry in spec.methods:
        make_config(spec, entry)
    splits = load_splits(spec.data, spec.task)
    steps = _steps(spec, len(splits.train.text))
    open_tokenizer(spec.model)
    for entry in spec.methods:
        config = make_config(spec, entry)
        config.final_step(getattr(config, "total_step", None) or steps)
        get_peft_model(model_skeleton(spec.model, splits.labels), config, low_cpu_mem_usage=True)
    runs = [_run(spec, entry, seed) for seed in spec.seeds for entry in spec.methods]
    return Plan(spec, splits, steps, tuple(runs))


def make_config(spec: Spec, entry: MethodEntry) -> AdapterConfig:
    """The config of one method of the SPEC.

    Raises:
        ArgumentError: there is no such method, or it has no such field, or a value breaks its rule.
    """
    if entry.name not in CONFIGS:
        raise ArgumentError("methods", f"be methods of rankwise ({nearest(entry.name, CONFIGS)})", entry.name)
    known = [field.name for field in dataclasses.fields(CONFIGS[entry.name]) if field.init]
    for name, value in entry.fields.items():
        if name not in known:
            raise ArgumentError(f"{entry.name}.{name}", f"be a field of the method ({nearest(name, known)})", value)
    targets = spec.task.target_modules
    shared = {"r": spec.budget.r, "target_modules": targets if isinstance(targets, str) else list(targets)}
    return CONFIGS[entry.name](**shared | entry.fields, task_type="SEQ_CLS")  # type: ignore[arg-type]


def _steps(spec: Spec, examples: int) -> int:
    if spec.training.steps is not None:
        return spec.training.steps
    return math.ceil(spec.training.epochs * math.ceil(examples / spec.training.batch_size))  # type: ignore[operator]


def _run(spec: Spec, entry: MethodEntry, seed: int) -> Run:
    label, rate = _label(entry, spec.methods), entry.learning_rate or spec.training.learning_rate
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in entry.name)
    return Run(label, entry, seed, rate, f"{stem}--{_digest(spec, entry)}--seed{seed}")


def _label(entry: MethodEntry, entries: tuple[MethodEntry, ...]) -> str:
    """The name alone; for a name that comes more than once, what was set for it."""
    if sum(other.name == entry.name for other in entries) == 1:
        return entry.name
    rate = {"lr": entry.learning_rate} if entry.learning_rate else {}
    return " ".join([entry.name, *(f"{name}={value}" for name, value in (rate | entry.fields).items())])


def _digest(spec: Spec, entry: MethodEntry) -> str:
    """Twelve hex digits of everything that shapes a run: the SPEC without its output, the entry, the data itself."""
    told = {key: value for key, value in spec.to_dict().items() if key not in ("output", "methods", "seeds")}
    files = [spec.data.train, spec.data.test, spec.data.validation]
    told["contents"] = [_hash(file) for file in files if file is not None]
    told["entry"] = dataclasses.asdict(entry)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
