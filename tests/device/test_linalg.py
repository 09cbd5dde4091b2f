"""`rankwise.linalg` on a second device: what it gives on the CPU, on the device that its arguments are on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rankwise.linalg import allocate, budget, cayley, chain, draws, gates, norms, orthonormality, polar, prox
from rankwise.linalg.subspace import gradient_subspace, signed_permutation
from rankwise.linalg.svd import leading_triplets, leading_triplets_full

pytest_plugins = ["on_device"]
pytestmark = pytest.mark.device

On = Callable[[Tensor], Tensor]
"""Puts a tensor where a function shall run."""

STRETCH = (-0.1, 1.1)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def falling(*values: float) -> Tensor:
    """A matrix (8, 6) whose first singular values are these, far apart."""
    U, V = (torch.linalg.qr(noise(size, 6)).Q for size in (8, 6))
    S = torch.zeros(6)
    S[: len(values)] = torch.tensor(values)
    return U @ torch.diag(S) @ V.T


def product(factors: Any) -> Tensor:
    """Triplets are unique but for signs; what they make together is."""
    return factors.delta()


ORTHONORMAL = torch.linalg.qr(noise(6, 3)).Q.double()
SCORES = [noise(3, 4), noise(2, 4)]
SPECTRA = [scores.abs().flatten().sort(descending=True).values for scores in SCORES]
COSTS = [torch.full((3, 1), 2.0), torch.full((2, 1), 3.0)]

FUNCTIONS: dict[str, Callable[[On], Any]] = {
    "keep_top": lambda on: allocate.keep_top([on(s) for s in SCORES], 7),
    "keep_within": lambda on: allocate.keep_within([on(s) for s in SCORES], [on(c) for c in COSTS], 20),
    "share_out": lambda on: allocate.share_out(on(torch.tensor([1.0, 3.0, 2.0])), on(torch.tensor([9, 1, 9])), 4),
    "best_ranks": lambda on: torch.tensor(budget.best_ranks([on(s) for s in SPECTRA], [5, 3], 30)),
    "cayley": lambda on: cayley.cayley(on(noise(2, 6, 3))),
    "inverse_cayley": lambda on: cayley.inverse_cayley(on(ORTHONORMAL)),
    "invertible_signs": lambda on: cayley.invertible_signs(on(ORTHONORMAL[:3])),
    "chain": lambda on: chain.chain(on(noise(2, 3, 4, 4))),
    "uniform": lambda on: draws.uniform(on(torch.tensor([7, -3])), 5, 4),
    "sampled_gate": lambda on: gates.sampled_gate(on(noise(4)), on(noise(4).sigmoid()), 0.7, STRETCH),
    "evaluation_gate": lambda on: gates.evaluation_gate(on(3 * noise(4)), STRETCH),
    "open_probability": lambda on: gates.open_probability(on(noise(4)), 0.7, STRETCH),
    "reopened": lambda on: gates.reopened(on(3 * noise(4)), STRETCH),
    "schatten": lambda on: norms.schatten(on(noise(2, 5, 4)), 1.5),
    "spectral norm": lambda on: norms.schatten(on(noise(2, 5, 4)), torch.inf),
    "on_unit_sphere": lambda on: norms.on_unit_sphere(on(noise(2, 4)), 3.0),
    "squared_norm_bound": lambda on: norms.squared_norm_bound(on(noise(2, 5, 3)), on(noise(2, 4, 3))),
    "orthonormality_gap": lambda on: orthonormality.orthonormality_gap(on(noise(2, 5, 3)), on(torch.ones(2))),
    "orthonormality_gap, a number": lambda on: orthonormality.orthonormality_gap(on(noise(2, 5, 3)), 0.5),
    "orthonormality_gap_squared": lambda on: orthonormality.orthonormality_gap_squared(on(noise(2, 5, 3)), 0.5),
    "inverse_root": lambda on: polar.inverse_root(on(noise(2, 3, 5).double())),
    "polar": lambda on: polar.polar(on(noise(2, 3, 5))),
    "soft_threshold": lambda on: prox.soft_threshold(on(noise(5)), 0.3),
    "gradient_subspace": lambda on: gradient_subspace(on(falling(4, 2, 1)), 4),
    "gradient_subspace, random directions": lambda on: gradient_subspace(on(falling(4)), 4),
    "signed_permutation": lambda on: signed_permutation(4, 6, device=on(noise(1)).device).apply(on(noise(6, 2))),
    "leading_triplets": lambda on: product(leading_triplets(on(falling(4, 2, 1)), 2).factors),
    "leading_triplets_full": lambda on: product(leading_triplets_full(on(falling(4, 2, 1)), 2).factors),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_give_what_they_give_on_the_cpu(name: str, device: torch.device) -> None:
    here = tree_leaves(FUNCTIONS[name](lambda t: t))
    there = tree_leaves(FUNCTIONS[name](lambda t: t.to(device)))
    assert len(there) == len(here)
    for found, wanted in zip(there, here, strict=True):
        if name != "best_ranks":
            assert found.device.type == device.type
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cayley", "chain", "sampled_gate", "schatten"])
def test_derivatives_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    """Some are written by hand."""
    found = []
    for where in (torch.device("cpu"), device):
        leaves: list[Tensor] = []

        def on(t: Tensor, where: torch.device = where, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(t.to(where).requires_grad_())
            return leaves[-1]

        outputs = tree_leaves(FUNCTIONS[name](on))
        torch.stack([t.square().sum() for t in outputs]).sum().backward()
        found.append([leaf.grad.cpu() for leaf in leaves])  # type: ignore[union-attr]
    for there, here in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
