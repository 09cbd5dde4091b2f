"""Numbers drawn from a seed and a counter: those of SplitMix64, uniform, unrelated, and the same wherever drawn."""

from __future__ import annotations

import pytest
import torch

from rankwise.linalg.draws import new_seed, uniform

STEP_BY_STEP = 0x9E3779B97F4A7C15


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as its authors publish it, in Python's whole numbers."""
    found = []
    for _ in range(count):
        state = (state + STEP_BY_STEP) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    return found


def test_the_reference_gives_the_published_numbers() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
@pytest.mark.parametrize("counter", [1, 2, 1000, 2**40])
def test_every_number_is_the_reference_generators(seed: int, counter: int) -> None:
    """A seed and a counter choose a stream: the counter-th number of the seed is where the stream starts."""
    (start,) = splitmix64((seed + (counter - 1) * STEP_BY_STEP) % 2**64, 1)
    expected = [((bits >> 41) + 0.5) / 2**23 for bits in splitmix64(start, 5)]
    assert uniform(torch.tensor([seed]), counter, 5).tolist() == [expected]


def test_numbers_are_uniform_and_unrelated_between_seeds_counters_and_places() -> None:
    seeds = torch.arange(20)
    x = torch.stack([uniform(seeds, counter, 50) for counter in range(1, 101)])  # counters, seeds, places
    assert 0 < float(x.min()) < 1e-4
    assert 1 - 1e-4 < float(x.max()) < 1
    ordered = x.flatten().sort().values
    largest_gap = (ordered - torch.linspace(0, 1, len(ordered))).abs().max()
    assert float(largest_gap) * len(ordered) ** 0.5 < 1.95, "Kolmogorov and Smirnov, one in a thousand"
    centred = (x - 0.5) * 12**0.5
    for one, other in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):
        assert abs(float((one * other).mean())) * one.numel() ** 0.5 < 4


def test_a_new_seed_follows_torchs_own() -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(int(new_seed()))
    assert found[0] == found[1] != found[2]
