"""A base model of three linear layers, whose forward pass takes a fraction of a millisecond, under every method."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from cases import CASES
from rankwise.adapters.configs import CONFIGS

WIDTH = 8
FINAL = {"adalora": 8, "salora": 8, "alora": 6}
"""The step, of twelve, at which the schedule of `cases.py` says that the ranks become final."""


def inputs(i: int) -> Tensor:
    """The i-th batch of four rows."""
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 + i))


def loss_of(model: nn.Module, i: int) -> Tensor:
    """The loss of the i-th batch."""
    x = inputs(i).requires_grad_()  # as embeddings give it, so that a backward pass runs through frozen layers too
    return (model(x) - x.detach().flip(-1)).square().mean()


def score(model: nn.Module) -> float:
    """Ranks of ALoRA are scored by this."""
    return -float(loss_of(model, 0))


def config_of(name: str, **fields: Any) -> Any:
    told = {"score_batch": score} if name == "alora" else {}
    targets = {"r": 4, "target_modules": ["0", "1", "2"]}
    return CONFIGS[name](**targets | CASES[name].alone | told | fields)


def base() -> nn.Module:
    """The same at every call."""
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))


def adapted(name: str, **fields: Any) -> Any:
    model = get_peft_model(base(), config_of(name, **fields))
    return model.train()


def trained(model: nn.Module, adapter: str = "") -> list[nn.Parameter]:
    """What requires gradients, or all that belongs to one adapter."""
    if adapter:
        return [p for name, p in model.named_parameters() if f".{adapter}." in name]
    return [p for p in model.parameters() if p.requires_grad]


def state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """A copy of everything that is saved of an adapter, counters included."""
    return {name: t.clone() for name, t in model.state_dict().items() if f".{adapter}." in name}


def check_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
