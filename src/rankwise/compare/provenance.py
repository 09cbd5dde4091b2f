"""Where a result comes from: library versions, the state of the user's repository, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from rankwise.compare.together import processes

LIBRARIES = ("rankwise", "torch", "peft", "transformers", "accelerate", "datasets", "tokenizers", "trl")
"""What has a hand in a run's numbers: another version of one of them makes another run."""

QUANTISES = "bitsandbytes"
"""What holds a model's weights in four or eight bits."""


def library_versions(*, quantised: bool = False) -> dict[str, str]:
    """The version of each of LIBRARIES that is installed, and of what quantises a model where one is quantised."""
    names = [*LIBRARIES, QUANTISES] if quantised else LIBRARIES
    return {name: version(name) for name in names if find_spec(name) is not None}


def git_state(folder: Path) -> str | None:
    """The commit that a folder is at, followed by `-dirty` where tracked files were changed; None outside git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    """Processor, cores and accelerator, and on how many processes the run was shared out."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shared = f", {processes()} processes" if processes() > 1 else ""
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}{shared}"
