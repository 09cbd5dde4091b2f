"""Whether an export computes what its adapter computes: the logits of the whole model, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from rankwise.base_models import open_model
from rankwise.export.source import saved_config, told_base

SAMPLES, TOKENS = 2, 16


@torch.no_grad()
def logits_error(model: str | Path, adapter: Path, export: Path) -> float:
    """max |logits of the export − logits of the adapter| / max |logits of the adapter|, in float32.

    On random tokens, the same at each call. Both adapters are loaded by PEFT, one after the other.

    Raises:
        ArgumentError: the base model does not open.
    """
    found = []
    for folder in (adapter, export):
        with torch.random.fork_rng():
            torch.manual_seed(0)  # weights that the checkpoint lacks are drawn, and must be drawn alike
            whole = PeftModel.from_pretrained(_float32(model, adapter), str(folder)).eval()
        tokens = torch.randint(
            0, whole.config.vocab_size, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0)
        )
        output: Any = whole(tokens)
        found.append(output[0].float())
    return float((found[1] - found[0]).abs().max() / found[0].abs().max())


def _float32(model: str | Path, adapter: Path) -> Any:
    """The base model in float32, as the class whose modules the adapter names."""
    config = saved_config(adapter)
    name, revision = told_base(model, config, adapter)
    trained_as = (config.get("auto_mapping") or {}).get("base_model_class")
    task = config.get("task_type")
    return open_model(name, task, revision=revision, trained_as=trained_as, dtype=torch.float32)
