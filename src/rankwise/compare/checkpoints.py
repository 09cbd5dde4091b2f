"""Finding where a stopped run can go on: the newest checkpoint that was written whole."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

PARTS = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""What a Trainer writes before its state, which comes last."""


def newest_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint of a Trainer's output folder, None if there is none.

    A process killed while saving leaves a folder that the Trainer's own search would pick, and fail on.
    """
    found = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    return next((checkpoint for checkpoint in found if _is_whole(checkpoint)), None)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / PARTS[0], framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all((checkpoint / part).is_file() for part in PARTS)
