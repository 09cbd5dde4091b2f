"""Scoring an adapter that exists already, as `compare` would have scored it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

import rankwise  # noqa: F401  PEFT then knows our adapters by their type
from rankwise.compare.data import load_splits
from rankwise.compare.models import open_for
from rankwise.compare.plan import check_quantising
from rankwise.compare.scoring import scoring_arguments
from rankwise.compare.spec import Spec
from rankwise.compare.tasks import Splits, Task
from rankwise.errors import ArgumentError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT calls the files of an adapter."""


def evaluate_adapter(adapter: str | Path, spec: Spec) -> dict[str, dict[str, float]]:
    """The metrics of a saved adapter on the SPEC's validation and test splits.

    Args:
        adapter: a folder that PEFT loads: an adapter of rankwise, its export, or any other one.
        spec: its model, data and task say what is scored and how; its methods do not matter.

    Returns:
        For each split, the task's metrics by name; the first one ranks.

    Raises:
        ArgumentError: the folder holds no adapter, or the adapter does not fit the model or the task.
        DataError: the data is not what the SPEC says.
    """
    adapter = Path(adapter)
    spec = spec.for_model()
    _check_files(adapter, spec.task)
    spec.task.check_packages()
    check_quantising(spec)
    processor = spec.task.open_processor(spec.model)
    splits = load_splits(spec.data, spec.task)
    base = open_for(spec.task, spec.model, splits, getattr(processor, "pad_token_id", None), spec.training)
    spec.task.check_model(base, processor)
    model = _with_adapter(base, adapter)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _scorer(spec, splits, model, processor, folder)
        spec.task.check_trainer(trainer, splits)
        parts = {"validation": splits.validation, "test": splits.test}
        return {name: spec.task.score(trainer, part, splits) for name, part in parts.items()}


def _check_files(adapter: Path, task: Task) -> None:
    """Refuse a folder without an adapter, and an adapter without the head that the task is scored by."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise ArgumentError("ADAPTER", f"be a folder with {name}", str(adapter))
    try:
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ArgumentError("ADAPTER", f"have whole weights ({WEIGHTS} is truncated)", str(adapter)) from error
    parts = {part for key in keys for part in key.split(".")}
    if task.head_modules and not parts & set(task.head_modules):
        heads = " or ".join(task.head_modules)
        raise ArgumentError("ADAPTER", f"hold the head of a {task.type} task ({heads})", str(adapter))


def _with_adapter(base: Any, adapter: Path) -> PeftModel:
    try:
        # PEFT's AdaLoRA runs only where it could train.
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).requires_grad_(False)
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise ArgumentError("ADAPTER", f"fit the SPEC's model and labels ({reason})", str(adapter)) from error


def _scorer(spec: Spec, splits: Splits, model: PeftModel, processor: Any, folder: str) -> Any:
    """The task's trainer, which is only asked to score."""
    arguments = spec.task.arguments({"output_dir": folder, **scoring_arguments(spec.training)})
    return spec.task.trainer_class(
        model=model,  # type: ignore[arg-type]
        args=arguments,
        processing_class=processor,
        **spec.task.trainer_data(splits, processor),
    )
