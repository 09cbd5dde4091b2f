"""Sharing a budget against a sort of every score in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.allocate import keep_top, keep_within


def by_sorting(scores: list[Tensor], budget: int) -> list[list[bool]]:
    every = [(-float(x), k, i) for k, s in enumerate(scores) for i, x in enumerate(s.flatten())]
    chosen = {(k, i) for _, k, i in sorted(every)[:budget]}
    return [[(k, i) in chosen for i in range(s.numel())] for k, s in enumerate(scores)]


def masks(scores: list[Tensor], budget: int) -> list[list[bool]]:
    kept = keep_top(scores, budget)
    assert [m.shape for m in kept] == [s.shape for s in scores]
    assert all(m.dtype == torch.bool for m in kept)
    return [m.flatten().tolist() for m in kept]


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    levels=st.integers(1, 30),
    budget=st.integers(0, 90),
    seed=st.integers(0, 10**6),
)
def test_equals_brute_force(shapes: list[tuple[int, int]], levels: int, budget: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, shape, generator=generator).float() for shape in shapes]
    kept = masks(scores, budget)
    assert kept == by_sorting(scores, budget)
    assert sum(map(sum, kept)) == min(budget, sum(s.numel() for s in scores))


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (1, 1), (7, 7), (11, 11), (12, 12), (13, 12), (1000, 12)])
def test_keeps_exactly_the_budget_when_everything_is_tied(budget: int, kept: int) -> None:
    scores = [torch.zeros(2, 3), torch.zeros(6)]
    flat = [x for m in masks(scores, budget) for x in m]
    assert flat == [True] * kept + [False] * (12 - kept)


def test_ties_are_broken_alike_every_time_at_a_size_where_sorting_may_not_be_stable() -> None:
    scores = [torch.arange(5000).remainder(3).float(), torch.ones(5000)]
    assert masks(scores, 4000) == by_sorting(scores, 4000)


def test_one_high_layer_may_take_everything() -> None:
    kept = masks([torch.zeros(4), torch.ones(4), -torch.ones(4)], 4)
    assert kept == [[False] * 4, [True] * 4, [False] * 4]


def test_negative_and_infinite_scores_are_ordered() -> None:
    assert masks([torch.tensor([-1.0, float("-inf"), -3.0]), torch.tensor([float("inf"), -2.0])], 3) == [
        [True, False, False],
        [True, True],
    ]


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(-5, 5), st.sampled_from([3, 7, 8, 40])), min_size=1, max_size=30),
    split=st.integers(0, 30),
    share=st.floats(0.0, 1.1),
)
def test_whatever_still_fits_is_kept_from_the_top_down(
    entries: list[tuple[int, int]], split: int, share: float
) -> None:
    budget = share * sum(cost for _, cost in entries)
    left, expected = budget * (1 + 1e-12), [False] * len(entries)
    for i in sorted(range(len(entries)), key=lambda i: -entries[i][0]):
        if entries[i][1] <= left:
            expected[i], left = True, left - entries[i][1]
    parts = [part for part in (entries[:split], entries[split:]) if part]
    scores = [torch.tensor([float(score) for score, _ in part]) for part in parts]
    costs = [torch.tensor([float(cost) for _, cost in part]) for part in parts]
    kept = torch.cat(keep_within(scores, costs, budget)).tolist()
    assert kept == expected
