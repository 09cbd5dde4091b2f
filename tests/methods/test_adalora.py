"""AdaLoRA against a loop over single numbers, written from equations (6) to (11) and the cubic budget."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

import rankwise
from conftest import tiny_bert
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import ArgumentError
from rankwise.methods.adalora import AdaLora
from rankwise.methods.base import Size, Stack, Step

NAMES = ("P", "Lambda", "Q")
T = 200
RATE = 2.0**-4
SHAPES = [[Size(5, 4, 4)] * 3, [Size(2, 6, 2), Size(2, 6, 2)]]
"""Two shapes; in the second the rank is clamped to 2, below target_r = 3: b0 = 16 and bT = 13 triplets."""
Layer = dict[str, Tensor]


def adalora(**fields: Any) -> AdaLora:
    method = AdaLora(**{"init_r": 4, "target_r": 3, "tinit": 20, "tfinal": 60, "deltaT": 7} | fields)
    method.check()
    return method


# --- the reference --------------------------------------------------------------------------------------------------


@dataclass
class Average:
    """Ī and Ū of one number."""

    mean: float = 0.0
    deviation: float = 0.0

    def see(self, importance: float, beta1: float, beta2: float) -> float:
        self.mean = beta1 * self.mean + (1 - beta1) * importance
        self.deviation = beta2 * self.deviation + (1 - beta2) * abs(importance - self.mean)
        return self.mean * self.deviation


@dataclass
class Reference:
    """One run, number by number. Weights and gradients are nested dicts of Python floats."""

    sizes: list[Size]
    target: int
    tinit: int
    tfinal: int
    every: int
    importance: str = "smoothed"
    beta1: float = 0.85
    beta2: float = 0.85
    averages: dict[tuple[Any, ...], Average] = field(default_factory=dict)
    kept: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.kept = {(k, i) for k, size in enumerate(self.sizes) for i in range(size.r)}
        self.b0, self.bT = len(self.kept), sum(min(self.target, size.r) for size in self.sizes)

    def budget(self, t: int) -> int:
        if t < self.tinit:
            return self.b0
        if t >= T - self.tfinal:
            return self.bT
        left = 1 - Fraction(t - self.tinit, T - self.tinit - self.tfinal)
        return int(self.bT + (self.b0 - self.bT) * left**3)

    def allocates(self, t: int) -> bool:
        return t == T - self.tfinal or (t % self.every == 0 and self.tinit <= t < T - self.tfinal)

    def score(self, key: tuple[Any, ...], weight: float, gradient: float) -> float:
        sensitivity = abs(weight * gradient)
        if self.importance == "sensitivity":
            return sensitivity
        return self.averages.setdefault(key, Average()).see(sensitivity, self.beta1, self.beta2)

    def triplet(self, k: int, i: int, weights: Layer, gradients: Layer) -> float:
        if self.importance == "magnitude":
            return abs(float(weights["Lambda"][i]))
        of = {
            name: [
                self.score((k, i, name, j), float(w), float(g))
                for j, (w, g) in enumerate(zip(weights[name], gradients[name], strict=True))
            ]
            for name in ("column", "row")
        }
        at_lambda = self.score((k, i, "Lambda"), float(weights["Lambda"][i]), float(gradients["Lambda"][i]))
        return at_lambda + sum(of["column"]) / len(of["column"]) + sum(of["row"]) / len(of["row"])

    def before(self, t: int, weights: list[Layer], gradients: list[Layer]) -> None:
        if t > T - self.tfinal:
            return
        scores = {
            (k, i): self.triplet(k, i, slices(weights[k], i), slices(gradients[k], i))
            for k, size in enumerate(self.sizes)
            for i in range(size.r)
        }
        if self.allocates(t):
            ranked = sorted(scores, key=lambda key: (-scores[key], key))
            self.kept = set(ranked[: self.budget(t)])

    def after(self, t: int, weights: list[Layer]) -> None:
        if self.allocates(t) or t >= T - self.tfinal:
            for k, size in enumerate(self.sizes):
                for i in range(size.r):
                    if (k, i) not in self.kept:
                        weights[k]["Lambda"][i] = 0.0

    def mask(self) -> list[list[bool]]:
        return [[(k, i) in self.kept for i in range(size.r)] for k, size in enumerate(self.sizes)]


def slices(layer: Layer, i: int) -> Layer:
    return {"column": layer["P"][:, i], "Lambda": layer["Lambda"], "row": layer["Q"][i]}


# --- a run ----------------------------------------------------------------------------------------------------------


def layer_of(method: AdaLora, size: Size) -> Layer:
    start = method.start(size, lambda: torch.zeros(size.out, size.into))
    return {
        name: start.get(name, torch.zeros(slot.shape, dtype=slot.dtype)) for name, slot in method.slots(size).items()
    }


def few_digits(x: Tensor) -> Tensor:
    return (x * 2**10).round() / 2**10


def write(stacks: list[Stack], updates: list[dict[str, Tensor]]) -> None:
    for layers, update in zip(stacks, updates, strict=False):
        for name, value in update.items():
            for old, new in zip(layers.tensors(name), value, strict=True):
                old.copy_(new)


@dataclass
class Run:
    """A run of the method over random gradients, each weight moved by plain descent; yields after every step run.

    Weights, gradients and the rate are few binary digits, so that the moves are exact in float32 too.
    """

    method: AdaLora
    shapes: list[list[Size]] = field(default_factory=lambda: SHAPES)
    skipped: frozenset[int] = frozenset()
    groups: list[list[Layer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = [[layer_of(self.method, size) for size in sizes] for sizes in self.shapes]
        for layer in self.layers:
            for name in ("P", "Q"):
                layer[name].copy_(few_digits(layer[name]))
        self.sizes = [size for sizes in self.shapes for size in sizes]

    @property
    def layers(self) -> list[Layer]:
        return list(itertools.chain(*self.groups))

    def stacks(self, gradients: list[list[Layer]] | None = None) -> list[Stack]:
        made = []
        for g, (sizes, group) in enumerate(zip(self.shapes, self.groups, strict=True)):
            values = {name: [layer[name] for layer in group] for name in group[0]}
            read = None if gradients is None else lambda name, g=g: [layer[name] for layer in gradients[g]]
            made.append(Stack(sizes, values, read))
        return made

    def steps(self, reference: Reference | None = None) -> Iterator[int]:
        generator = torch.Generator().manual_seed(3)
        last = 0
        shadow = [{name: layer[name].double() for name in NAMES} for layer in self.layers]
        for t in range(1, T + 1):
            gradients = [
                [
                    {name: few_digits(torch.randn(layer[name].shape, generator=generator)) for name in NAMES}
                    for layer in group
                ]
                for group in self.groups
            ]
            if t in self.skipped:
                continue
            step = Step(t, last, T)
            stacks = self.stacks(gradients)
            write(stacks, self.method.before_step(stacks, step))
            flat = list(itertools.chain(*gradients))
            if reference is not None:
                reference.before(t, shadow, flat)
            for weights, moved, slope in zip(self.layers, shadow, flat, strict=True):
                for name in NAMES:
                    weights[name] -= RATE * slope[name]
                    moved[name] -= RATE * slope[name].double()
            stacks = self.stacks()
            write(stacks, self.method.after_step(stacks, step))
            if reference is not None:
                reference.after(t, shadow)
            self.shadow, last = shadow, t
            yield t

    def mask(self) -> list[list[bool]]:
        return [layer["kept"].tolist() for layer in self.layers]

    def count(self) -> int:
        return sum(map(sum, self.mask()))


@pytest.mark.parametrize("importance", ["smoothed", "sensitivity", "magnitude"])
@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.5, 0.95)])
def test_a_run_equals_the_equations_at_every_step(importance: str, betas: tuple[float, float]) -> None:
    run = Run(adalora(importance=importance, beta1=betas[0], beta2=betas[1]))
    reference = Reference(run.sizes, 3, 20, 60, 7, importance, *betas)
    masks = []
    for t in run.steps(reference):
        assert run.mask() == reference.mask(), t
        for layer, expected in zip(run.layers, run.shadow, strict=True):
            assert torch.equal(layer["Lambda"].double(), expected["Lambda"]), t
        if importance == "smoothed":
            assert_averages(run, reference)
        masks.append(run.mask())
    assert len(masks) == T
    assert len(list(itertools.groupby(masks))) > 5


def assert_averages(run: Run, reference: Reference) -> None:
    for k, (size, layer) in enumerate(zip(run.sizes, run.layers, strict=True)):
        for i in range(size.r):
            stored = {name: slices({n: layer[f"{n}_{name}"] for n in NAMES}, i) for name in ("mean", "deviation")}
            for part, which in itertools.product(("column", "row"), ("mean", "deviation")):
                expected = [getattr(reference.averages[k, i, part, j], which) for j in range(len(stored[which][part]))]
                assert stored[which][part].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
            for which in ("mean", "deviation"):
                expected = getattr(reference.averages[k, i, "Lambda"], which)
                assert float(stored[which]["Lambda"][i]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("deltaT", [1, 7, 119, 120, 150, 1000])
@pytest.mark.parametrize("importance", ["smoothed", "sensitivity", "magnitude"])
def test_exactly_the_final_budget_is_left_with_clamped_layers_at_any_interval(deltaT: int, importance: str) -> None:
    run = Run(adalora(deltaT=deltaT, importance=importance))
    counts = [run.count() for _ in run.steps()]
    assert counts[T - 60 - 2] >= counts[T - 60 - 1]
    assert counts[T - 60 - 1 :] == [3 * 3 + 2 * 2] * 61
    assert sum(int((layer["Lambda"] != 0).sum()) for layer in run.layers) == 13
    assert [int((layer["Lambda"] != 0).sum()) for layer in run.layers] == list(map(sum, run.mask()))


def test_the_number_kept_is_the_budget_at_every_allocation() -> None:
    run = Run(adalora(target_r=1, init_r=4, deltaT=5))
    reference = Reference(run.sizes, 1, 20, 60, 5)
    seen = []
    for t in run.steps():
        if reference.allocates(t):
            assert run.count() == reference.budget(t)
            seen.append(run.count())
    assert seen[0] == 16
    assert seen[-1] == 5
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 5


def test_triplets_can_come_back_before_the_final_step_and_not_after() -> None:
    run = Run(adalora(target_r=1, importance="sensitivity"))
    masks, lambdas = {}, {}
    for t in run.steps():
        masks[t] = torch.tensor(list(itertools.chain(*run.mask())))
        lambdas[t] = torch.cat([layer["Lambda"] for layer in run.layers])
    final = T - 60
    returned = sum(bool((masks[t] & ~masks[t - 1]).any()) for t in range(2, final + 1))
    assert returned > 3
    assert all(torch.equal(masks[t], masks[final]) for t in range(final, T + 1))
    assert all(torch.equal(lambdas[t] != 0, masks[final]) for t in range(final, T + 1))
    dropped = ~masks[70]
    assert bool(dropped.any())
    assert (lambdas[70][dropped] == 0).all()
    assert (lambdas[71][dropped] != 0).all()


@pytest.mark.parametrize("skipped", [{140}, set(range(130, 160)), {21, 28, 35, 140}])
def test_a_skipped_allocation_is_made_up_for_at_the_next_step(skipped: set[int]) -> None:
    run = Run(adalora(), skipped=frozenset(skipped))
    counts = {t: run.count() for t in run.steps()}
    resumed = min(t for t in counts if t >= 140)
    assert all(count == 13 for t, count in counts.items() if t >= resumed)
    assert all(torch.equal(layer["Lambda"] != 0, layer["kept"]) for layer in run.layers)
    if 28 in skipped:
        reference = Reference(run.sizes, 3, 20, 60, 7)
        assert (counts[22], counts[29]) == (reference.budget(22), reference.budget(29))


def test_equal_init_and_target_ranks_never_drop_a_triplet() -> None:
    run = Run(adalora(init_r=3), shapes=[[Size(5, 4, 3)] * 2])
    assert {run.count() for _ in run.steps()} == {6}


@pytest.mark.parametrize("importance", ["smoothed", "magnitude"])
def test_finalize_applies_the_final_budget_early(importance: str) -> None:
    run = Run(adalora(importance=importance))
    for t in run.steps():
        if t == 50:
            break
    scores = []
    for layer in run.layers:
        s = {name: layer[f"{name}_mean"] * layer[f"{name}_deviation"] for name in NAMES if "P_mean" in layer}
        of = s["Lambda"] + s["P"].mean(0) + s["Q"].mean(1) if s else layer["Lambda"].abs()
        scores += of.tolist()
    stacks = run.stacks()
    write(stacks, run.method.finalize(stacks))
    found = list(itertools.chain(*run.mask()))
    assert sum(found) == 13
    assert sorted(range(16), key=lambda i: -scores[i])[:13] == sorted(
        (i for i in range(16) if found[i]), key=lambda i: -scores[i]
    )
    assert all((layer["Lambda"][~layer["kept"]] == 0).all() for layer in run.layers)


# --- the regulariser ------------------------------------------------------------------------------------------------


def plain_penalty(layers: list[Layer], weight: float, form: str) -> Tensor:
    """γ·R over layers, float64, in one of the two readings of eq. 4."""
    gaps = []
    for layer in layers:
        P, Q = layer["P"], layer["Q"]
        gaps += [(P.T @ P - torch.eye(P.shape[1])).norm(), (Q @ Q.T - torch.eye(Q.shape[0])).norm()]
    every = torch.stack(gaps)
    return weight * (every.mean() if form == "mean" else every.square().sum())


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_both_regulariser_forms_equal_autograd(form: str) -> None:
    run = Run(adalora(orth_reg_form=form, orth_reg_weight=0.3))
    for layer in run.layers:
        layer["P"].mul_(15)
        layer["Q"].mul_(20)
    penalty = run.method.penalty(run.stacks(), Step(1, 0, T))
    leaves = [{name: layer[name].double().requires_grad_() for name in ("P", "Q")} for layer in run.layers]
    expected = plain_penalty(leaves, 0.3, form)
    expected.backward()
    assert penalty is not None
    assert float(penalty.value) == pytest.approx(float(expected.detach()), rel=1e-6)
    found = [
        {name: gradients[name][n] for name in ("P", "Q")}
        for gradients in penalty.gradients
        for n in range(3)
        if n < len(gradients["P"])
    ]
    for layer, leaf in zip(found, leaves, strict=True):
        for name in ("P", "Q"):
            assert torch.allclose(layer[name].double(), leaf[name].grad, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def test_summed_squares_start_346_times_larger_than_the_mean_on_72_layers_of_768() -> None:
    """Two layers stand for 72: the mean does not depend on their number, the sum is proportional to it."""
    size = Size(768, 768, 12)
    values = {}
    for form in ("mean", "sum"):
        torch.manual_seed(0)
        method = adalora(init_r=12, target_r=8, orth_reg_form=form)
        layers = [layer_of(method, size) for _ in range(2)]
        stack = Stack([size] * 2, {name: [layer[name] for layer in layers] for name in ("P", "Q")})
        penalty = method.penalty([stack], Step(1, 0, T))
        assert penalty is not None
        values[form] = float(penalty.value)
    assert 72 / 2 * values["sum"] / values["mean"] == pytest.approx(346, rel=0.02)


def test_weight_zero_adds_nothing() -> None:
    run = Run(adalora(orth_reg_weight=0.0))
    assert run.method.penalty(run.stacks(), Step(1, 0, T)) is None


# --- the start and what is refused ----------------------------------------------------------------------------------


def test_the_start_makes_no_update_from_small_random_vectors() -> None:
    method, size = adalora(), Size(300, 200, 4)
    layer = layer_of(method, size)
    assert (method.factors(layer, 2.0).delta() == 0).all()
    assert layer["kept"].all()
    assert float(layer["P"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(layer["Q"].std()) == pytest.approx(0.02, rel=0.1)
    other = method.start(size, lambda: torch.zeros(300, 200), zero=False)
    assert float(method.factors(other, 1.0).delta().abs().mean()) > 0.1


def test_factors_are_P_Lambda_Q_times_the_scale() -> None:
    P, L, Q = torch.randn(5, 3), torch.randn(3), torch.randn(3, 4)
    found = adalora().factors({"P": P, "Lambda": L, "Q": Q}, 0.5).delta()
    assert torch.allclose(found, 0.5 * P @ torch.diag(L) @ Q, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "target", "initial"),
    [({"r": 8}, 8, 12), ({"r": 5}, 5, 8), ({"r": 4, "target_r": 2}, 2, 3), ({"target_r": 2, "init_r": 2}, 2, 2)],
)
def test_ranks_left_out_follow_from_the_others(fields: dict[str, int], target: int, initial: int) -> None:
    method = AdaLora(**fields)  # type: ignore[arg-type]
    method.check()
    assert (method.target_r, method.init_r, method.start_rank) == (target, initial, initial)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_r": 2}, r"`init_r` must be at least target_r \(3\); found 2"),
        ({"target_r": 0}, r"`target_r` must be a whole number ≥ 1; found 0"),
        ({"total_step": 80}, r"`tinit \+ tfinal` must be less than total_step \(80\); found 80"),
        ({"total_step": 10, "tinit": 0.5, "tfinal": 0.5}, r"`tinit \+ tfinal` must be less than .*10.*found 10"),
        ({"total_step": 0}, r"`total_step` must be a whole number ≥ 1; found 0"),
        ({"orth_reg_weight": -0.1}, r"`orth_reg_weight` must be a number ≥ 0; found -0\.1"),
        ({"orth_reg_form": "max"}, r"`orth_reg_form` must be one of mean, sum; found 'max'"),
        ({"importance": "rank"}, r"`importance` must be one of smoothed, sensitivity, magnitude; found 'rank'"),
        ({"beta1": 1.0}, r"`beta1` must be a number in \[0, 1\); found 1\.0"),
        ({"beta2": -0.1}, r"`beta2` must be a number in \[0, 1\); found -0\.1"),
        ({"tinit": -1}, r"`tinit` must be a number ≥ 0; found -1"),
        ({"total_step": 200, "deltaT": 0}, r"`deltaT` must be a whole number of steps ≥ 1, .*; found 0"),
        ({"total_step": 200, "tinit": 2.5}, r"`tinit` must be a whole number of steps ≥ 0, .*; found 2\.5"),
    ],
)
def test_rules_that_are_broken_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        adalora(**fields)


def test_phases_too_long_for_a_total_learnt_later_are_refused_then() -> None:
    method = adalora()
    with pytest.raises(ArgumentError, match=r"`tinit \+ tfinal` must be less than total_step \(80\); found 80"):
        method.budget([Size(5, 4, 4)], 80)
    with pytest.raises(ArgumentError, match=r"`total_step` must be known before ranks can be allocated; found None"):
        method.budget([Size(5, 4, 4)], None)
    assert method.needs(Step(1, 0, None)) == ("total_step=1000", "the number of optimiser steps of the whole run")
    assert method.needs(Step(1, 0, 200)) is None
    assert (method.final_step(200), method.final_step(None)) == (140, None)


# --- in training ----------------------------------------------------------------------------------------------------


def test_the_diagonal_takes_the_optimisers_step_and_is_masked_after_it(batch: dict[str, Tensor]) -> None:
    """(5): Λ̃ = Λ − η∇L. (6): Λ̃ outside the kept set becomes 0, at allocations and once the set is final."""
    schedule = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 3, "total_step": 14}
    config = rankwise.AdaLoraConfig(target_modules="all-linear", task_type="SEQ_CLS", init_weights=False, **schedule)
    model = get_peft_model(tiny_bert(), config).train()
    tensors = [layer.tensors("default") for layer in adapted_layers(model).values()]
    rate = 1e-2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for t in range(1, 15):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        moved = [own.Lambda.detach() - rate * own.Lambda.grad for own in tensors]
        optimizer.step()
        masked = t in {3, 6, 9} or t >= 10
        for own, free in zip(tensors, moved, strict=True):
            torch.testing.assert_close(own.Lambda.detach(), free * own.kept if masked else free)
        outside = sum(int(own.Lambda[~own.kept].count_nonzero()) for own in tensors)
        assert outside == 0 if masked or t < 3 else outside > 0
    assert sum(int(own.kept.sum()) for own in tensors) == 2 * len(tensors)
