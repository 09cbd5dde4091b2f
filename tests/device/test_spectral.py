"""`rankwise.spectral` on a second device gives what it gives on the CPU, on the device that the tensors are on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rankwise import spectral
from rankwise.errors import ArgumentError
from rankwise.update import Factors

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


W = noise(3, 6, 4)
UPDATE = Factors(noise(6, 3), noise(3), noise(3, 4))

MEASURES: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "condition number": lambda on: spectral.condition_number(on(W)),
    "condition numbers": lambda on: spectral.condition_numbers(Factors(*map(on, UPDATE))),
    "condition numbers of rank 0": lambda on: spectral.condition_numbers(
        Factors(on(noise(6, 0)), on(noise(0)), on(noise(0, 4)))
    ),
    "drift": lambda on: spectral.weight_drift(on(W[0]), on(W)),
    "drift of the leading triplets": lambda on: spectral.weight_drift_top_k(on(W[0]), on(W[1]), 2),
    "effective rank": lambda on: spectral.effective_rank(on(W.abs())),
    "stable rank": lambda on: spectral.stable_rank(on(W.abs())),
    "energy rank": lambda on: spectral.energy_rank(on(W.abs()), 0.9),
    "energy rank of nothing": lambda on: spectral.energy_rank(on(noise(2, 0)), 0.9),
    "orthogonal": lambda on: UPDATE._make(map(on, UPDATE)).singular_values(),
    "norm": lambda on: torch.tensor(UPDATE._make(map(on, UPDATE)).norm()),
    "kept": lambda on: UPDATE._make(map(on, UPDATE)).kept(),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    here = tree_leaves(MEASURES[name](lambda t: t))
    there = tree_leaves(MEASURES[name](lambda t: t.to(device)))
    for found, wanted in zip(there, here, strict=True):
        assert found.device.type == (device.type if name != "norm" else "cpu")
        torch.testing.assert_close(found.cpu(), wanted, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_spectra_are_those_of_the_cpu(device: torch.device) -> None:
    updates = {"a": UPDATE, "b": Factors(2 * UPDATE.B, UPDATE.s, UPDATE.A)}
    here = spectral.spectra(updates)
    there = spectral.spectra({name: Factors(*(t.to(device) for t in update)) for name, update in updates.items()})
    for name, spectrum in here.items():
        assert there[name].singular_values.device.type == device.type
        torch.testing.assert_close(there[name].singular_values.cpu(), spectrum.singular_values)
        assert there[name].effective_rank == pytest.approx(spectrum.effective_rank, rel=1e-6)
        assert there[name].stable_rank == pytest.approx(spectrum.stable_rank, rel=1e-6)
        assert there[name].energy_rank(0.9) == spectrum.energy_rank(0.9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused_there_too(bad: float, device: torch.device) -> None:
    with pytest.raises(ArgumentError, match="W"):
        spectral.condition_number(torch.full((2, 2), bad, device=device))
