"""ALoRA, allocating LoRA: ranks move from modules that need them least to modules that need them most.

Liu et al., "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models", arXiv 2403.16187. (PEFT's
"aLoRA" is another method, Activated LoRA.)

After K1 steps of plain LoRA come N_A rounds, K2 steps apart. A round scores every rank on one development batch,

    IS(r) = S(M) − S(M∖r) + S(M_r),   S = −cross-entropy,

M∖r the model without that rank, M_r with that rank alone; it drops the n_A ranks of lowest score and gives as many
new ones to modules that lost none, best mean score first, round robin. A new rank starts at B = 0, so growing never
changes the function, and the number of ranks in use is the same after every round.

The paper's gates α are 0 or 1. Here a closed gate is a zero column of B and a zero row of A, which get no gradient and
stay so: the parameters alone tell what a layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.checks import require_batch, require_int
from rankwise.errors import ArgumentError
from rankwise.linalg.allocate import keep_top, share_out
from rankwise.linalg.draws import new_seed, uniform
from rankwise.methods.base import Method, register
from rankwise.methods.stack import CLOSED, Size, Slot, Stack, Step, Updates, closed_slot
from rankwise.schedules import Rounds

MOST_ROUNDS = 8  # the paper's largest N_A


@register
@dataclass
class Alora(Method):
    """LoRA whose ranks are scored by ablation, and move between modules."""

    method: ClassVar[str] = "alora"
    config_name: ClassVar[str] = "AloraConfig"
    summary: ClassVar[str] = "the same total; rounds of ablation move ranks from useless modules to useful ones"
    scores_ranks: ClassVar[bool] = True
    suggested_rate: ClassVar[float] = 1e-3

    max_r: int | None = field(default=None, metadata={"help": "most ranks of a module; None: 2·r"})
    rounds: int | None = field(
        default=None, metadata={"help": "N_A; 0 is plain LoRA; None: as many as end at half the run, at most 8"}
    )
    prune_per_round: int | None = field(default=None, metadata={"help": "n_A, ranks moved; None: one per module"})
    warmup_steps: int | None = field(
        default=None,
        metadata={"help": "K1, steps to the first round; None: an epoch, at most a quarter of the run"},
    )
    recovery_steps: int | None = field(
        default=None, metadata={"help": "K2, steps between rounds; None: a quarter epoch, at most 1/32 of the run"}
    )
    score_batch: Any = field(
        default=None,
        metadata={
            "help": "model inputs whose output has .loss, or a function model → score; None: the trainer's data",
            "saved": False,
        },
    )

    def check(self) -> None:
        """Whole numbers, and room for the starting rank."""
        super().check()
        for name, least in (("rounds", 0), ("prune_per_round", 1), ("warmup_steps", 1), ("recovery_steps", 1)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), least=least)
        if self.max_r is not None:
            require_int("max_r", self.max_r, least=self.r)
        require_batch("score_batch", self.score_batch)

    def capacity(self, r: int) -> int:
        """max_r, or 2·r."""
        return 2 * r if self.max_r is None else max(r, self.max_r)

    def slots(self, size: Size) -> dict[str, Slot]:
        """A (capacity, in), B (out, capacity), the ranks in use, those closed for good, the seed of new rows of A."""
        return super().slots(size) | {
            "active": Slot((size.r,), trained=False, dtype=torch.bool),
            "seed": Slot((1,), trained=False, dtype=torch.int64),
            **closed_slot(size),
        }

    def start(self, size: Size, weight: Callable[[], Tensor], *, zero: bool = True) -> dict[str, Tensor]:
        """As LoRA in the first r ranks; the others are closed."""
        active = torch.arange(size.r) < size.started
        start = super().start(size, weight, zero=zero)
        start["A"] *= active[:, None]
        return start | {"active": active, "seed": new_seed()} | ({} if zero else {"B": start["B"] * active})

    def kept(self, t: Mapping[str, Tensor]) -> Tensor:
        """Ranks in use."""
        return t["active"]

    def ranks_open(self, t: Mapping[str, Tensor]) -> Tensor:
        """Ranks in use."""
        return t["active"]

    def plan(self, total: int | None, epoch: int | None) -> Rounds | None:
        """K1, K2 and N_A in steps; None where they cannot be told.

        Raises:
            ArgumentError: the rounds do not fit the run.
        """
        quarter = max(1, total // 4) if total else None
        warmup = self.warmup_steps or _least(epoch, quarter)
        recovery = self.recovery_steps or _least(epoch and max(1, epoch // 4), total and max(1, total // 32))
        if self.rounds == 0:
            return Rounds(1, 1, 0)
        if warmup is None or recovery is None or (self.rounds is None and total is None):
            return None
        fitting = ((total or 0) // 2 - warmup) // recovery
        plan = Rounds(warmup, recovery, min(MOST_ROUNDS, fitting) if self.rounds is None else self.rounds)
        if plan.rounds < 1 or (total is not None and warmup + plan.rounds * recovery > total):
            seen = {"warmup_steps": warmup, "recovery_steps": recovery, "rounds": plan.rounds}
            raise ArgumentError("rounds", f"be at least 1 and end within the run ({total} steps), or be 0", seen)
        return plan

    def needs(self, step: Step) -> tuple[str, str] | None:
        """The rounds' times, and something to score on."""
        if self.rounds == 0:
            return None
        if self.plan(step.total, step.epoch) is None:
            return "rounds=4, warmup_steps=200, recovery_steps=50", "the number of rounds and when they happen"
        if step.ablate is None:
            return "score_batch=batch", "model inputs whose output has .loss, or a function from the model to its score"
        return None

    def final_step(self, total: int | None, epoch: int | None = None) -> int | None:
        """The step of the last round."""
        plan = self.plan(total, epoch)
        return plan.final if plan is not None and plan.rounds else None

    def reads_back(self, step: Step) -> bool:
        """In a round, which runs the model."""
        plan = self.plan(step.total, step.epoch)
        return plan is not None and plan.due(step.last, step.number)

    def after_step(self, stacks: Sequence[Stack], step: Step) -> Updates:
        """A round, if one is due; closed ranks stay zero whatever an optimiser remembers of them."""
        plan = self.plan(step.total, step.epoch)
        if step.finalized or plan is None or not plan.due(step.last, step.number):
            return self.close_again(stacks)
        assert step.ablate is not None
        whole, without, alone = step.ablate()
        importance = [whole - out + one for out, one in zip(without, alone, strict=True)]  # eq. 6
        active = [layers["active"].cpu() for layers in stacks]
        masks = self._reallocate(importance, active)
        return [_moved(layers, kept, opened, step.number) for layers, (kept, opened) in zip(stacks, masks, strict=True)]

    def close_again(self, stacks: Sequence[Stack]) -> Updates:
        """Zeros in A and B of ranks that are not in use."""
        return [_closed(layers, layers["active"]) for layers in stacks]

    def _reallocate(self, importance: Sequence[Tensor], active: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(kept, opened) masks (n, capacity) per stack: n_A dropped, or as many as find a free place elsewhere."""
        modules = [len(in_use) for in_use in active]
        places = sum(in_use.numel() for in_use in active)
        ranks = sum(int(in_use.sum()) for in_use in active)
        most = min(self.prune_per_round or sum(modules), ranks)
        # Places without a rank are kept first, so that only ranks in use can be dropped.
        scores = [torch.where(in_use, score, torch.inf) for in_use, score in zip(active, importance, strict=True)]
        mean_importance = torch.cat([score.nanmean(-1) for score in importance]).nan_to_num(-torch.inf)
        free = torch.cat([(~in_use).sum(-1) for in_use in active])
        for dropped in range(most, 0, -1):
            keep = keep_top(scores, places - dropped)
            kept = [in_use & kept for in_use, kept in zip(active, keep, strict=True)]
            # A module that loses a rank in this round gains none (algorithm 1), so its free places do not count.
            loses = torch.cat([(in_use & ~left).any(-1) for in_use, left in zip(active, kept, strict=True)])
            open_to_growth = free.masked_fill(loses, 0)
            if int(open_to_growth.sum()) >= dropped:
                grown = share_out(mean_importance, open_to_growth, dropped).split(modules)
                opened = [_first(~in_use, more) for in_use, more in zip(active, grown, strict=True)]
                return list(zip(kept, opened, strict=True))
        return [(in_use, torch.zeros_like(in_use)) for in_use in active]


def _least(*durations: int | None) -> int | None:
    """The shortest of the durations that are known."""
    return min((d for d in durations if d is not None), default=None)


def _first(free: Tensor, counts: Tensor) -> Tensor:
    """The first `counts` (n,) free places of each row."""
    return free & (free.cumsum(-1) <= counts[:, None])


def _closed(layers: Stack, active: Tensor) -> dict[str, Tensor]:
    return {"A": layers["A"] * active[:, :, None], "B": layers["B"] * active[:, None, :]}


def _moved(layers: Stack, kept: Tensor, opened: Tensor, number: int) -> dict[str, Tensor]:
    """The new tensors; what the optimiser remembers of closed and of opened ranks is forgotten."""
    device = layers["A"].device
    kept = kept.to(device)
    opened = opened.to(device)
    layers.forget("A", ~kept[:, :, None])
    layers.forget("B", ~kept[:, None, :])

    closed = _closed(layers, kept)
    A = closed["A"]
    drawn = uniform(layers["seed"].squeeze(-1), number, A[0].numel()).view_as(A)
    fresh = (2 * drawn - 1) / A.shape[-1] ** 0.5  # A's start, as in `kaiming_uniform`
    new_A = torch.where(opened[:, :, None], fresh.to(A.dtype), A)
    active = kept | opened
    return {"A": new_A, "B": closed["B"], "active": active, CLOSED: ~active}
