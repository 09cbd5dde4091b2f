"""SaLoRA, structure-aware LoRA: hard-concrete gates whose expected L0 norm meets a budget of parameters.

Hu et al., "Structure-aware low-rank adaptation for parameter-efficient fine-tuning", Mathematics 11(20), 2023. (Other
methods are called SaLoRA in public.) ΔW = B G A with gates G = diag(g) (eq. 5), sampled in training and not in
evaluation (eq. 7; see `linalg.gates`). The loss gains

    β·R(B, A)   (9)   and   λ(C(Θ) − b)²   (12),   C(Θ) = Σ E‖G_i‖₀(out_i + in_i) / Σ (#B_i + #A_i)   (11),

with C read as a ratio of sums: the sum of ratios that is printed is the number of layers with all gates open. λ grows
by projected gradient ascent, λ ← λ + η_λ(C − b)²; Θ and λ move from tinit to total − tfinal only. There, gates are
decided for good: in the order of log θ, each is kept whose parameters still fit the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_choice, require_number
from rankwise.linalg import gates
from rankwise.linalg.allocate import keep_within
from rankwise.linalg.draws import new_seed, uniform
from rankwise.methods.base import gaussian, register
from rankwise.methods.orthonormal import penalty_of_form
from rankwise.methods.phases import Phased
from rankwise.methods.stack import CLOSED, Penalty, Size, Slot, Stack, Step, Updates, closed_slot
from rankwise.update import Factors, Parts

EDGE = 1e-6  # u is drawn from [EDGE, 1 − EDGE]
GATE_TRAVEL = 128.0
"""How far log θ could move in the falling phase at the gates' default rate: fast enough for runs of 60 steps, in which
Adam's momentum overshoots the budget otherwise (`bench/salora_rates.py`, for this and the next)."""
MULTIPLIER_PER_RANK = 0.2
"""What λ would grow to in the falling phase at its default rate, for each rank of the adapter, did no gate close.
A rank's share in C falls as their number grows, and with it the slope of λ(C − b)²; the task's slope does not."""


@register
@dataclass
class Salora(Phased):
    """LoRA with random gates and a density constraint."""

    method: ClassVar[str] = "salora"
    config_name: ClassVar[str] = "SaloraConfig"
    summary: ClassVar[str] = "falls to a density of r·L ranks, learned by random gates under an L0 constraint"
    suggested_rate: ClassVar[float] = 3e-3
    prepared_from: ClassVar[tuple[str, ...]] = ("log_theta", "u")
    closing_values: ClassVar[Mapping[str, float]] = {"log_theta": gates.FLOOR}
    uses_rate: ClassVar[bool] = True

    density: float = field(default=0.5, metadata={"help": "b, share of the parameters kept at the end, in [0.05, 1)"})
    orth_reg_weight: float = field(default=0.1, metadata={"help": "β, weight of the orthonormality penalty"})
    orth_reg_form: str = field(default="mean", metadata={"help": '"mean" of ‖BᵀB−I‖_F, or "sum" of squares (eq. 9)'})
    temperature: float = field(default=2 / 3, metadata={"help": "τ of the gates' distribution"})
    stretch: tuple[float, float] = field(default=(-0.1, 1.1), metadata={"help": "(γ, ζ) of the gates' distribution"})
    gate_lr: float | None = field(default=None, metadata={"help": "peak rate of log θ; None: 128 / steps of the fall"})
    multiplier_lr: float | None = field(default=None, metadata={"help": "rate of λ; None: see MULTIPLIER_PER_RANK"})

    def check(self) -> None:
        """A density the gates can reach, an interval around [0, 1], positive rates."""
        super().check()
        require_number("orth_reg_weight", self.orth_reg_weight)
        require_choice("orth_reg_form", self.orth_reg_form, ("mean", "sum"))
        require_number("temperature", self.temperature, least=1e-3)
        self.stretch = gates.require_stretch("stretch", self.stretch)
        least = gates.least_open_probability(self.temperature, self.stretch)
        require_number("density", self.density, least=max(0.05, least), below=1.0)
        for name in ("gate_lr", "multiplier_lr"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), least=1e-30)

    @property
    def final_rank(self) -> float:
        """density · r."""
        return self.density * self.r

    def slots(self, size: Size) -> dict[str, Slot]:
        """A, B, log θ (r); this step's u (r), 0 for evaluation gates; λ; the seed of all u; ranks closed for good."""
        return super().slots(size) | {
            "log_theta": Slot((size.r,), exact=True),
            "u": Slot((size.r,), trained=False, exact=True),
            "multiplier": Slot((1,), trained=False, exact=True),
            "seed": Slot((1,), trained=False, dtype=torch.int64),
            **closed_slot(size),
        }

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """As LoRA; log θ ~ N(2, 0.01²), so that E‖G‖₀/r = 0.97. No u is drawn yet: a copy stays the same function."""
        start = super().start(size, weight, zero=zero)
        return start | {"log_theta": 2 + 0.01 * gaussian(size.r), "seed": new_seed()}

    def parts(self, t: Mapping[str, Tensor]) -> Parts:
        """B·diag(g)·A with evaluation gates."""
        return Parts(t["B"], gates.evaluation_gate(t["log_theta"], self.stretch), t["A"])

    def training_parts(self, t: Mapping[str, Tensor]) -> Parts:
        """B·diag(g)·A with this step's gates."""
        made = t if "gate" in t else self.prepare(t)
        return Parts(t["B"], made["gate"], t["A"])

    def prepare(self, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This step's gates: one draw per step, and evaluation gates once they are decided."""
        return {"gate": gates.training_gate(t["log_theta"], t["u"], self.temperature, self.stretch)}

    def take_up(self, size: Size, update: Factors, scale: float, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As LoRA, seen through the evaluation gates."""
        taken = super().take_up(size, update, scale, t)
        taken["B"][:, : update.r] /= gates.evaluation_gate(t["log_theta"], self.stretch)[: update.r]
        return taken

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """Evaluation gates that are not 0."""
        return gates.evaluation_gate(t["log_theta"], self.stretch) != 0

    def ratio(self, tensor: str, peak: float, step: Step) -> float:
        """The gates' own rate while they may move; 0 before and after."""
        if tensor != "log_theta":
            return 1.0
        if not self._moves(step) or peak == 0:
            return 0.0
        return (self.gate_lr or GATE_TRAVEL / self.falling(step.total)) / peak

    def density_of(self, stacks: Sequence[Stack]) -> Tensor:
        """C(Θ) (eq. 11, as a ratio of sums)."""
        device = stacks[0]["log_theta"].device
        opened = [gates.open_probability(layers["log_theta"], self.temperature, self.stretch) for layers in stacks]
        held = sum((p * cost).sum().to(device) for p, cost in zip(opened, map(_costs, stacks), strict=True))
        return held / _parameters(stacks)  # type: ignore[return-value]

    def penalty(self, stacks: Sequence[Stack], step: Step) -> Penalty | None:
        """Eq. 9, and the density term of eq. 12 while gates move."""
        found = penalty_of_form(stacks, "B", "A", self.orth_reg_weight, self.orth_reg_form)
        if not self._moves(step):
            return found
        over = self.density_of(stacks) - self.density
        multiplier = stacks[0]["multiplier"].flatten()[0]
        gradients = []
        for layers, gradient in zip(stacks, found.gradients if found else [{}] * len(stacks), strict=True):
            p = gates.open_probability(layers["log_theta"], self.temperature, self.stretch)
            slope = (2 * multiplier * over).to(p.device) * p * (1 - p) * _costs(layers) / _parameters(stacks)
            gradients.append(gradient | {"log_theta": slope})
        value = multiplier * over.square()
        return Penalty(value + found.value.to(value.device) if found else value, gradients)

    def before_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """Ascend λ, at the Θ whose gradient the optimiser is about to use."""
        if not self._moves(step):
            return []
        grown = self._multiplier_rate(stacks, step) * (self.density_of(stacks) - self.density).square()
        return [{"multiplier": layers["multiplier"] + grown.to(layers["multiplier"].device)} for layers in stacks]

    def after_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """Clamp log θ and draw the next u, from the layer's seed and the step's number; at total − tfinal, decide."""
        if self._decided(step):
            return self.close_again(stacks)
        if step.number >= self.phases(step.total)[1]:
            return self.finalize(stacks)
        updates = []
        for layers in stacks:
            u = uniform(layers["seed"].squeeze(-1), step.number, layers.sizes[0].r).clamp(EDGE, 1 - EDGE)
            updates.append({"log_theta": layers["log_theta"].clamp(gates.FLOOR, gates.CEILING), "u": u})
        return updates

    def finalize(self, stacks: Sequence[Stack]) -> Updates:
        """Keep what fits the budget, highest log θ first; the others go to the floor. Nothing is drawn any more."""
        costs = [_costs(layers) for layers in stacks]
        keep = keep_within([layers["log_theta"] for layers in stacks], costs, self.density * _parameters(stacks))
        updates = []
        for layers, mask in zip(stacks, keep, strict=True):
            theta = torch.where(mask, gates.kept_open(layers["log_theta"], self.stretch), gates.FLOOR)
            updates.append({"log_theta": theta, "u": torch.zeros_like(layers["u"]), CLOSED: ~mask})
        return updates

    def close_again(self, stacks: Sequence[Stack]) -> Updates:
        """As every method; and kept gates that an average of weights has closed are open again."""
        found = super().close_again(stacks)
        return [{name: gates.reopened(theta, self.stretch) for name, theta in update.items()} for update in found]

    def _moves(self, step: Step) -> bool:
        first, final = self.phases(step.total)
        return first <= step.number < final and not self._decided(step)

    def _decided(self, step: Step) -> bool:
        return step.finalized or step.last >= self.phases(step.total)[1]

    def _multiplier_rate(self, stacks: Sequence[Stack], step: Step) -> float:
        if self.multiplier_lr is not None:
            return self.multiplier_lr
        ranks = sum(size.r for layers in stacks for size in layers.sizes)
        return MULTIPLIER_PER_RANK * ranks / (max(1 - self.density, 0.1) ** 2 * self.falling(step.total))


def _costs(layers: Stack) -> Tensor:
    """Parameters of one rank of each layer, out + in, (n, 1); the layers of a stack are of one shape."""
    size = layers.sizes[0]
    return layers["log_theta"].new_full((len(layers), 1), size.out + size.into)


def _parameters(stacks: Sequence[Stack]) -> int:
    """Σ (#B_i + #A_i)."""
    return sum(size.r * (size.out + size.into) for layers in stacks for size in layers.sizes)
