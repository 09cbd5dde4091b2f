"""One run on several processes: what `accelerate launch` starts, and who of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")


def launch(processes: int, arguments: list[str]) -> int:
    """Run `rankwise ARGUMENTS` on so many processes by `accelerate launch`; the exit code.

    With a GPU for each where there are GPUs, else on CPUs over gloo, to which accelerate gets by `--multi_gpu` alone:
    its `--cpu` starts one process, whatever it is asked for.
    """
    options = {"num_processes": processes, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    told = [f"--{name}={value}" for name, value in options.items()]
    command = ["accelerate.commands.launch", "--multi_gpu", "--main_process_port=0", *told]
    return subprocess.run(
        [sys.executable, "-m", *command, "-m", "rankwise.cli.main", *arguments], check=False
    ).returncode


def processes() -> int:
    """How many processes run this together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpus() -> bool | None:
    """True to force training on CPUs (several processes, no GPU); None lets the Trainer choose."""
    return True if processes() > 1 and not torch.cuda.is_available() else None


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return processes() == 1 or PartialState(cpu=bool(on_cpus())).is_main_process


def as_first(value: T) -> T:
    """What the first process holds; all must ask."""
    if processes() == 1:
        return value
    PartialState(cpu=bool(on_cpus()))
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]
