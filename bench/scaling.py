"""What the rules of a step cost as models grow, in time and in kernel launches: `python bench/scaling.py`.

A stack of 512 × 512 layers is adapted; the optimiser moves nothing, so that a step is the rules and their bookkeeping
alone. Launches are operations that compute something, as torch dispatches them: on a GPU each is one kernel, those
over lists of tensors one per some hundred tensors. With a GPU, kernels are counted too. AdaLoRA allocates in every step
here, the dearest there is.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from harness import in_turns, kernels_of, machine, options, write
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from ways import RUN

from rankwise.adapters.configs import CONFIGS

WIDTH = 512
LAYERS, RANKS = (6, 24, 96), (4, 16, 64, 256)
TOLD: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": RUN, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "salora": {"total_step": RUN, "tinit": 1, "tfinal": 1},
    "alora": {"rounds": 0},
    "sorsa": {"svd_iterations": 1},
}


def fields_of(name: str, r: int) -> dict[str, Any]:
    """AdaLoRA starts at r as the others do, not at 1.5 times its target."""
    start = {"init_r": r, "target_r": max(1, r // 2)} if name == "adalora" else {"r": r}
    return start | TOLD.get(name, {})


class Still(torch.optim.Optimizer):
    """Moves nothing; torch runs its hooks as for any optimiser."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


class Launches(TorchDispatchMode):
    """Counts operations that are no mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.name() not in ("aten::detach", "aten::empty.memory_format")
        return func(*args, **(kwargs or {}))


def stepper(name: str, layers: int, r: int, device: str) -> Still:
    """An optimiser of a method's adapter on so many layers, with gradients, after two steps."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(device)
    names = [str(i) for i in range(layers)]
    model = get_peft_model(base, CONFIGS[name](target_modules=names, **fields_of(name, r)))
    optimizer = Still([p for p in model.parameters() if p.requires_grad])
    model(torch.randn(8, WIDTH, device=device)).square().mean().backward()
    optimizer.step()
    optimizer.step()
    optimizer.model = model  # type: ignore[attr-defined]  rules find layers that live
    return optimizer


def launches(optimizer: Still) -> int:
    with Launches() as counter:
        optimizer.step()
    return counter.count


def main() -> None:
    parser = options(__doc__, repeats=10)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    shapes = [(layers, 16) for layers in given.layers] + [(24, r) for r in given.ranks if r != 16]
    print("ms of rules per step, median and quartiles, and launches, at layers × r")
    print(" " * 9 + "".join(f"{f'{n} × {r}':>26}" for n, r in shapes))
    rows = []
    for name in CONFIGS:
        told = []
        for layers, r in shapes:
            optimizer = stepper(name, layers, r, device)
            low, median, high = statistics.quantiles(in_turns({"": optimizer.step}, given.repeats)[""], n=4)
            times = {"ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}
            row = {"method": name, "layers": layers, "r": r, **times, "launches": launches(optimizer)}
            rows.append(row | {"kernels": kernels_of(optimizer.step)})
            told.append("{ms:.1f} ({low:.1f}–{high:.1f}) / {launches}".format(**row))
        print(f"{name:<9}" + "".join(f"{text:>26}" for text in told), flush=True)
    grew = {
        row["method"]
        for row in rows
        for other in rows
        if (row["method"], row["r"]) == (other["method"], other["r"]) and row["launches"] != other["launches"]
    }
    print(f"aimed at: as many launches for {max(given.layers)} layers as for {min(given.layers)}: ", end="")
    print(f"MISSED by {', '.join(sorted(grew))}" if grew else "met")
    write(given.json, {"repeats": given.repeats, "width": WIDTH, "rows": rows})


if __name__ == "__main__":
    main()
