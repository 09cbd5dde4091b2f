"""From a SPEC to the list of its runs, everything checked that can be checked before training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import NoMatchingPeftModuleError, PeftConfig, get_peft_model
from transformers import PreTrainedModel

from rankwise.adapters.configs import CONFIGS, AdapterConfig
from rankwise.compare.data import Splits, load_splits
from rankwise.compare.models import locate, model_skeleton, open_tokenizer, weight_files
from rankwise.compare.spec import MethodEntry, Spec
from rankwise.errors import ArgumentError, nearest
from rankwise.export.lora import check_exportable
from rankwise.methods import METHODS


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
    if spec.output.exists() and not spec.output.is_dir():
        raise ArgumentError("output", "be a folder, or not exist yet", str(spec.output))
    for entry in spec.methods:
        check_exportable(make_config(spec, entry))
    tokenizer = open_tokenizer(spec.model)
    splits = load_splits(spec.data, spec.task)
    steps = _steps(spec, len(splits.train.text))
    for entry in spec.methods:
        config, model = make_config(spec, entry), model_skeleton(spec.model, splits.labels)
        _check_length(spec, model, tokenizer)
        _check_schedule(entry, config, steps)
        _check_targets(model, config)
    runs = [_run(spec, entry, seed) for seed in spec.seeds for entry in spec.methods]
    return Plan(spec, splits, steps, tuple(runs))


def make_config(spec: Spec, entry: MethodEntry) -> AdapterConfig:
    """The config of one method of the SPEC.

    Raises:
        ArgumentError: there is no such method, or it has no such field, or a value breaks its rule.
    """
    if entry.name not in CONFIGS:
        raise ArgumentError("methods", f"be methods of rankwise ({nearest(entry.name, CONFIGS)})", entry.name)
    pefts = {field.name for field in dataclasses.fields(PeftConfig)} | {"rankwise_format"}
    known = [field.name for field in dataclasses.fields(CONFIGS[entry.name]) if field.name not in pefts]
    for name, value in entry.fields.items():
        if name not in known:
            raise ArgumentError(f"{entry.name}.{name}", f"be a field of the method ({nearest(name, known)})", value)
    targets = spec.task.target_modules
    shared = {"r": spec.budget.r, "target_modules": targets if isinstance(targets, str) else list(targets)}
    return CONFIGS[entry.name](**shared | entry.fields, task_type="SEQ_CLS")  # type: ignore[arg-type]


def _check_length(spec: Spec, model: PreTrainedModel, tokenizer: Any) -> None:
    positions = min(getattr(model.config, "max_position_embeddings", None) or math.inf, tokenizer.model_max_length)
    if spec.task.max_length > positions:
        raise ArgumentError("task.max_length", f"be at most the model's positions, {positions}", spec.task.max_length)


def _check_schedule(entry: MethodEntry, config: AdapterConfig, steps: int) -> None:
    """Equal budgets need schedules that end with the run."""
    told = getattr(config, "total_step", None)
    if told not in (None, steps):
        raise ArgumentError(f"{entry.name}.total_step", f"be left out, or be the steps of the run, {steps}", told)
    config.final_step(steps)


def _check_targets(model: PreTrainedModel, config: AdapterConfig) -> None:
    try:
        get_peft_model(model, config, low_cpu_mem_usage=True)
    except NoMatchingPeftModuleError as error:
        seen = {"target_modules": config.target_modules, "layers_to_transform": config.layers_to_transform}
        raise ArgumentError("target_modules", "match modules together with exclude_modules and layers", seen) from error


def _steps(spec: Spec, examples: int) -> int:
    if spec.training.steps is not None:
        return spec.training.steps
    return math.ceil(spec.training.epochs * math.ceil(examples / spec.training.batch_size))  # type: ignore[operator]


def _run(spec: Spec, entry: MethodEntry, seed: int) -> Run:
    label = _label(entry, spec.methods)
    rate = entry.learning_rate or spec.training.learning_rate or METHODS[entry.name].suggested_rate
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
    told["weights"] = [_fingerprint(file) for file in weight_files(Path(locate(spec.model)))]
    told["entry"] = dataclasses.asdict(entry)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _fingerprint(weights: Path) -> str:
    """Size and last mebibyte: enough to tell a model that was trained on in place, without reading all of it."""
    size = weights.stat().st_size
    with weights.open("rb") as file:
        file.seek(max(0, size - 2**20))
        return f"{size}-{hashlib.sha256(file.read()).hexdigest()}"
