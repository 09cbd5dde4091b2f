"""Rules act on stacks: a step launches as many operations for many layers as for few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import CASES, Case
from rankwise.adapters.configs import CONFIGS


class Still(torch.optim.Optimizer):
    """Moves nothing; torch runs its hooks as for any optimiser."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2, "weight_decay": 0.1})

    def step(self, closure: Any = None) -> None:
        """Nothing."""


class Launches(TorchDispatchMode):
    """Counts operations that are no mere views."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.name() not in ("aten::detach", "aten::empty.memory_format")
        return func(*args, **(kwargs or {}))


def launches(name: str, case: Case, layers: int) -> list[int]:
    """Of three steps, the first of which also tells Deep LoRA its start."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))
    fields: dict[str, Any] = {"r": 4, "target_modules": [str(i) for i in range(layers)]} | case.alone
    fields |= {"rounds": 0, "score_batch": None} if name == "alora" else {}
    model = get_peft_model(base, CONFIGS[name](**fields)).train()
    optimizer = Still([p for p in model.parameters() if p.requires_grad])
    counts = []
    for _ in range(3):
        model(torch.randn(4, 8)).square().mean().backward()
        with Launches() as counter:
            optimizer.step()
        counts.append(counter.count)
    return counts


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
def test_as_many_for_eight_layers_as_for_two(name: str, case: Case) -> None:
    two, eight = launches(name, case, 2), launches(name, case, 8)
    assert two[1:] == eight[1:]
    assert all(count > 0 for count in two)
