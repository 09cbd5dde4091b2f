"""Deep LoRA: a product of square factors inside a subspace that the first gradient tells.

Yaras, Wang, Balzano and Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation", arXiv
2406.04112. A full-width product ΔW = W_L ⋯ W_1 that starts at W_l(0) = ε·(orthogonal) moves only in a subspace known at
the start (theorem 2.1), so it is trained there:

    ΔW = U·(W_L ⋯ W_1)·Vᵀ   (8),   W_l(0) = ε·I of size r × r, r = 2·r̂,

U and V from the r̂ leading singular vectors of ∂L/∂W at W0 (`linalg.subspace`), trained at γ times the learning rate.
The gradient is that of one batch: of `init_batch`, else of the first step, which then only initialises. Until then the
update is zero. The authors' code builds the full-width factors first; here one layer's gradient is held at a time.
There is no lora_alpha / r scale. Extra parameters beside U and V: L·r² a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_batch, require_choice, require_int, require_number
from rankwise.errors import ArgumentError
from rankwise.linalg.chain import chain
from rankwise.linalg.subspace import gradient_subspace
from rankwise.methods.base import Method, gaussian, register
from rankwise.methods.stack import Size, Slot, Stack, Step
from rankwise.update import Parts

LEAST = 1e-30
"""The least ε^L: from a smaller one no gradient gets through in float32."""
FAINT = 1e-8
"""The least ε^(L−1) at which Adam may move the factors: it divides gradients by their size plus an eps of 1e-8."""
CLEAR = 1e-6
"""ε^(L−1) at the default depth and scale, where Adam does move them: what a start that is too faint should come to."""
RANDOM_RATE = 3e-3
"""Suggested peak rate for `init="random"`, whose outer factors move at the whole rate (its card has the search)."""


@register
@dataclass
class Deep(Method):
    """Deep overparameterised low-rank adaptation, compressed."""

    method: ClassVar[str] = "deep"
    config_name: ClassVar[str] = "DeepLoraConfig"
    summary: ClassVar[str] = "r at most; depth keeps unneeded directions near 0, and an export drops them"
    scaled: ClassVar[bool] = False
    linear_only: ClassVar[bool] = True
    cancels: ClassVar[bool] = True
    prepared_from: ClassVar[tuple[str, ...]] = ("W",)
    negligible: ClassVar[float] = 1e-6
    suggested_rate: ClassVar[float] = 1e-2
    refuses_updates: ClassVar[str | None] = "Deep LoRA's updates lie in a subspace that a gradient tells"

    depth: int = field(default=3, metadata={"help": "L, factors in the product"})
    init_scale: float | None = field(
        default=None, metadata={"help": "ε, scale of every factor at the start; None: 10^(−9/L) at L > 3, else 1e-3"}
    )
    outer_lr_ratio: float = field(default=1e-2, metadata={"help": "γ, learning rate of U and V relative to the W_l"})
    init: str = field(
        default="gradient",
        metadata={"help": '"gradient" of the first batch, or "random": narrow ε-orthogonal factors, all at one rate'},
    )
    init_batch: Any = field(
        default=None,
        metadata={
            "help": "model inputs whose output has .loss, or a function model → loss; None: the first step's batch",
            "saved": False,
        },
    )

    def check(self) -> None:
        """At least two factors, an even r, positive numbers."""
        super().check()
        require_int("depth", self.depth, least=2)
        if self.init_scale is not None:
            require_number("init_scale", self.init_scale, least=LEAST ** (1 / self.depth))
        require_number("outer_lr_ratio", self.outer_lr_ratio)
        require_choice("init", self.init, ("gradient", "random"))
        if self.init == "gradient" and self.r % 2 and self.r > 1:
            raise ArgumentError("r", "be even: half of it holds the gradient's left directions, half the right", self.r)
        require_batch("init_batch", self.init_batch)

    @property
    def _epsilon(self) -> float:
        """ε."""
        return _default_scale(self.depth) if self.init_scale is None else self.init_scale

    def suggest_rate(self) -> float:
        """That of the subspace's square factors; less where the outer factors move at the whole rate too."""
        return RANDOM_RATE if self.init == "random" else self.suggested_rate

    def advice(self, stacks: Sequence[Stack], step: Step) -> str | None:
        """Where the factors' gradients are too small to move them, whatever the optimiser."""
        share = self._epsilon ** (self.depth - 1)
        if share >= FAINT:
            return None
        clear = CLEAR ** (1 / (self.depth - 1))
        return (
            f"at depth {self.depth} and init_scale {self._epsilon:.2g} the gradient of a factor starts at {share:.0e} "
            "of the update's, too small to move it (Adam adds an eps of 1e-8 to its size, SGD's steps are as small as "
            f"it is): set `init_scale` to {clear:.2g} or more, and under SGD to some times that, or take a smaller "
            "`depth`"
        )

    def slots(self, size: Size) -> dict[str, Slot]:
        """U (out, r), V (in, r) and W (L, r, r); L − 2 square factors where the outer two are factors themselves."""
        found = self.init == "gradient"
        return {
            "U": Slot((size.out, size.r), from_gradient=found),
            "W": Slot((self.depth if found else self.depth - 2, size.r, size.r)),
            "V": Slot((size.into, size.r), from_gradient=found),
        }

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """W_l = ε·I; U and V await the gradient, or are ε times orthonormal."""
        factors = self.slots(size)["W"].shape[0]
        eps = self._epsilon if zero else 1.0
        if self.init == "gradient" and zero:
            return {"W": eps * torch.eye(size.r, dtype=torch.float32).repeat(factors, 1, 1)}
        outer = eps if self.init == "random" else 1.0
        square = torch.linalg.qr(gaussian(factors, size.r, size.r)).Q
        return {
            "U": outer * _orthonormal(size.out, size.r),
            "W": eps * square,
            "V": outer * _orthonormal(size.into, size.r),
        }

    def start_from_gradient(self, size: Size, gradient: Tensor) -> dict[str, Tensor]:
        """U and V from ∂L/∂W."""
        U, V = gradient_subspace(gradient, size.r)
        return {"U": U, "V": V}

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """B = U·(W_L ⋯ W_1) and A = Vᵀ, or the product goes to Vᵀ where that is smaller: a training step keeps it."""
        B, A = t["U"], t["V"].mT
        if t["W"].shape[-3]:
            square = (t if "product" in t else self.prepare(t))["product"]
            B, A = (B @ square, A) if B.shape[-2] <= A.shape[-1] else (B, square @ A)
        return Parts(B, None, A)

    def prepare(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """W_L ⋯ W_1, where there are factors between the outer two."""
        return {"product": chain(t["W"])} if t["W"].shape[-3] else {}

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """All r directions; an export drops those that hold next to nothing."""
        return torch.ones_like(t["U"][..., 0, :], dtype=torch.bool)

    def ratio(self, tensor: str, peak: float, step: Step) -> float:
        """γ for U and V, where they are a subspace and no factors."""
        return self.outer_lr_ratio if tensor != "W" and self.init == "gradient" else 1.0


def _default_scale(depth: int) -> float:
    """1e-3 or, in a deeper product, the ε at which ε^L is 1e-9 too: a gradient starts at ε^(L−1) times the update's."""
    return max(1e-3, 10 ** (-9 / depth))


def _orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(gaussian(rows, columns)).Q
