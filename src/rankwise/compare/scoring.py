"""What a trainer is told in order to score, whether it trains before or not."""

from __future__ import annotations

from typing import Any

import torch

from rankwise.compare.spec import Training
from rankwise.compare.together import on_cpus


def scoring_arguments(training: Training) -> dict[str, Any]:
    """The fields of transformers' TrainingArguments that scores depend on, and those that keep it silent."""
    return {
        "bf16": training.precision == "bfloat16",
        "use_cpu": bool(on_cpus()) or not torch.accelerator.is_available(),
        # Without gradients a batch takes half the memory.
        "per_device_eval_batch_size": 2 * training.batch_size // training.accumulation,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }
