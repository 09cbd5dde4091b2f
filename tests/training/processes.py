"""A few processes that train together over gloo, as tests start them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
"""Accelerate wants one, though the processes have met already."""
FORK = multiprocessing.get_context("fork")


def together(target: Callable[..., None], *arguments: Any, count: int = 2) -> list[int | None]:
    """Run `target(rank, *arguments)` in so many processes of one gloo group; their exit codes."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        processes = [
            FORK.Process(target=_member, args=(target, rank, count, meeting, arguments)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]


def _member(target: Callable[..., None], rank: int, count: int, meeting: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    forget_accelerate()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)} | PLACE
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    target(rank, *arguments)
    if count > 1:
        dist.barrier()  # gloo's threads have let go of Python's tensors before the interpreter ends
        dist.destroy_process_group()


def forget_accelerate() -> None:
    """Let accelerate look at this process anew: a fork inherits what its parent took itself for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
