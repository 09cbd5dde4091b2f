"""Peak memory of a training step of every way against PEFT's LoRA of the same rank: `python bench/memory.py`.

"step" is the most that is allocated at a time during a step (forward, backward, optimiser, rules), beyond what is there
when it begins: activations, gradients, intermediates. "state" is what an adapter holds for good beyond two factors of
rank r: averages, starting triplets, a cached weight, a larger capacity. The second step is measured, when the
optimiser's own state is there. On a CPU the numbers are those of torch's allocations as its profiler records them.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import machine, options, peak_of, write
from models import MODELS, Model
from torch import nn
from ways import OURS, REFERENCE, ways

from rankwise.adapters.layer import AdapterLayer

MOST = 1.02


def main() -> None:
    parser = options(__doc__, repeats=1)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{'model':<11}{'r':>4}  {'way':<20}{'step MiB':>10}{'ratio':>8}{'state MiB':>11}")
    rows = []
    for name in given.models:
        for r in given.ranks:
            for row in measure(MODELS[name], r, device):
                rows.append({"model": name, "r": r} | row)
                step, state = row["step"] / 2**20, row["state"] / 2**20
                print(f"{name:<11}{r:>4}  {row['way']:<20}{step:>10.1f}{row['ratio']:>8.3f}{state:>11.2f}", flush=True)
    worst = max((row for row in rows if row["way"] in OURS), key=lambda row: row["ratio"])
    met = "met" if worst["ratio"] <= MOST else "MISSED"
    print(f"aimed at: {MOST} at most; largest {worst['ratio']:.3f} ({worst['way']}, r = {worst['r']}): {met}")
    write(given.json, {"rows": rows})


def measure(model: Model, r: int, device: str) -> list[dict[str, Any]]:
    found = []
    for way, (adapted, step) in ways(model, r, device).items():
        step()
        found.append({"way": way, "step": peak_of(step), "state": state_of(adapted, r)})
    reference = next(row["step"] for row in found if row["way"] == REFERENCE)
    return [row | {"ratio": row["step"] / reference} for row in found]


def state_of(model: nn.Module, r: int) -> int:
    """Bytes that an adapter of ours holds beyond A and B of rank r."""
    total = 0
    for layer in (module for module in model.modules() if isinstance(module, AdapterLayer)):
        tensors = layer.tensors("default")
        held = sum(t.nbytes for t in tensors.state_dict().values())
        held += 0 if tensors.folded is None else tensors.folded[1].nbytes
        total += held - 4 * r * (tensors.size.out + tensors.size.into)
    return total


if __name__ == "__main__":
    main()
