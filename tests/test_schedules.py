"""The cubic budget and its allocation steps against their definitions in exact arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.errors import ArgumentError
from rankwise.schedules import CubicBudget, steps_of


def b(t: int, budget: CubicBudget) -> int:
    """The formula, floored, in fractions."""
    b0, bT, T = budget.start, budget.end, budget.total
    if t < budget.tinit:
        return b0
    if t < T - budget.tfinal:
        return int(bT + (b0 - bT) * (1 - Fraction(t - budget.tinit, T - budget.tinit - budget.tfinal)) ** 3)
    return bT


def allocations(budget: CubicBudget) -> set[int]:
    """The steps at which a run that skips none allocates."""
    last = budget.total - budget.tfinal
    return {t for t in range(1, last) if t % budget.every == 0 and t >= budget.tinit} | {last}


@st.composite
def budgets(draw: st.DrawFn) -> CubicBudget:
    end, extra = draw(st.integers(0, 60)), draw(st.integers(0, 200))
    tinit, falling, tfinal = draw(st.integers(0, 20)), draw(st.integers(1, 60)), draw(st.integers(0, 20))
    return CubicBudget(end + extra, end, tinit, tfinal, tinit + falling + tfinal, draw(st.integers(1, 100)))


@settings(max_examples=50, deadline=None)
@given(budget=budgets())
def test_the_budget_is_the_formula_and_never_rises(budget: CubicBudget) -> None:
    values = [budget.at(t) for t in range(1, budget.total + 1)]
    assert values == [b(t, budget) for t in range(1, budget.total + 1)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert all(budget.end <= value <= budget.start for value in values)


@pytest.mark.parametrize(
    ("t", "value"), [(1, 125), (9, 125), (10, 125), (11, 64), (12, 27), (13, 8), (14, 1), (15, 0), (16, 0), (18, 0)]
)
def test_whole_budgets_are_not_rounded_down_by_one(t: int, value: int) -> None:
    assert CubicBudget(start=125, end=0, tinit=10, tfinal=3, total=18, every=1).at(t) == value


@pytest.mark.parametrize(
    ("budget", "values"),
    [
        (CubicBudget(12, 8, 2, 3, 10, 2), [12, 12, 10, 8, 8, 8, 8, 8, 8, 8]),
        (CubicBudget(64, 0, 0, 0, 4, 1), [27, 8, 1, 0]),
        (CubicBudget(9, 9, 1, 1, 4, 1), [9, 9, 9, 9]),
        (CubicBudget(100, 20, 2, 2, 5, 1), [100, 100, 20, 20, 20]),
    ],
)
def test_budgets_worked_out_by_hand(budget: CubicBudget, values: list[int]) -> None:
    assert [budget.at(t) for t in range(1, budget.total + 1)] == values


@settings(max_examples=50, deadline=None)
@given(budget=budgets())
def test_when_every_step_runs_allocations_fall_on_the_multiples_and_on_the_last_step(budget: CubicBudget) -> None:
    due = {t for t in range(1, budget.total + 1) if budget.due(t - 1, t)}
    assert due == allocations(budget)


@settings(max_examples=50, deadline=None)
@given(budget=budgets(), data=st.data())
def test_skipped_steps_hand_their_allocation_on(budget: CubicBudget, data: st.DataObject) -> None:
    run = data.draw(st.lists(st.integers(1, budget.total), unique=True, min_size=1).map(sorted))
    last = 0
    for t in run:
        assert budget.due(last, t) == any(a in allocations(budget) for a in range(last + 1, t + 1))
        last = t


@pytest.mark.parametrize("every", [60, 61, 100, 1000])
def test_an_interval_longer_than_the_falling_phase_still_allocates_once(every: int) -> None:
    budget = CubicBudget(start=20, end=8, tinit=10, tfinal=30, total=90, every=every)
    assert budget.final == 60
    assert [t for t in range(1, 91) if budget.due(t - 1, t)] == [60]


@pytest.mark.parametrize(
    ("value", "total", "least", "steps"),
    [
        (0.1, 300, 0, 30),
        (0.25, 10, 0, 2),
        (0.999, 1000, 0, 999),
        (0.01, 20, 0, 0),
        (0.01, 20, 1, 1),
        (25, 300, 0, 25),
        (25.0, 300, 0, 25),
        (1.0, 300, 0, 1),
        (0, 300, 0, 0),
        (0.0, 300, 0, 0),
        (400, 300, 0, 400),
    ],
)
def test_steps_of_reads_numbers_and_shares(value: float, total: int, least: int, steps: int) -> None:
    found = steps_of("tinit", value, total, least=least)
    assert found == steps
    assert type(found) is int


@pytest.mark.parametrize(
    ("value", "least", "message"),
    [
        (-1, 0, r"`deltaT` must be a whole number of steps ≥ 0, or a share between 0 and 1; found -1"),
        (-0.5, 0, r"found -0\.5"),
        (2.5, 0, r"found 2\.5"),
        (0, 1, r"whole number of steps ≥ 1, .*; found 0"),
        (0.0, 1, r"≥ 1, .*; found 0\.0"),
    ],
)
def test_steps_of_refuses_what_is_neither(value: float, least: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        steps_of("deltaT", value, 100, least=least)
