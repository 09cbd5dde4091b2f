"""The ways of training that are measured: nothing adapted, PEFT's, penalties as they are usually written, the nine.

All adapt every linear layer of one and the same base model, in float32, and move with Trainer's default optimiser
(fused AdamW, no weight decay). Tensors have the same rank r everywhere, so AdaLoRA, which starts at 1.5 times its
target, has `init_r` = r. ALoRA's tensors hold 2·r ranks, as is its default; its rounds
are not in these steps (`alora_scores.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from models import Model
from peft import get_peft_model
from torch import Tensor, nn

from rankwise.adapters.configs import CONFIGS

RUN = 100_000
"""Steps of the run that the measured ones are the middle of, as schedules are told."""
REFERENCE, FLOOR = "PEFT LoRA", "floor: frozen"
SORSAS = {f"sorsa, {residual}": residual for residual in ("offset", "cached")}
OURS = [name for method in CONFIGS for name in (SORSAS if method == "sorsa" else [method])]
"""Our ways, by name."""
Step = Callable[[], None]


def shared_copy(base: nn.Module) -> nn.Module:
    """A copy of a model's modules around its own weights, so that many ways fit in memory."""
    keep = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in keep})


def ways(model: Model, r: int, device: str, only: list[str] | None = None) -> dict[str, tuple[nn.Module, Step]]:
    """Every way by name: its model and its training step."""
    torch.manual_seed(0)
    base, batch = model.make().to(device).train(), {k: v.to(device) for k, v in model.batch().items()}
    base.requires_grad_(False)
    shared = {"target_modules": "all-linear", "task_type": model.task}
    phases = {"total_step": RUN, "tinit": 1, "tfinal": 1}
    falling = {"init_r": r, "target_r": max(1, round(r / 1.5))} | phases
    lora = peft.LoraConfig(r=r, lora_alpha=r, **shared)
    made: dict[str, Callable[[nn.Module], tuple[nn.Module, Step]]] = {
        FLOOR: lambda m: frozen(m, batch),
        REFERENCE: lambda m: plain(get_peft_model(m, lora), batch),
        "PEFT AdaLoRA": lambda m: pefts_adalora(m, peft.AdaLoraConfig(**falling, **shared), batch),
        "NNM by autograd": lambda m: naive_nnm(m, lora, batch),
        "SORSA by autograd": lambda m: naive_sorsa(m, r, lora, batch),
    }
    own: dict[str, dict[str, Any]] = {"adalora": falling, "salora": phases | {"r": r}, "alora": {"rounds": 0, "r": r}}
    own |= {name: {"residual": residual, "r": r} for name, residual in SORSAS.items()}
    for name in OURS:
        config = CONFIGS[name.partition(",")[0]](**own.get(name, {"r": r}), **shared)
        made[name] = lambda m, config=config: plain(get_peft_model(m, config), batch)
    return {name: make(shared_copy(base)) for name, make in made.items() if only is None or name in only}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Trainer's default."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)


def plain(
    model: nn.Module, batch: dict[str, Any], penalty: Callable[[], Tensor] | None = None
) -> tuple[nn.Module, Step]:
    """A Trainer's step: forward, backward, optimiser."""
    optimizer = optimizer_of(model)

    def step() -> None:
        loss = model(**batch).loss
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def frozen(model: nn.Module, batch: dict[str, Any]) -> tuple[nn.Module, Step]:
    """Nothing is trained; gradients flow to the embeddings' output, as with gradient checkpointing's own hook."""
    model.get_input_embeddings().register_forward_hook(lambda module, _, output: output.requires_grad_())
    return model, lambda: model(**batch).loss.backward()


def pefts_adalora(model: nn.Module, config: peft.AdaLoraConfig, batch: dict[str, Any]) -> tuple[nn.Module, Step]:
    """With the call after each step that PEFT's documentation asks for."""
    adapted: Any = get_peft_model(model, config)
    optimizer = optimizer_of(adapted)
    taken = 1

    def step() -> None:
        nonlocal taken
        adapted(**batch).loss.backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(taken)
        optimizer.zero_grad()
        taken += 1

    return adapted, step


def naive_nnm(model: nn.Module, config: peft.LoraConfig, batch: dict[str, Any]) -> tuple[nn.Module, Step]:
    """PEFT's LoRA with −5·Σ‖A‖_*/‖A‖_F in the loss, through torch's differentiable singular values."""
    adapted = get_peft_model(model, config)
    factors = [p for name, p in adapted.named_parameters() if "lora_A" in name]

    def penalty() -> Tensor:
        return sum(-5.0 * torch.linalg.svdvals(A).sum() / A.norm().detach() for A in factors)  # type: ignore[return-value]

    return plain(adapted, batch, penalty)


class NaiveSorsa(nn.Module):
    """y = W_r x + (U ⊙ S) Vᵀ x (eq. 7)."""

    def __init__(self, layer: Any, r: int) -> None:
        super().__init__()
        U, S, Vh = torch.svd_lowrank(layer.weight.detach(), r)
        self.U, self.S, self.Vh = nn.Parameter(U), nn.Parameter(S), nn.Parameter(Vh.mT.contiguous())
        self.bias = layer.bias
        self.register_buffer("residual", layer.weight.detach() - (U * S) @ Vh.mT)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.residual, self.bias) + F.linear(F.linear(x, self.Vh), self.U * self.S)

    def gap(self) -> Tensor:
        eye = torch.eye(len(self.S), device=self.S.device)
        return (self.U.mT @ self.U - eye).norm() + (self.Vh @ self.Vh.mT - eye).norm()


def naive_sorsa(model: nn.Module, r: int, config: peft.LoraConfig, batch: dict[str, Any]) -> tuple[nn.Module, Step]:
    """Equation 7 with the mean of eq. 8 in the loss, on the layers that PEFT's LoRA adapts; a head trains as PEFT's."""
    adapted: Any = get_peft_model(model, config)
    found = [name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    for name in found:
        parent, _, child = name.rpartition(".")
        layer = NaiveSorsa(adapted.get_submodule(name).base_layer, r)
        setattr(adapted.get_submodule(parent), child, layer)
    layers = [module for module in adapted.modules() if isinstance(module, NaiveSorsa)]
    weight = 4e-4 / 1e-5 / (2 * len(layers))
    return plain(adapted, batch, lambda: weight * sum(layer.gap() for layer in layers))  # type: ignore[arg-type,return-value]
