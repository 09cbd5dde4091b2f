"""The same training on the CPU and on another device: one tiny BERT under every method, in three precisions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS, AdapterConfig
from rankwise.adapters.lookup import adapted_layers

CPU = torch.device("cpu")
STEPS = 12
"""All schedules of `cases.py` end within them."""

Batch = dict[str, Tensor]

ROUNDING = {"float32": 1e-4, "bfloat16 autocast": 3e-2, "bfloat16 base": 5e-2}
"""By precision, how far numbers may be from the CPU's after a run, relative to their size: a few digits less than the
precision has."""
PRECISIONS = tuple(ROUNDING)


def rounding_on(device: torch.device, precision: str = "float32") -> float:
    """How far numbers may be from the CPU's. The simulated device runs the CPU's kernels; others round differently."""
    return ROUNDING[precision] * (1 if device.type == "sim" else 10)


def batch_on(device: torch.device) -> Batch:
    """The same tokens and labels at every call."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, 100, (8, 12), generator=generator)
    labels = torch.randint(0, 3, (8,), generator=generator)
    return {"input_ids": tokens.to(device), "labels": labels.to(device)}


def base(precision: str = "float32") -> Any:
    """The same model at every call, on the CPU."""
    model = tiny_bert()
    return model.to(torch.bfloat16) if precision == "bfloat16 base" else model


def config_of(name: str, **fields: Any) -> AdapterConfig:
    """A method's config.

    What scores ALoRA's ranks is a batch on the CPU, as users have it. They start at random, and there is one round:
    young ranks have scores that are equal to rounding, so that two devices would not move the same ones.
    """
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    told = {"score_batch": batch_on(CPU), "init_weights": False, "rounds": 1} if name == "alora" else {}
    return CONFIGS[name](**shared | CASES[name].alone | told | fields)


def adapted(name: str, device: torch.device, precision: str = "float32", **fields: Any) -> PeftModel:
    """A model with an adapter, made on the CPU, so that the start is the same everywhere, and moved."""
    torch.manual_seed(2)
    return get_peft_model(base(precision), config_of(name, **fields)).to(device).eval()


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW over what trains, with weight decay, which gates must not feel."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, **{"lr": 3e-3, "weight_decay": 0.1} | options)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where the precision asks for it."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16 autocast" else nullcontext()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, precision: str = "float32") -> list[float]:
    """Some steps on the one batch; the loss of each."""
    device = next(model.parameters()).device
    batch = batch_on(device)
    model.train()
    losses = []
    for _ in range(steps):
        with autocast(device, precision):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


def logits(model: Any) -> Tensor:
    """What the model computes, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(input_ids=batch_on(device)["input_ids"]).logits.float().cpu()


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is saved of adapters, on the CPU."""
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items() if "rankwise" in name}


def strays(model: nn.Module, device: torch.device) -> list[str]:
    """Tensors of the adapters that are not on the device."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, t in named if t.device.type != device.type]


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The dense update of every layer, on the CPU."""
    layers = adapted_layers(model, adapter)
    return {name: layer.get_delta_weight(adapter).detach().float().cpu() for name, layer in layers.items()}


def off(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()).clamp_min(1e-30))
