"""AdaLoRA: triplets in SVD form share one budget over all layers, spent where the loss is most sensitive.

Zhang et al., arXiv 2303.10512. W = W0 + P Λ Q (eq. 3), with γ·R(P, Q) in the loss for orthonormality (eq. 4). A step:

    I(w) = |w·∂L/∂w|                            (8)   of the weights and gradients of the same step,
    Ī ← β₁Ī + (1 − β₁)I                         (9)
    Ū ← β₂Ū + (1 − β₂)|I − Ī|                   (10)
    s = Ī·Ū                                     (11)
    S_{k,i} = s(λ_{k,i}) + mean_j s(P_{k,ji}) + mean_j s(Q_{k,ij})   (7)

and, when an allocation is due, Λ is set to 0 outside the b(t) highest S of all layers (6). In between Λ trains on, so
that a triplet can come back; from T − tfinal the kept set is final. The authors' code scores weights after the move
against gradients before it; eq. 8 is kept here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_choice, require_int, require_number, say_once
from rankwise.errors import ArgumentError
from rankwise.linalg.allocate import keep_top
from rankwise.methods.base import gaussian, register
from rankwise.methods.orthonormal import penalty_of_form
from rankwise.methods.phases import Phased
from rankwise.methods.stack import CLOSED, Penalty, Size, Slot, Stack, Step, Updates, closed_slot
from rankwise.schedules import CubicBudget, steps_of
from rankwise.update import Factors, Parts

TRIPLET = ("P", "Lambda", "Q")


@register
@dataclass
class AdaLora(Phased):
    """Adaptive budget allocation over SVD-form triplets."""

    method: ClassVar[str] = "adalora"
    config_name: ClassVar[str] = "AdaLoraConfig"
    summary: ClassVar[str] = "falls from init_r to a mean of target_r, shared over all layers by sensitivity"
    linear_only: ClassVar[bool] = True
    suggested_rate: ClassVar[float] = 1e-2
    closing_values: ClassVar[Mapping[str, float]] = {"Lambda": 0.0}

    target_r: int | None = field(default=None, metadata={"help": "mean rank at the end; None: r"})
    init_r: int | None = field(default=None, metadata={"help": "rank at the start; None: ⌈1.5·target_r⌉"})
    deltaT: float = field(default=0.01, metadata={"help": "steps between allocations, or a share of the run"})  # noqa: N815
    beta1: float = field(default=0.85, metadata={"help": "β₁, smoothing of the sensitivity"})
    beta2: float = field(default=0.85, metadata={"help": "β₂, smoothing of its uncertainty"})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "γ, weight of the orthonormality penalty"})
    orth_reg_form: str = field(default="mean", metadata={"help": '"mean" of ‖PᵀP−I‖_F, or "sum" of squares (eq. 4)'})
    importance: str = field(default="smoothed", metadata={"help": '"smoothed" Ī·Ū, "sensitivity" I or "magnitude" |λ|'})

    def check(self) -> None:
        """Resolve target_r and init_r, then every rule."""
        super().check()
        if self.target_r is None and self.init_r is None and self.r != AdaLora.r:
            say_once(f"AdaLoRA reads r = {self.r} as target_r = {self.r} and init_r = {math.ceil(1.5 * self.r)}")
        self.target_r = self.r if self.target_r is None else self.target_r
        require_int("target_r", self.target_r, least=1)
        self.init_r = math.ceil(1.5 * self.target_r) if self.init_r is None else self.init_r
        require_int("init_r", self.init_r, least=1)
        if self.init_r < self.target_r:
            raise ArgumentError("init_r", f"be at least target_r ({self.target_r})", self.init_r)
        for name in ("beta1", "beta2"):
            require_number(name, getattr(self, name), below=1.0)
        require_number("orth_reg_weight", self.orth_reg_weight)
        require_choice("orth_reg_form", self.orth_reg_form, ("mean", "sum"))
        require_choice("importance", self.importance, ("smoothed", "sensitivity", "magnitude"))
        require_number("deltaT", self.deltaT)
        steps_of("deltaT", self.deltaT, self.total_step or 10**9, least=1)

    @property
    def start_rank(self) -> int:
        """init_r."""
        return self.init_r or self.r

    @property
    def final_rank(self) -> int:
        """target_r."""
        return self.target_r or self.r

    def slots(self, size: Size) -> dict[str, Slot]:
        """P (out, r), Λ (r), Q (r, in), the kept set, what is closed once it is final, and Ī and Ū where used."""
        slots = {
            "P": Slot((size.out, size.r)),
            "Lambda": Slot((size.r,), exact=True),
            "Q": Slot((size.r, size.into)),
        }
        averages = {}
        if self.importance == "smoothed":
            for name, slot in slots.items():
                averages[f"{name}_mean"] = Slot(slot.shape, trained=False, exact=True)
                averages[f"{name}_deviation"] = Slot(slot.shape, trained=False, exact=True)
        kept = Slot((size.r,), trained=False, dtype=torch.bool)
        return slots | averages | {"kept": kept} | closed_slot(size)

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """P, Q ~ N(0, 0.02²), Λ = 0."""
        start = {"P": 0.02 * gaussian(size.out, size.r), "Q": 0.02 * gaussian(size.r, size.into)}
        start["kept"] = torch.ones(size.r, dtype=torch.bool)
        return start if zero else {name: 50 * t for name, t in start.items()} | {"Lambda": gaussian(size.r)}

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """P·diag(Λ)·Q."""
        return Parts(t["P"], t["Lambda"], t["Q"])

    def take_up(self, size: Size, update: Factors, scale: float, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its singular triplets, from QR decompositions and one r × r singular value decomposition."""
        U, S, Vh = update.orthogonal()
        P, Lambda, Q = t["P"].clone(), t["Lambda"].clone(), t["Q"].clone()
        P[:, : len(S)], Lambda[: len(S)], Q[: len(S)] = U.to(P.dtype), (S / scale).to(P.dtype), Vh.to(P.dtype)
        return {"P": P, "Lambda": Lambda, "Q": Q}

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """The last allocation's kept set; everything before the first."""
        return t["kept"]

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """γ·R: the mean of ‖PᵀP − I‖_F over the 2L matrices P and Qᵀ, or the sum of its squares."""
        return penalty_of_form(stacks, "P", "Q", self.orth_reg_weight, self.orth_reg_form)

    def before_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """Smooth the sensitivities and, when an allocation is due, choose the kept set."""
        sizes = [size for layers in stacks for size in layers.sizes]
        budget = self.budget(sizes, step.total)
        is_due = budget.due(step.last, step.number)
        # Sensitivities are of use up to the last allocation only.
        if step.finalized or (step.number > budget.final and not is_due):
            return []

        measured = [self._measure(layers) for layers in stacks]
        if is_due:
            scores = [self._scores(found) for found in measured]
            keep = keep_top(scores, budget.at(step.number))
            measured = [found | {"kept": mask} for found, mask in zip(measured, keep, strict=True)]
        for found in measured:
            found.pop("importance", None)  # what the scores are made of, which nothing stores
        return measured

    def after_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """Λ = 0 outside the kept set (eq. 6): at allocations, and at every step once the kept set is final."""
        budget = self.budget([size for layers in stacks for size in layers.sizes], step.total)
        if not step.finalized and step.number < budget.final and not budget.due(step.last, step.number):
            return []
        updates = [{"Lambda": layers["Lambda"] * layers["kept"]} for layers in stacks]
        if step.last < budget.final <= step.number:  # the kept set has just become final
            return [found | {CLOSED: ~layers["kept"]} for found, layers in zip(updates, stacks, strict=True)]
        return updates

    def finalize(self, stacks: Sequence[Stack]) -> Updates:
        """Keep the final budget's triplets by the scores so far (by |λ| where no average is stored)."""
        sizes = [size for layers in stacks for size in layers.sizes]
        smoothed = self.importance == "smoothed"
        scores = [self._scores(layers) if smoothed else layers["Lambda"].abs() for layers in stacks]
        keep = keep_top(scores, self._end(sizes))
        return [
            {"kept": mask, CLOSED: ~mask, "Lambda": layers["Lambda"] * mask}
            for layers, mask in zip(stacks, keep, strict=True)
        ]

    def budget(self, sizes: Sequence[Size], total: int | None) -> CubicBudget:
        """b(t): from all triplets to bT = Σ_k min(target_r, rank of layer k)."""
        tinit, final = self.phases(total)
        assert total is not None
        every = steps_of("deltaT", self.deltaT, total, least=1)
        return CubicBudget(sum(s.r for s in sizes), self._end(sizes), tinit, total - final, total, every)

    def _end(self, sizes: Sequence[Size]) -> int:
        return sum(min(self.final_rank, s.r) for s in sizes)

    def _measure(self, layers: Stack) -> dict[str, Tensor]:
        """Ī and Ū after this step, or what the other two measures read."""
        if self.importance == "magnitude":
            return {"importance": layers["Lambda"].abs()}
        # The stacks are copies already: changed in place, since a pass over them costs as much as the arithmetic.
        I = {name: layers[name].mul(layers.gradient(name)).abs_().float() for name in TRIPLET}  # noqa: E741  as in eq. 8
        if self.importance == "sensitivity":
            return {"importance": _triplet_mean(I)}
        updates: dict[str, Tensor] = {}
        for name in TRIPLET:
            mean, deviation = layers[f"{name}_mean"], layers[f"{name}_deviation"]
            updates[f"{name}_mean"] = mean.lerp_(I[name], 1 - self.beta1)
            updates[f"{name}_deviation"] = deviation.lerp_(I[name].sub_(mean).abs_(), 1 - self.beta2)
        return updates

    def _scores(self, measured: Mapping[str, Tensor] | Stack) -> Tensor:
        """S of every triplet, (n, r)."""
        if "importance" in measured:
            return measured["importance"]
        return _triplet_mean({name: measured[f"{name}_mean"] * measured[f"{name}_deviation"] for name in TRIPLET})


def _triplet_mean(s: Mapping[str, Tensor]) -> Tensor:
    """Eq. 7: s(λ) + mean_j s(P_ji) + mean_j s(Q_ij)."""
    return s["Lambda"] + s["P"].mean(-2) + s["Q"].mean(-1)
