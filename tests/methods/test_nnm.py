"""NNM's penalty against the singular value decomposition, and what it does to the factors on its own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.methods.base import Size, Stack, Step
from rankwise.methods.nnm import Nnm

STEP = Step(1, 0, None)
RANK, WIDTH = 4, 12


def stack(factors: list[Tensor]) -> Stack:
    return Stack([Size(5, A.shape[1], A.shape[0]) for A in factors], {"A": factors})


def random(r: int, n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(r, n)


def by_svd(A: Tensor, weight: float, *, scaled: bool) -> tuple[float, Tensor]:
    """−λ‖A‖_*/‖A‖_F and −λ·UVᵀ/‖A‖_F in float64, or both without the division."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    weight = weight / float(S.norm()) if scaled else weight
    return -weight * float(S.sum()), -weight * U @ Vh


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("weight", [5.0, 0.3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_and_gradient_are_the_equation_summed_over_layers(scaled: bool, weight: float, scale: float) -> None:
    groups = [[random(4, 9, scale) for _ in range(3)], [random(8, 64, 0.1 * scale)], [random(2, 2, scale)] * 2]
    penalty = Nnm(nuclear_weight=weight, scale_by_frobenius=scaled).penalty([stack(g) for g in groups], STEP)
    assert penalty is not None
    expected = [[by_svd(A, weight, scaled=scaled) for A in group] for group in groups]
    assert float(penalty.value) == pytest.approx(sum(value for group in expected for value, _ in group), rel=1e-6)
    for group, found in zip(expected, penalty.gradients, strict=True):
        assert found.keys() == {"A"}
        for (_, gradient), one in zip(group, found["A"], strict=True):
            assert (one.double() - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("scaled", [True, False])
def test_the_gradient_is_that_of_the_value_with_the_frobenius_norm_held_constant(scaled: bool) -> None:
    A = random(3, 7)
    leaf = A.double().requires_grad_()
    norm = leaf.detach().norm() if scaled else 1.0
    (-2.0 * torch.linalg.matrix_norm(leaf, "nuc") / norm).backward()
    penalty = Nnm(nuclear_weight=2.0, scale_by_frobenius=scaled).penalty([stack([A])], STEP)
    assert penalty is not None
    assert torch.allclose(penalty.gradients[0]["A"][0].double(), leaf.grad, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("scaled", [True, False])
def test_zero_rows_and_zero_layers_get_a_finite_gradient_and_leave_the_others_alone(scaled: bool) -> None:
    A, rows = random(3, 7), random(3, 7)
    rows[1] = 0
    penalty = Nnm(scale_by_frobenius=scaled).penalty([stack([A, rows, torch.zeros(3, 7)])], STEP)
    assert penalty is not None
    gradient = penalty.gradients[0]["A"]
    assert gradient.isfinite().all()
    assert float(gradient[1, 1].norm()) <= 1e-12
    assert (gradient[2] == 0).all()
    expected = by_svd(A, 5.0, scaled=scaled)[0] + by_svd(rows[[0, 2]], 5.0, scaled=scaled)[0]
    assert float(penalty.value) == pytest.approx(expected, rel=1e-6)
    assert torch.allclose(gradient[0].double(), by_svd(A, 5.0, scaled=scaled)[1], atol=1e-5)


def test_weight_zero_adds_nothing_and_a_negative_weight_is_refused() -> None:
    assert Nnm(nuclear_weight=0.0).penalty([stack([random(2, 3)])], STEP) is None
    with pytest.raises(ArgumentError, match=r"`nuclear_weight` must be a number ≥ 0; found -1"):
        Nnm(nuclear_weight=-1.0).check()


# --- under the penalty alone ----------------------------------------------------------------------------------------


def lopsided() -> Tensor:
    """Norm about 1, singular values 1, 0.3, 0.1, 0.03."""
    U, V = torch.linalg.qr(random(RANK, RANK)).Q, torch.linalg.qr(random(WIDTH, RANK)).Q
    return ((U * torch.tensor([1.0, 0.3, 0.1, 0.03])) @ V.T).double()


def ratio(A: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A, "nuc") / A.norm())


def descend(A: Tensor, rate: float) -> Tensor:
    penalty = Nnm(nuclear_weight=1.0).penalty([stack([A])], STEP)
    assert penalty is not None
    return A - rate * penalty.gradients[0]["A"][0]


def descend_differentiating_the_norm(A: Tensor, rate: float) -> Tensor:
    leaf = A.clone().requires_grad_()
    (-torch.linalg.matrix_norm(leaf, "nuc") / leaf.norm()).backward()
    return A - rate * leaf.grad  # type: ignore[operator]


def test_the_ratio_of_norms_rises_towards_the_root_of_the_rank_while_the_factor_grows() -> None:
    """Eq. 11: ‖A‖_F ≤ ‖A‖_* ≤ √r ‖A‖_F, with the upper bound approached."""
    A = lopsided()
    ratios, norms = [ratio(A)], [float(A.norm())]
    for _ in range(300):
        A = descend(A, 0.1)
        ratios.append(ratio(A))
        norms.append(float(A.norm()))
    assert all(after > before for before, after in itertools.pairwise(ratios))
    assert all(after > before for before, after in itertools.pairwise(norms))
    assert ratios[0] < 0.7 * math.sqrt(RANK)
    assert 0.99 * math.sqrt(RANK) < ratios[-1] < math.sqrt(RANK)
    assert norms[-1] > 5 * norms[0]


def test_counterexample_holding_the_norm_constant_affects_the_differentiation() -> None:
    """Differences of singular values never shrink: only growth of the norm evens them out, and that is slow."""
    start = lopsided()
    held, free = start, start
    for _ in range(80):
        held, free = descend(held, 0.05), descend_differentiating_the_norm(free, 0.05)
    spread = torch.linalg.svdvals(start)
    assert torch.allclose(torch.linalg.svdvals(held).diff(), spread.diff(), atol=1e-5)
    goal = math.sqrt(RANK)
    assert ratio(held) > ratio(start)
    assert goal - ratio(held) > 100 * (goal - ratio(free))
    assert float(free.norm()) < 1.1 * float(start.norm())
    assert float(held.norm()) > 3 * float(start.norm())


def test_without_the_frobenius_norm_every_singular_value_rises_by_the_rate() -> None:
    A = lopsided()
    penalty = Nnm(nuclear_weight=3.0, scale_by_frobenius=False).penalty([stack([A])], STEP)
    assert penalty is not None
    moved = torch.linalg.svdvals(A - 0.01 * penalty.gradients[0]["A"][0])
    assert torch.allclose(moved, torch.linalg.svdvals(A) + 0.03, atol=1e-6)
