"""NB-LoRA: an update whose every singular value is bounded, whatever its parameters are.

Wang, Dvijotham and Manchester, "Norm-Bounded Low-Rank Adaptation", arXiv 2501.19050.

Free matrices Ã (r, in) and B̃ (r, out). The Cayley transform of G = [Ãᵀ; B̃ᵀ], with X its first r rows and Y the others,

    Z = X − Xᵀ + YᵀY,   [Aᵀ; Bᵀ] = [(I − Z)(I + Z)⁻¹; −2Y(I + Z)⁻¹],

gives A Aᵀ + B Bᵀ = I for every G, and the arithmetic–geometric mean inequality for singular values

    ΔW = 2·Bᵀ diag(s) A   with   σ_j(ΔW) ≤ s_j,   s ≥ 0 sorted;

every matrix with those bounds is reached. X lies in A's block, so that B̃ = 0, the start, gives ΔW = 0. The other
parameterisation is ΔW = U diag(s ∘ sin v) Vᵀ, U and V each a Cayley transform, v = 0 at the start.

The bounds: s_j = δ for the spectral norm; s = δ|z|/‖z‖_p with z learnt for the Schatten norm p (2 Frobenius, 1
nuclear), since an even split reaches only part of the ball; or a given s. There is no lora_alpha / r scale.

The inequality is exact, factors are rounded. They are made in float64 and cast to the parameters' dtype, and s is
divided by a bound of λ_max(A Aᵀ + B Bᵀ) of the cast ones: 1 + 1e-7 in float32, some thousandths more in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_bool, require_choice, require_number, say_once
from rankwise.errors import ArgumentError
from rankwise.linalg.cayley import cayley, cayley_of_blocks
from rankwise.linalg.norms import EXPONENTS, on_unit_sphere, schatten, squared_norm_bound
from rankwise.methods.base import Method, gaussian, register
from rankwise.methods.stack import Size, Slot
from rankwise.precision import exact
from rankwise.update import Parts


@register
@dataclass
class NbLora(Method):
    """Singular values of the update bounded by construction."""

    method: ClassVar[str] = "nblora"
    config_name: ClassVar[str] = "NbLoraConfig"
    summary: ClassVar[str] = "fixed rank; the update's norm, or each of its singular values, bounded by construction"
    linear_only: ClassVar[bool] = True
    suggested_rate: ClassVar[float] = 1e-2
    refuses_updates: ClassVar[str | None] = "NB-LoRA's updates are bounded, and a given one need not be"
    scaled: ClassVar[bool] = False

    bound: float = field(
        default=0.1, metadata={"help": "δ; the norm of each module's update is at most this (the card has why 0.1)"}
    )
    norm: str | float = field(
        default="spectral", metadata={"help": '"spectral", "frobenius", "nuclear", or p ≥ 1 for Schatten-p'}
    )
    bound_relative_to_weight: bool = field(
        default=True, metadata={"help": "δ is a fraction of the same norm of the module's base weight"}
    )
    learn_split: bool = field(
        default=True, metadata={"help": "learn how the norm is shared by singular values; False: evenly"}
    )
    singular_value_bounds: list[float] | None = field(
        default=None, metadata={"help": "r absolute bounds, one per singular value, instead of bound and norm"}
    )
    parameterization: str = field(default="joint", metadata={"help": '"joint" (A and B together) or "svd"'})

    def check(self) -> None:
        """A positive bound, a known norm and parameterisation, as many bounds as ranks."""
        super().check()
        require_number("bound", self.bound, least=1e-30)
        if isinstance(self.norm, str):
            require_choice("norm", self.norm, tuple(EXPONENTS))
        else:
            require_number("norm", self.norm, least=1.0)
        require_bool("bound_relative_to_weight", self.bound_relative_to_weight)
        require_bool("learn_split", self.learn_split)
        require_choice("parameterization", self.parameterization, ("joint", "svd"))
        if self.singular_value_bounds is not None:
            self._check_bounds(self.singular_value_bounds)

    def _check_bounds(self, bounds: object) -> None:
        if not isinstance(bounds, list | tuple) or len(bounds) != self.r:
            raise ArgumentError("singular_value_bounds", f"be a list of r = {self.r} numbers", bounds)
        for j, value in enumerate(bounds):
            require_number(f"singular_value_bounds[{j}]", value)
        if not any(bounds):
            raise ArgumentError("singular_value_bounds", "hold a number above 0", bounds)
        self.singular_value_bounds = list(bounds)

    @property
    def starts_from_weight(self) -> bool:  # type: ignore[override]  a question of the fields here
        """For a bound relative to the weight's norm."""
        return self.bound_relative_to_weight and self.singular_value_bounds is None

    @property
    def _p(self) -> float:
        return EXPONENTS[self.norm] if isinstance(self.norm, str) else float(self.norm)

    @property
    def _split_is_learnt(self) -> bool:
        return self.learn_split and self.norm != "spectral" and self.singular_value_bounds is None

    def slots(self, size: Size) -> dict[str, Slot]:
        """The free matrices, v of the "svd" form, z where the split is learnt, and the layer's own bounds δ."""
        if self.singular_value_bounds is not None and size.r > self.r:
            raise ArgumentError("rank_pattern", f"not exceed the {self.r} singular_value_bounds", size.r)
        out, into, r = size.out, size.into, size.r
        if self.parameterization == "joint":
            slots = {"A_free": Slot((r, into)), "B_free": Slot((r, out))}
        else:
            slots = {"U_free": Slot((out, r)), "V_free": Slot((into, r)), "v": Slot((r,), exact=True)}
        if self._split_is_learnt:
            slots["z"] = Slot((r,), exact=True)
        return slots | {"delta": Slot((1 if self.singular_value_bounds is None else r,), trained=False, exact=True)}

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """Ã ~ N(0, 1/in) and B̃ = 0, or U and V alike and v = 0; an even split; δ, from W0 where it is relative."""
        out, into, r = size.out, size.into, size.r
        if self.parameterization == "joint":
            start = {"A_free": into**-0.5 * gaussian(r, into)}
            moved = {"B_free": out**-0.5 * gaussian(r, out)}
        else:
            start = {"U_free": out**-0.5 * gaussian(out, r), "V_free": into**-0.5 * gaussian(into, r)}
            moved = {"v": 0.5 + torch.rand(r, dtype=torch.float32)}
        if self._split_is_learnt:
            start["z"] = torch.ones(r) if zero else 0.5 + torch.rand(r, dtype=torch.float32)
        start["delta"] = self._absolute(size, weight)
        return start if zero else start | moved

    def _absolute(self, size: Size, weight: Callable[[], Tensor]) -> Tensor:
        """δ as it is stored: (1,), or the size.r largest of the given bounds."""
        if self.singular_value_bounds is not None:
            return torch.tensor(sorted(self.singular_value_bounds, reverse=True)[: size.r], dtype=torch.float32)
        if not self.bound_relative_to_weight:
            return torch.tensor([self.bound], dtype=torch.float32)
        whole = schatten(weight(), self._p)
        if whole == 0:
            say_once(
                "NB-LoRA: a base weight is 0, and so is a bound relative to it: that module cannot change; "
                "set bound_relative_to_weight=False"
            )
        return (self.bound * whole).float().unsqueeze(0)

    def norm_bound(self, size: Size, weight: Callable[[], Tensor]) -> float | None:
        """The largest ‖σ‖_2: of a vector of bounds its 2-norm, of an even split δ·r^(1/2 − 1/p).

        A learnt split may also put all of ‖σ‖_p ≤ δ into one singular value: δ·r^max(0, 1/2 − 1/p).
        """
        share = 1.0
        if self.singular_value_bounds is None:
            even = size.r ** (0.5 - 1 / self._p)
            share = max(1.0, even) if self._split_is_learnt else even
        return share * float(exact(self._absolute(size, weight)).norm())

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """2·Bᵀ diag(s) A or U diag(s ∘ sin v) Vᵀ, with s divided by what rounding may have added to the factors."""
        if self.parameterization == "joint":
            A, Bt = cayley_of_blocks(t["A_free"], t["B_free"])
            stretch = squared_norm_bound(A.mT, Bt.mT).unsqueeze(-1)
            return _parts(Bt.mT, 2 * self._bounds(t, A.shape[-2]) / stretch, A)
        U, stretch_U = _orthonormal(t["U_free"])
        V, stretch_V = _orthonormal(t["V_free"])
        s = self._bounds(t, U.shape[-1]) * exact(t["v"]).sin()
        return _parts(U, s / (stretch_U * stretch_V).sqrt(), V.mT)

    @property
    def prepared_from(self) -> tuple[str, ...]:  # type: ignore[override]  a question of the fields here
        """All tensors."""
        split = ("z",) if self._split_is_learnt else ()
        return (
            *(("A_free", "B_free") if self.parameterization == "joint" else ("U_free", "V_free", "v")),
            *split,
            "delta",
        )

    def prepare(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Both factors, the bounds multiplied into the left one."""
        B, s, A = self.parts(t)
        assert s is not None
        return {"left": (B * s.unsqueeze(-2)).to(B.dtype), "right": A}

    def training_parts(self, t: Mapping[str, Tensor]) -> Parts:
        """As `parts`, of factors that are there already."""
        return Parts(t["left"], None, t["right"]) if "left" in t else self.parts(t)

    def _bounds(self, t: Mapping[str, Tensor], r: int) -> Tensor:
        """s (…, r): bounds of the singular values, in any order, in float64."""
        delta = exact(t["delta"])
        if self._split_is_learnt:
            return delta * on_unit_sphere(t["z"], self._p)
        bounds = delta.expand(*delta.shape[:-1], r)
        if self.singular_value_bounds is not None or self._p == math.inf:
            return bounds
        return r ** (-1 / self._p) * bounds

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """All r ranks."""
        rows = t["A_free"][..., 0] if self.parameterization == "joint" else t["v"]
        return torch.ones_like(rows, dtype=torch.bool)


def _orthonormal(free: Tensor) -> tuple[Tensor, Tensor]:
    """The Cayley transform of `free` (…, m, r) in its dtype, and a bound (…, 1) of λ_max(QᵀQ) of that rounded Q."""
    Q = cayley(free)
    return Q, squared_norm_bound(Q).unsqueeze(-1)


def _parts(B: Tensor, s: Tensor, A: Tensor) -> Parts:
    """With s in float32, or in the factors' own dtype where that is wider."""
    return Parts(B, s.to(torch.promote_types(B.dtype, torch.float32)), A)
