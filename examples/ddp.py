"""AdaLoRA on several processes by DistributedDataParallel: rules run on every process alike.

torchrun --nproc-per-node 2 examples/ddp.py --steps 60
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

import rankwise


def main(steps: int) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32)).to(device)
    model = get_peft_model(net, rankwise.AdaLoraConfig(r=4, total_step=steps, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parallel = DistributedDataParallel(model)

    x = torch.randn(256, 32, device=device)
    target = x @ torch.randn(32, 3, device=device) @ torch.randn(3, 32, device=device)
    for _ in range(steps):  # every process takes its part of the batch
        loss = torch.nn.functional.mse_loss(parallel(x[rank::world]), target[rank::world])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if rank == 0:
        print(f"loss {loss.item():.2f}", rankwise.status(model))
    dist.barrier()  # none leaves while another prints
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
