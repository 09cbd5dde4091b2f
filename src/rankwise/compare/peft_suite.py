"""Results in the shape that PEFT's own comparison suite reads (`method_comparison/processing.py` in PEFT's repository).

Its table for language tasks ranks by accuracy, and tells the costs: memory, time, trained numbers, file size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankwise.compare.results import Result, result_files
from rankwise.compare.spec import CEILING
from rankwise.compare.summary import at_best_rates
from rankwise.errors import DataError
from rankwise.files import write_whole

ACCURACIES = ("accuracy", "exact_match")
"""Our metrics that the suite calls accuracy, the first that there is."""


def write_suite(output: Path, folder: Path, keys: Iterable[str] | None = None) -> list[Path]:
    """Write a file for every finished run, for PEFT's suite to read beside its own.

    Args:
        output: the output folder of a comparison.
        folder: where to write; it is made if it is missing.
        keys: the names of the result files to take, without `.json`; None for all.

    Returns:
        The files.

    Raises:
        DataError: there are no results, or a run has no accuracy.
    """
    written: list[Path] = []
    results = result_files(output / "results", keys)
    chosen = at_best_rates(list(results.values()))
    for key, result in results.items():
        if result not in chosen:  # a rate that the search tried and did not take
            continue
        adapter = output / "adapters" / key / "adapter_model.safetensors"
        size = adapter.stat().st_size if adapter.is_file() else 0
        record = suite_record(result, size)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{key}.json"
        write_whole(file, json.dumps(record, indent=1) + "\n")
        written.append(file)
    return written


def suite_record(result: Result, file_size: int) -> dict[str, Any]:
    """One run as PEFT's suite writes its own.

    Args:
        result: the run.
        file_size: bytes of the saved adapter, 0 where none was saved.

    Raises:
        DataError: the run was not scored by an accuracy.
    """
    scores = {result.metric: result.score} | result.extra_metrics
    accuracy = next((scores[name] for name in ACCURACIES if name in scores), None)
    if accuracy is None:
        raise DataError(
            f"PEFT's suite ranks by accuracy: {result.label} must be scored by {' or '.join(ACCURACIES)}; "
            f"found {result.metric}"
        )
    samples = result.steps * result.batch_size
    metrics: dict[str, Any] = {
        "step": result.steps,
        "test accuracy": accuracy,
        "train loss": result.train_loss[-1][1] if result.train_loss else None,
        "train samples": samples,
        "train total tokens": result.train_tokens or 0,
    }
    if result.forgetting is not None:
        metrics["forgetting"] = result.forgetting
    memory = result.peak_memory or 0
    versions = {f"{name}-version": version for name, version in result.versions.items()}
    return {
        "run_info": {
            "created_at": result.created,
            "total_time": result.seconds,
            "experiment_name": f"{result.method}/{result.label}--seed{result.seed}",
            "peft_branch": "",
            "train_config": {
                "model_id": result.model,
                "batch_size": result.batch_size,
                "max_steps": result.steps,
                "seed": result.seed,
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": result.learning_rate},
            },
            "peft_config": None if result.method == CEILING else {"peft_type": result.method.upper()} | result.fields,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": result.seconds_per_step * result.steps,
            "file_size": file_size,
            "num_trainable_params": result.parameters["initial"] + result.head_parameters,
            "status": "success",
            "metrics": [metrics],
        },
        "meta_info": {
            "package_info": versions | {"bitsandbytes-version": result.versions.get("bitsandbytes", "")},
            "system_info": {"machine": result.machine},
        },
    }
