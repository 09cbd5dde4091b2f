"""What the launchers start: every method, by Trainer or bare under DDP. `launched.py FOLDER trainer|bare`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import test_processes
import test_trainer_processes
import torch
import torch.distributed as dist

from cases import CASES


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if how == "bare" and world > 1:
        dist.init_process_group("gloo")
    for name in CASES:
        (folder / name).mkdir(exist_ok=True)
        if how == "trainer":
            test_trainer_processes.run(rank, name, folder / name, None, world)
        else:
            test_processes.by_ddp(rank, name, folder / name, world, test_processes.ACCUMULATE)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
