"""Whether an export computes what its adapter computes: the logits of the whole model, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rankwise.base_models import open_model, skeleton
from rankwise.export.base import told_base, trained_as
from rankwise.export.fitted import fitted
from rankwise.export.lora_config import saved_config
from rankwise.export.reader import TENSORS, read_tensors

SAMPLES, TOKENS = 2, 16


@torch.no_grad()
def logits_error(model: str | Path, adapter: Path, export: Path) -> float:
    """max |logits of the export − logits of the adapter| / max |logits of the adapter|, in float32.

    On random tokens, the same at each call. Both adapters are loaded by PEFT, one after the other.

    Raises:
        ArgumentError: the base model does not open.
    """
    found = []
    tensors = read_tensors(export / TENSORS)
    for folder in (adapter, export):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # weights that the checkpoint lacks are drawn, and must be drawn alike
            whole = PeftModel.from_pretrained(_float32(model, adapter, tensors), str(folder)).eval()
        tokens = torch.randint(
            0, whole.config.vocab_size, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)
        )
        # One after the other, since classifiers without a padding token take no batches.
        outputs: list[Any] = [whole(sample[None]) for sample in tokens]
        found.append(torch.cat([output[0].float() for output in outputs]))
    return float((found[1] - found[0]).abs().max() / found[0].abs().max())


def _float32(model: str | Path, adapter: Path, tensors: Mapping[str, Tensor]) -> Any:
    """The base model in float32, as the class whose modules the adapter names, with its labels and vocabulary."""
    config = saved_config(adapter)
    name, revision = told_base(model, config, adapter)
    told: dict[str, Any] = {
        "task": config.get("task_type"),
        "revision": revision,
        "trained_as": trained_as(config),
    }
    bare: Any = skeleton(name, **told)
    trained: Any = fitted(bare, tensors)
    if trained is not bare:
        told |= {"config": trained.config, "ignore_mismatched_sizes": True}
    return open_model(name, **told, dtype=torch.float32)
