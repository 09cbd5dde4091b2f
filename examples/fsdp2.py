"""SORSA on several processes by FSDP2: weights are sharded, rules act on whole matrices, the save is one plain adapter.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 60
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rankwise


def main(steps: int) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    mesh = init_device_mesh(device.type, (world,))
    torch.manual_seed(0)  # the same on every process: each keeps its shard of the same start
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32)).to(device)
    model = get_peft_model(net, rankwise.SorsaConfig(r=4, target_modules=["0", "2"]))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    x = torch.randn(256, 32, device=device)
    target = x @ torch.randn(32, 3, device=device) @ torch.randn(3, 32, device=device)
    for _ in range(steps):  # every process takes its part of the batch
        loss = torch.nn.functional.mse_loss(model(x[rank::world]), target[rank::world])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    told = rankwise.status(model)  # on every process, since it gathers
    if rank == 0:
        model.save_pretrained(tempfile.mkdtemp(), state_dict=whole)
        print(f"loss {loss.item():.2f}", told)
    dist.barrier()  # none leaves while another saves
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
