"""Where the time of a training step goes, way by way: `python bench/budget.py`.

Milliseconds of torch's operations by kind, from its profiler, over four steps after two; "Python" is what the kinds
leave of the wall time of the same steps.
"""

from __future__ import annotations

import time
from collections import Counter

import torch
from harness import machine, options, write
from models import MODELS
from torch.profiler import ProfilerActivity, profile
from ways import FLOOR, OURS, REFERENCE, Step, ways

STEPS = 4
KINDS = {
    "products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "sums, scales": ("add", "add_", "mul", "mul_", "sub", "div", "div_"),
    "copies": ("copy_", "cat"),
    "dropout": ("bernoulli_",),
    "factorisations": ("_linalg_eigh", "linalg_lu_factor_ex", "linalg_lu_solve"),
    "optimiser": ("_fused_adamw_",),
}


def main() -> None:
    parser = options(__doc__, repeats=1)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--ways", nargs="+", default=[FLOOR, REFERENCE, *OURS])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows = []
    for r in given.ranks:
        for way, (_, step) in ways(MODELS[given.model], r, device, given.ways).items():
            spent = kinds_of(step)
            rows.append({"model": given.model, "r": r, "way": way, "ms": spent})
            told = ", ".join(f"{kind} {ms:.1f}" for kind, ms in spent.items())
            print(f"r = {r:<4}{way:<18}{sum(spent.values()):7.1f} ms: {told}", flush=True)
    write(given.json, {"rows": rows})


def kinds_of(step: Step) -> dict[str, float]:
    """Milliseconds a step by kind of operation."""
    for _ in range(2):
        step()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
        wall = 1e3 * (time.perf_counter() - began) / STEPS
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    spent = Counter(dict.fromkeys([*KINDS, "other operations"], 0.0))
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            spent[kind_of.get(event.key, "other operations")] += event.self_cpu_time_total / 1e3 / STEPS
    return {**spent, "Python": max(0.0, wall - sum(spent.values()))}


if __name__ == "__main__":
    main()
