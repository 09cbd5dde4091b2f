"""What the launchers start, for every method: `launched.py FOLDER bare|accelerator|trainer`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import test_processes
import test_trainer_processes
import torch
import torch.distributed as dist
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from cases import CASES


def by_accelerator(rank: int, name: str, folder: Path, world: int) -> None:
    """As `test_processes.train`, which micro-batches of their own `no_sync` do not change."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=test_processes.ACCUMULATE)
    assert accelerator.num_processes == world
    model = test_processes.adapted(name, seed=rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, lr=0.05, weight_decay=0.1))
    for step in range(test_processes.STEPS):
        whole = test_processes.batch(step)
        for part in range(test_processes.ACCUMULATE):
            mine = {key: value[part :: test_processes.ACCUMULATE][rank::world] for key, value in whole.items()}
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**mine).loss)
                optimizer.step()
                optimizer.zero_grad()
    save_file(get_peft_model_state_dict(model), folder / f"{world}-{rank}.safetensors")


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if how == "bare" and world > 1:
        dist.init_process_group("gloo")
    for name in CASES:
        (folder / name).mkdir(exist_ok=True)
        if how == "trainer":
            test_trainer_processes.run(rank, name, folder / name, None, world)
        elif how == "accelerator":
            by_accelerator(rank, name, folder / name, world)
        else:
            test_processes.by_ddp(rank, name, folder / name, world, test_processes.ACCUMULATE)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
