"""An adapter's spectra over its training: from what a recorder wrote, or from the checkpoints of a trainer."""

from __future__ import annotations

import re
from pathlib import Path

from rankwise.errors import DataError
from rankwise.export.reader import TENSORS
from rankwise.inspection.found import is_ours, read_checkpoint
from rankwise.spectral import Measured, read_record
from rankwise.spectral.record import record_files

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""How Trainers of transformers and TRL name the folders of their checkpoints."""


def read_history(folder: Path, base: str | None = None) -> list[Measured]:
    """The spectra of an adapter at several steps, in their order.

    Args:
        folder: with the records of a `Recorder`, or with a trainer's `checkpoint-…` folders.
        base: the base model of an adapter of rankwise's; by default where it says.

    Raises:
        DataError: there are neither in the folder, or a file is broken.
        AdapterFileError: a checkpoint holds no adapter that can be read.
    """
    records = record_files(folder)
    if records:
        return [read_record(file) for file in records]
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise DataError(f"{folder} holds neither records (step-….json) nor checkpoints (checkpoint-…)")
    first = checkpoints[min(checkpoints)]
    model = None
    if is_ours(first):
        from rankwise.export.base import opened_base
        from rankwise.export.lora_config import read_config

        # Opened once for all of them: the shapes are the same.
        model = opened_base(base, read_config(first), first)
    return [read_checkpoint(checkpoints[step], step, model) for step in sorted(checkpoints)]


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoints by their steps; one in which the adapter's weights were never written is left out."""
    found: dict[int, Path] = {}
    for each in folder.glob("checkpoint-*"):
        named = CHECKPOINT.fullmatch(each.name)
        if named and (each / TENSORS).is_file():
            found[int(named[1])] = each
    return found
