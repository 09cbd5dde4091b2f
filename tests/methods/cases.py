"""One row per method: what the conformance suite cannot derive. A registered method without a row fails the suite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Tensors = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A method's row.

    `penalty` is λR of a list of layers, written out from the paper's equation in plain float64, one layer at a time;
    None says that the defaults add nothing to the loss. `peak` is the peak learning rate. `told` are fields that a
    trainer makes unnecessary.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    penalty: Callable[[Tensors, float], Tensor] | None = None
    start_error: float = 0.0
    exported_rank: int = 4
    """The rank an export of a trained r = 4 module may have at most."""
    exact: set[str] = field(default_factory=set)
    """Tensors that stay float32 and free from weight decay: gates, singular values, averages, multipliers."""
    buffers: set[str] = field(default_factory=set)
    """Tensors that no optimiser moves."""

    @property
    def alone(self) -> dict[str, Any]:
        """The fields for a loop without a trainer, of twelve steps."""
        return self.fields | self.told


def nnm(layers: Tensors, peak: float) -> Tensor:
    """−λ Σ ‖A‖_* / ‖A‖_F."""
    return -5.0 * sum(torch.linalg.matrix_norm(t["A"], "nuc") / t["A"].norm() for t in layers)  # type: ignore[return-value]


def gap(P: Tensor) -> Tensor:
    """‖PᵀP − I‖_F."""
    return (P.T @ P - torch.eye(P.shape[1], dtype=P.dtype)).norm()


def adalora(layers: Tensors, peak: float) -> Tensor:
    """γ times the mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over the 2L matrices."""
    return 0.1 * sum(gap(t["P"]) + gap(t["Q"].T) for t in layers) / (2 * len(layers))  # type: ignore[return-value]


def sorsa(layers: Tensors, peak: float) -> Tensor:
    """γ/η_d times the mean of ‖UᵀU − I‖_F and ‖VᵀV − I‖_F over the 2L matrices."""
    return 4e-4 / peak * sum(gap(t["U"]) + gap(t["Vh"].T) for t in layers) / (2 * len(layers))  # type: ignore[return-value]


def salora(layers: Tensors, peak: float) -> Tensor:
    """β times the mean of ‖BᵀB − I‖_F and ‖AAᵀ − I‖_F over the 2L matrices; at the first steps no gate moves."""
    return 0.1 * sum(gap(t["B"]) + gap(t["A"].T) for t in layers) / (2 * len(layers))  # type: ignore[return-value]


def score(model: nn.Module) -> float:
    """Any score of any model, for rounds of ALoRA: minus the mean square of its logits on fixed tokens."""
    tokens = torch.arange(24).view(4, 6) + 2
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    return -float(model(input_ids=tokens, **decoder).logits.float().square().mean())


AVERAGES = {f"{name}_{kind}" for name in ("P", "Lambda", "Q") for kind in ("mean", "deviation")}
"""AdaLoRA's Ī and Ū."""

CASES: dict[str, Case] = {
    "lora": Case(),
    "nnm": Case(penalty=nnm),
    "adalora": Case(
        told={"total_step": 12},
        penalty=adalora,
        exported_rank=6,
        exact={"Lambda"} | AVERAGES,
        buffers={"kept", "closed"} | AVERAGES,
    ),
    "sora": Case({"sparse_weight": 5.0}, exact={"g"}, buffers={"closed"}),
    "sorsa": Case(
        penalty=sorsa,
        start_error=1e-6,
        exported_rank=8,
        exact={"S", "U0", "S0", "Vh0"},
        buffers={"U0", "S0", "Vh0"},
    ),
    "alora": Case(
        told={"rounds": 2, "warmup_steps": 3, "recovery_steps": 3, "prune_per_round": 4, "score_batch": score},
        exported_rank=8,
        buffers={"active", "seed", "closed"},
    ),
    "salora": Case(
        {"tinit": 2, "tfinal": 4},
        told={"total_step": 12},
        penalty=salora,
        exact={"log_theta", "u", "multiplier"},
        buffers={"u", "multiplier", "seed", "closed"},
    ),
    "nblora": Case(exact={"delta"}, buffers={"delta"}),
    "deep": Case(),
}
