"""Finding where a stopped run can go on: the newest checkpoint that was written whole."""

from __future__ import annotations

import json
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open

PARTS = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt")
"""What a Trainer's first process writes before its state, which comes last."""


def newest_complete(folder: Path, processes: int = 1) -> Path | None:
    """The newest whole checkpoint of a Trainer's output folder, None if there is none.

    A process killed while saving leaves a folder that the Trainer's own search would pick, and fail on. Each process
    writes its own random state, at its own time: those of so many `processes` must be there, or the one of a single.
    """
    found = sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)
    return next((checkpoint for checkpoint in found if _is_whole(checkpoint, processes)), None)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _is_whole(checkpoint: Path, processes: int) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(checkpoint / PARTS[0], framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    random = [f"rng_state_{i}.pth" for i in range(processes)]
    alone = (checkpoint / "rng_state.pth").is_file()
    return all((checkpoint / part).is_file() for part in PARTS) and (
        alone or all(is_zipfile(checkpoint / part) for part in random)
    )
