"""What a layer costs apart from arithmetic: ten layers of 8 × 8 on one input, per layer: `python bench/overhead.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import in_turns, machine, options, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from ways import REFERENCE

from rankwise.adapters.configs import CONFIGS

LAYERS, WIDTH, R = 10, 8, 2
TOLD: dict[str, dict[str, Any]] = {
    name: {"total_step": 1000, "tinit": 1, "tfinal": 1} for name in ("adalora", "salora")
}


def main() -> None:
    given = options(__doc__, repeats=300, threads=1).parse_args()
    torch.set_num_threads(given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    names = [str(i) for i in range(LAYERS)]
    configs = {REFERENCE: LoraConfig(r=R, target_modules=names)}
    configs |= {name: c(r=R, target_modules=names, **TOLD.get(name, {})) for name, c in CONFIGS.items()}
    models = {"no adapter": layers().requires_grad_(False)}
    models |= {name: get_peft_model(layers(), config).train() for name, config in configs.items()}
    x = torch.randn(1, 1, WIDTH, requires_grad=True)
    forward = median_us({name: forward_of(model, x) for name, model in models.items()}, given.repeats)
    both = median_us({name: both_of(model, x) for name, model in models.items()}, given.repeats)
    rows = [{"way": name, "forward_us": forward[name], "both_us": both[name]} for name in models]
    for row in rows:
        print(f"{row['way']:<14}forward {row['forward_us']:>5.0f} µs, with backward {row['both_us']:>5.0f} µs a layer")
    write(given.json, {"repeats": given.repeats, "rows": rows})


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def forward_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: model(x)


def both_of(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    return lambda: model(x).sum().backward()


def median_us(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Microseconds a layer."""
    return {name: 1e6 * statistics.median(taken) / LAYERS for name, taken in in_turns(ways, repeats).items()}


if __name__ == "__main__":
    main()
