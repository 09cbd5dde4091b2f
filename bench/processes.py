"""What rules cost on several processes, in time and in bytes received: `python bench/processes.py`.

24 layers of 512 × 512 at r = 16, DDP and FSDP2 over gloo on this machine's cores, one thread a process; the optimiser
moves nothing, so that a step is the rules and their bookkeeping. Bytes are those that a process receives from others by
the collectives that rules call, as torch dispatches them (but not the few numbers of a norm); DDP and
FSDP2 have reduced the gradients before.

Then, on paper, a model of 70 billion weights (80 blocks, width 8192) on 64 GPUs: the bytes of one block at 1/32 and
1/16 of its width, continued as the straight line that they are on, times 80, and the time of that at `--rate` GB/s.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from harness import machine, options, write
from peft import get_peft_model
from scaling import Still, fields_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.adapters.configs import CONFIGS

SQUARE = [(512, 512)] * 24
WIDTH, BLOCKS, GPUS = 8192, 80, 64
BLOCK = [(1, 1), (1 / 8, 1), (1 / 8, 1), (1, 1), (3.5, 1), (3.5, 1), (1, 3.5)]
"""q, k, v, o, gate, up and down of Llama 70B, (out, in) over its width."""
STEPS = 6


class Received(TorchDispatchMode):
    """Adds up what collectives bring to this process."""

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world, self.bytes = world, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = func.name(), self.world - 1
        if name.startswith("_c10d_functional::all_gather_into_tensor"):
            self.bytes += args[0].nbytes * others
        elif name.startswith("c10d::allreduce_"):
            self.bytes += 2 * sum(t.nbytes for t in args[0]) * others // self.world
        elif name.startswith("c10d::broadcast_"):
            self.bytes += sum(t.nbytes for t in args[0])
        elif "c10d" in name and "wait" not in name and "_wrap" not in name:
            raise RuntimeError(f"a collective that is not counted: {name}")
        return func(*args, **(kwargs or {}))


def member(rank: int, world: int, meeting: str, wrap: str, sizes: list[tuple[int, int]], r: int, told: Any) -> None:
    """One process: seconds and bytes of a step for each method."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for name in CONFIGS:
        found = measured(name, world, wrap, sizes, r)
        if rank == 0:
            told.put((name, *found))
    dist.destroy_process_group()


def measured(name: str, world: int, wrap: str, sizes: list[tuple[int, int]], r: int) -> tuple[float, int]:
    torch.manual_seed(0)
    layers = nn.ModuleDict({str(i): nn.Linear(into, out) for i, (out, into) in enumerate(sizes)})
    base = Parallel(layers)
    fields = fields_of(name, r)
    model: Any = get_peft_model(base, CONFIGS[name](target_modules=[*layers], **fields))
    if wrap == "FSDP2":
        for layer in model.base_model.model.layers.values():
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = Still([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(4, max(into for _, into in sizes))).backward()
    for _ in range(2):  # the first gives starts that wait for a gradient
        optimizer.step()
    seconds = []
    with Received(world) as received:
        optimizer.step()
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), received.bytes


class Parallel(nn.Module):
    """Layers side by side, each on as much of the input as it takes."""

    def __init__(self, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x[:, : layer.in_features]).square().mean() for layer in self.layers.values())  # type: ignore[return-value]


def run(world: int, wrap: str, sizes: list[tuple[int, int]], r: int) -> dict[str, tuple[float, int]]:
    told = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        torch.multiprocessing.spawn(member, args=(world, meeting, wrap, sizes, r, told), nprocs=world)
    found = (told.get() for _ in CONFIGS)
    return {name: (seconds, moved) for name, seconds, moved in found}


def block(share: int) -> list[tuple[int, int]]:
    """One block at a share of its width."""
    return [(int(out * WIDTH / share), int(into * WIDTH / share)) for out, into in BLOCK]


def main() -> None:
    parser = options(__doc__, repeats=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rate", type=float, default=50.0, help="GB/s that a GPU receives at (50)")
    given = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    rows = []
    for wrap in ("DDP", "FSDP2"):
        found = {world: run(world, wrap, SQUARE, given.r) for world in given.processes}
        for name in CONFIGS:
            cells = {world: found[world][name] for world in found}
            rows += [
                {"method": name, "by": wrap, "processes": world, "ms": 1e3 * seconds, "bytes": moved}
                for world, (seconds, moved) in cells.items()
            ]
            told = ", ".join(f"{world}: {1e3 * s:.1f} ms {moved / 1e6:.2f} MB" for world, (s, moved) in cells.items())
            print(f"{wrap:<7}{name:<9}{told}", flush=True)
    small, large = (run(2, "FSDP2", block(share), given.r) for share in (32, 16))
    paper = []
    for name in CONFIGS:
        at = [2 * moved for _, moved in (small[name], large[name])]  # a process of two receives half
        whole = at[1] + 30 * (at[1] - at[0])  # a straight line through 1/32 and 1/16, to 32/32
        received = whole * BLOCKS * (GPUS - 1) / GPUS
        paper.append({"method": name, "bytes": received, "ms": 1e3 * received / (given.rate * 1e9)})
        print(f"70B, 64 GPUs, FSDP2: {name:<9}{received / 1e6:9.1f} MB a step, {paper[-1]['ms']:.2f} ms", flush=True)
    write(given.json, {"r": given.r, "rows": rows, "rate": given.rate, "paper": paper})


if __name__ == "__main__":
    main()
