"""Where the time of a training step goes, way by way: `python bench/budget.py`.

Milliseconds of torch's operations by kind, from its profiler, in the fastest of the rounds in which all ways
take turns. "Python" is what the kinds leave of a step's wall time, which the profiler makes longer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from operator import itemgetter

import torch
from harness import in_turns, machine, options, write
from models import MODELS
from torch.profiler import ProfilerActivity, profile
from ways import FLOOR, OURS, REFERENCE, Step, ways

KINDS = {
    "products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "sums, scales": ("add", "add_", "mul", "mul_", "sub", "div", "div_"),
    "copies": ("copy_", "cat"),
    "dropout": ("bernoulli_",),
    "factorisations": ("_linalg_eigh", "linalg_lu_factor_ex", "linalg_lu_solve"),
    "optimiser": ("_fused_adamw_",),
}


def main() -> None:
    parser = options(__doc__, repeats=12)
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--ways", nargs="+", default=[FLOOR, REFERENCE, *OURS])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows = []
    for r in given.ranks:
        spent: dict[str, list[dict[str, float]]] = {way: [] for way in given.ways}
        made = ways(MODELS[given.model], r, device, given.ways)
        in_turns({way: profiled(step, spent[way]) for way, (_, step) in made.items()}, given.repeats)
        for way, rounds in spent.items():
            ms = min(rounds[1:], key=itemgetter("all"))
            rows += [{"model": given.model, "r": r, "way": way, "kind": kind, "ms": ms[kind]} for kind in ms]
            told = ", ".join(f"{kind} {value:.1f}" for kind, value in ms.items())
            print(f"r = {r:<4}{way:<18}{told}", flush=True)
    write(given.json, {"rows": rows})


def profiled(step: Step, rounds: list[dict[str, float]]) -> Callable[[], None]:
    """A step that leaves its milliseconds by kind of operation in `rounds`."""

    def run() -> None:
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
            wall = 1e3 * (time.perf_counter() - began)
        rounds.append(kinds_of(profiler, wall))

    return run


def kinds_of(profiler: profile, wall: float) -> dict[str, float]:
    """Milliseconds by kind of operation of `wall` in all."""
    kind_of = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
    spent = Counter(dict.fromkeys([*KINDS, "other operations"], 0.0))
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            spent[kind_of.get(event.key, "other operations")] += event.self_cpu_time_total / 1e3
    return {**spent, "Python": max(0.0, wall - sum(spent.values())), "all": wall}


if __name__ == "__main__":
    main()
