"""ALoRA's rounds against an oracle in plain Python, on planted ranks, and step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn

import rankwise
from conftest import tiny_bert
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import ArgumentError
from rankwise.methods.alora import Alora
from rankwise.methods.stack import Ablation, Size, Stack, Step
from rankwise.schedules import Rounds

Modules = list[list[float | None]]
"""Per module and place, the score of its rank, or None for a free place."""


def method(**fields: Any) -> Alora:
    made = Alora(**{"rounds": 2, "warmup_steps": 4, "recovery_steps": 3} | fields)
    made.check()
    return made


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_rounds_fall_right_after_the_warm_up_and_every_recovery() -> None:
    plan = Rounds(warmup=4, recovery=3, rounds=3)
    assert [t for t in range(1, 30) if plan.due(t - 1, t)] == [4, 7, 10]
    assert plan.final == 10
    assert plan.due(3, 6), "a skipped step hands its round on"
    assert not plan.due(10, 29)


@pytest.mark.parametrize(
    ("total", "epoch", "plan"),
    [
        (1000, 100, Rounds(100, 25, 8)),
        (300, 25, Rounds(25, 6, 8)),
        (320, 5000, Rounds(80, 10, 8)),
        (1000, None, Rounds(250, 31, 8)),
        (24, 8, Rounds(6, 1, 6)),
    ],
)
def test_default_schedules_end_at_half_the_run(total: int, epoch: int | None, plan: Rounds) -> None:
    found = method(rounds=None, warmup_steps=None, recovery_steps=None).plan(total, epoch)
    assert found == plan
    assert plan.warmup + plan.rounds * plan.recovery <= total / 2


def test_schedules_that_do_not_fit_or_cannot_be_told() -> None:
    with pytest.raises(ArgumentError, match=r"`rounds` must be at least 1 and end within the run \(9 steps\)"):
        method().plan(9, None)
    assert method().plan(10, None) == Rounds(4, 3, 2)
    assert method(rounds=None).plan(None, None) is None
    assert method().plan(None, None) == Rounds(4, 3, 2)
    assert method(rounds=0).final_step(None) is None


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_run_too_short_for_a_default_schedule_is_told_so(total: int) -> None:
    with pytest.raises(ArgumentError, match=rf"`rounds` must be at least 1 and end within the run \({total} steps\)"):
        method(rounds=None, warmup_steps=None, recovery_steps=None).plan(total, None)
    assert method(rounds=None, warmup_steps=None, recovery_steps=None).plan(4, None) == Rounds(1, 1, 1)


def test_rounds_asked_for_happen_in_a_run_of_three_steps() -> None:
    plan = method(rounds=1, warmup_steps=None, recovery_steps=None).plan(3, None)
    assert plan is not None
    assert [t for t in range(1, 4) if plan.due(t - 1, t)] == [1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"rounds": -1}, "`rounds` must be a whole number ≥ 0"),
        ({"prune_per_round": 0}, "`prune_per_round` must be a whole number ≥ 1"),
        ({"warmup_steps": 0.5}, "`warmup_steps` must be a whole number ≥ 1"),
        ({"r": 8, "max_r": 7}, "`max_r` must be a whole number ≥ 8"),
        ({"score_batch": 3}, "`score_batch` must be a mapping of model inputs or a function"),
    ],
)
def test_fields_that_break_their_rule(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        method(**fields)


# --- one round against an oracle --------------------------------------------------------------------------------------


def oracle(modules: Modules, count: int) -> list[list[bool]]:
    """Which places are in use after a round, by the rules one at a time."""
    ranked = sorted(
        ((score, -i, -j) for i, places in enumerate(modules) for j, score in enumerate(places) if score is not None),
    )
    for dropping in range(min(count, len(ranked)), 0, -1):
        lost = {(-i, -j) for _, i, j in ranked[:dropping]}
        losers = {i for i, _ in lost}
        room = {i: sum(s is None for s in places) for i, places in enumerate(modules) if i not in losers}
        if sum(room.values()) < dropping:
            continue
        used = [[s is not None and (i, j) not in lost for j, s in enumerate(p)] for i, p in enumerate(modules)]

        def mean(i: int) -> float:
            scores = [s for s in modules[i] if s is not None]
            return sum(scores) / len(scores) if scores else -math.inf

        queue = sorted(room, key=lambda i: (-mean(i), i))
        given = 0
        while given < dropping:
            for i in queue:
                if room[i] and given < dropping:
                    used[i][used[i].index(False)] = True
                    room[i] -= 1
                    given += 1
        return used
    return [[s is not None for s in places] for places in modules]


@st.composite
def supernets(draw: st.DrawFn) -> tuple[Modules, int]:
    """Modules of two shapes with distinct scores; some places free, some modules without any rank."""
    count, places = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    numbers = iter(draw(st.permutations(range(count * places))))
    used = draw(st.lists(st.booleans(), min_size=count * places, max_size=count * places))
    flat = [float(next(numbers)) if u else None for u in used]
    modules = [flat[i * places : (i + 1) * places] for i in range(count)]
    return modules, draw(st.integers(1, 2 * count))


def stack_of(modules: Modules) -> Stack:
    places = len(modules[0])
    active = torch.tensor([[s is not None for s in m] for m in modules])
    size = Size(6, 7, places, 1)
    A = [torch.randn(places, 7) * mask[:, None] for mask in active]
    B = [torch.randn(6, places) * mask for mask in active]
    seeds = list(torch.arange(len(modules)).unsqueeze(1))
    return Stack([size] * len(modules), {"A": A, "B": B, "active": list(active), "seed": seeds})


def round_of(modules: Modules, split: int, count: int) -> list[dict[str, Tensor]]:
    """One round over two stacks, at a step where it is due; IS = S(M) − S(M∖r) + S(M_r) is the planted score.

    Neither half of it ranks as the whole does: what a rank does alone is planted apart, and large.
    """
    parts = [part for part in (modules[:split], modules[split:]) if part]
    stacks = [stack_of(part) for part in parts]
    scores = [torch.tensor([[math.nan if s is None else s for s in m] for m in part]) for part in parts]
    alone = [(100 * torch.randperm(s.numel())).float().view_as(s).where(s.isfinite(), math.nan) for s in scores]
    without = [3.0 - (s - a) for s, a in zip(scores, alone, strict=True)]
    ablation = Ablation(3.0, without, alone)
    step = Step(4, 3, 100, ablate=lambda: ablation)
    updates = method(prune_per_round=count).after_step(stacks, step)
    for stack, update in zip(stacks, updates, strict=True):
        stay = update["active"] & stack["active"]
        opened = update["active"] & ~stack["active"]
        assert torch.equal(update["A"][stay], stack["A"][stay])
        assert torch.equal(update["B"].mT[stay], stack["B"].mT[stay])
        assert (update["B"].mT[~stay] == 0).all()
        assert (update["A"][~update["active"]] == 0).all()
        assert (update["A"][opened].abs().amax(-1) > 0).all()
    return updates


@settings(max_examples=150, deadline=None)
@given(supernets(), st.integers(0, 6))
def test_a_round_is_the_oracles(supernet: tuple[Modules, int], split: int) -> None:
    modules, count = supernet
    updates = round_of(modules, split, count)
    after = torch.cat([update["active"] for update in updates]).tolist()
    assert after == oracle(modules, count)
    assert sum(map(sum, after)) == sum(s is not None for places in modules for s in places)
    for before, now in zip(modules, after, strict=True):
        lost = any(s is not None and not kept for s, kept in zip(before, now, strict=True))
        gained = any(s is None and kept for s, kept in zip(before, now, strict=True))
        assert not (lost and gained)


def test_new_rows_are_the_layers_own_in_whatever_stack_and_follow_the_seed() -> None:
    """Two stacks of equal width, the same step: no two new rows are alike; the seeds decide, as stored."""
    modules: Modules = [[1.0, None], [9.0, None], [8.0, None], [0.0, None]]
    stacks = [stack_of(modules[:2]), stack_of(modules[2:])]
    for seed, stack in zip((10, 20), stacks, strict=True):
        for number, one in enumerate(stack.tensors("seed")):
            one.fill_(seed + number)
    scores = [
        torch.tensor([[math.nan if s is None else s for s in m] for m in part]) for part in (modules[:2], modules[2:])
    ]
    ablation = Ablation(0.0, [-s for s in scores], [torch.zeros_like(s) for s in scores])

    def opened_rows(number: int) -> Tensor:
        step = Step(number, number - 1, 100, ablate=lambda: ablation)
        updates = method(prune_per_round=2).after_step(stacks, step)
        rows = [update["A"][update["active"] & ~stack["active"]] for stack, update in zip(stacks, updates, strict=True)]
        return torch.cat(rows)

    rows = opened_rows(4)
    assert len(rows) == 2
    assert len(rows.unique()) == rows.numel()
    assert float(rows.abs().max()) <= 7**-0.5, "LoRA's start of A: uniform on ±1/√in"
    assert torch.equal(opened_rows(4), rows)
    assert bool((opened_rows(7) != rows).all())


def test_the_seeds_of_new_rows_follow_torchs_own_when_the_adapter_is_made(batch: dict[str, Tensor]) -> None:
    found = []
    for seed in (3, 3, 4):
        base = tiny_bert()
        torch.manual_seed(seed)
        model = get_peft_model(base, rankwise.AloraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
        found.append(torch.cat([layer.tensors("default").seed for layer in adapted_layers(model).values()]))  # type: ignore[arg-type]
    assert torch.equal(found[0], found[1])
    assert bool((found[0] != found[2]).all())
    assert len(found[0].unique()) == len(found[0])


def test_ties_and_round_robin_by_hand() -> None:
    modules: Modules = [[1.0, 2.0, None, None], [9.0, 8.0, None, None], [5.0, 6.0, None, None], [0.0, 0.5, None, None]]
    (update,) = round_of(modules, 0, 3)
    assert update["active"].sum(-1).tolist() == [1, 4, 3, 0]


# --- on planted truth ---------------------------------------------------------------------------------------------


class Output:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Regression(nn.Module):
    """Three linear maps of one input, added up; what is planted is which ranks of which map help."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(8, 5, bias=False) for _ in range(3)])
        for layer in self.maps:
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        return Output((sum(layer(x) for layer in self.maps) - y).square().mean())


def test_planted_useless_and_harmful_ranks_go_first() -> None:
    """Two helpful ranks, one that does nothing and three that only harm, the worst of them in two modules."""
    torch.manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 8)).Q[:6]
    outputs = torch.linalg.qr(torch.randn(5, 5)).Q
    x = torch.randn(200, 8)
    y = (x @ directions[0])[:, None] * outputs[0] * 3 + (x @ directions[1])[:, None] * outputs[1] * 2
    batch = {"x": x, "y": y}
    config = rankwise.AloraConfig(
        r=2,
        max_r=4,
        target_modules=["maps.0", "maps.1", "maps.2"],
        score_batch=batch,
        rounds=1,
        warmup_steps=1,
        recovery_steps=1,
        prune_per_round=4,
    )
    model: Any = get_peft_model(Regression(), config)
    planted = {  # (module, rank) → (direction, output, size); what the update adds
        (0, 0): (0, 0, 3.0),
        (0, 1): (1, 1, 2.0),
        (1, 0): (2, 2, 0.0),
        (1, 1): (3, 3, 1.5),
        (2, 0): (4, 4, 1.0),
        (2, 1): (5, 0, 2.0),
    }
    layers = [layer.tensors("default") for layer in adapted_layers(model).values()]
    with torch.no_grad():
        for (i, j), (a, b, size) in planted.items():
            layers[i].A[j], layers[i].B[:, j] = directions[a], size * outputs[b]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(**batch).loss.backward()
    optimizer.step()
    assert rankwise.ranks(model) == {"maps.0": 4, "maps.1": 1, "maps.2": 1}, "there is room for two, so two move"
    assert layers[0].active[:2].all(), "the helpful ranks stay"
    assert not layers[1].active[1], "the harmful ones go"
    assert not layers[2].active[1]


# --- in training ------------------------------------------------------------------------------------------------------


def tiny(batch: dict[str, Tensor], **fields: Any) -> Any:
    torch.manual_seed(2)
    shared = {"rounds": 3, "warmup_steps": 3, "recovery_steps": 2, "prune_per_round": 5, "score_batch": batch, "r": 3}
    config = rankwise.AloraConfig(target_modules="all-linear", task_type="SEQ_CLS", **shared | fields)
    return get_peft_model(tiny_bert(), config)


def steps(model: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_the_budget_is_constant_and_what_moved_is_forgotten(kind: str, batch: dict[str, Tensor]) -> None:
    model = tiny(batch)
    optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
    tensors = [layer.tensors("default") for layer in adapted_layers(model).values()]
    before = [t.active.clone() for t in tensors]
    moved = 0
    for number in range(1, 13):
        steps(model, batch, optimizer, 1)
        assert sum(rankwise.ranks(model).values()) == 3 * len(tensors)
        for t, was in zip(tensors, before, strict=True):
            changed = t.active != was
            assert not changed.any() or number in (3, 5, 7)
            moved += int(changed.sum())
            closed = ~t.active
            assert (t.A[closed] == 0).all()
            assert (t.B[:, closed] == 0).all()
            for p, entries in ((t.A, t.A[changed]), (t.B.T, t.B.T[changed])):
                for moment in optimizer.state[t.A if p is t.A else t.B].values():
                    if isinstance(moment, Tensor) and moment.dim() == 2:
                        rows = moment if p is t.A else moment.T
                        assert (rows[changed] == 0).all()
                        assert rows[changed].shape == entries.shape
        before = [t.active.clone() for t in tensors]
    assert moved >= 2 * 5


def test_growing_never_changes_the_function(batch: dict[str, Tensor]) -> None:
    """A round that drops nothing of value: the function after it is that of the kept ranks alone, to the bit."""
    model = tiny(batch, rounds=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, batch, optimizer, 2)
    layers = adapted_layers(model)
    optimizer.param_groups[0]["lr"] = 0.0
    before = {name: layer.tensors("default").B.clone() for name, layer in layers.items()}
    steps(model, batch, optimizer, 1)
    opened = 0
    for name, layer in layers.items():
        t = layer.tensors("default")
        fresh = t.active & (t.B == 0).all(0)
        opened += int(fresh.sum())
        kept = t.active & ~fresh
        assert torch.equal(t.B[:, kept], before[name][:, kept])
        assert (t.A[fresh].abs().amax(-1) > 0).all() if fresh.any() else True
    assert opened == 5


def test_without_rounds_it_is_lora(batch: dict[str, Tensor]) -> None:
    alora = tiny(batch, rounds=0, score_batch=None, r=3)
    torch.manual_seed(2)
    lora = get_peft_model(tiny_bert(), rankwise.LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"))
    with torch.no_grad():
        for one, other in zip(adapted_layers(alora).values(), adapted_layers(lora).values(), strict=True):
            other.tensors("default").A.copy_(one.tensors("default").A[:3])
        for one, other in zip(alora.named_parameters(), lora.named_parameters(), strict=True):
            if "classifier" in one[0]:
                other[1].copy_(one[1])
    losses = [
        steps(model, batch, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 8)
        for model in (alora, lora)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_module_may_reach_rank_zero_and_the_scale_stays(batch: dict[str, Tensor]) -> None:
    model = tiny(batch, r=1, max_r=3, prune_per_round=6, lora_alpha=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    steps(model, batch, optimizer, 8)
    ranks = rankwise.ranks(model)
    assert min(ranks.values()) == 0
    assert max(ranks.values()) > 1
    assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {4.0}
    sizes = [layer.tensors("default").size for layer in adapted_layers(model).values()]
    assert rankwise.status(model).parameters.initial == sum(size.out + size.into for size in sizes)


def test_two_runs_allocate_alike_and_dropout_draws_are_undisturbed(batch: dict[str, Tensor]) -> None:
    ends = []
    for rounds in (3, 3, 0):
        model = tiny(batch, rounds=rounds, lora_dropout=0.3)
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        steps(model, batch, optimizer, 10)
        ends.append((rankwise.ranks(model), torch.get_rng_state()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[2][1])


def test_the_batch_is_not_saved_nor_copied(batch: dict[str, Tensor], tmp_path: Any) -> None:
    model = tiny(batch)
    assert model.peft_config["default"].to_dict()["score_batch"] is None
    assert model.peft_config["default"].score_batch is batch
    model.save_pretrained(str(tmp_path))
    assert "score_batch" in (tmp_path / "adapter_config.json").read_text()
