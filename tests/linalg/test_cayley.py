"""The Cayley transform against its definition, and where the definition loses all digits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.cayley import cayley


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(G: Tensor) -> Tensor:
    """[(I − Z)(I + Z)⁻¹; −2Y(I + Z)⁻¹] of one matrix, in the dtype of G."""
    r = G.shape[1]
    X, Y, eye = G[:r], G[r:], torch.eye(r, dtype=G.dtype)
    Z = X - X.T + Y.T @ Y
    inverse = torch.linalg.inv(eye + Z)
    return torch.cat([(eye - Z) @ inverse, -2 * Y @ inverse])


def from_orthonormal(Q: Tensor) -> Tensor:
    """A G whose transform is Q, for Q without an eigenvalue −1 in its upper block."""
    r = Q.shape[1]
    inverse = torch.linalg.inv((Q[:r] + torch.eye(r, dtype=Q.dtype)) / 2)
    Z = inverse - torch.eye(r, dtype=Q.dtype)
    return torch.cat([(Z - Z.T) / 4, -Q[r:] @ inverse / 2])


def stretch(Q: Tensor) -> float:
    """λ_max(QᵀQ) − 1 over the stack, in float64."""
    return float(torch.linalg.eigvalsh(Q.double().mT @ Q.double()).max()) - 1


@pytest.mark.parametrize("shape", [(40, 4), (9, 5), (6, 5), (5, 5), (1, 1), (7, 1)])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 10.0])
def test_is_the_definition(shape: tuple[int, int], scale: float) -> None:
    G = scale * random(*shape)
    torch.testing.assert_close(cayley(G), definition(G), rtol=1e-11, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(r=st.integers(1, 7), more=st.integers(0, 12), exponent=st.integers(-8, 2), seed=st.integers(0, 10**6))
def test_columns_are_orthonormal_at_every_shape_and_scale(r: int, more: int, exponent: int, seed: int) -> None:
    Q = cayley(10.0**exponent * random(r + more, r, seed=seed))
    torch.testing.assert_close(Q.T @ Q, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 3), (8, 7), (4, 4), (1, 1)])
def test_every_q_without_the_eigenvalue_minus_one_above_is_reached(shape: tuple[int, int]) -> None:
    Q = torch.linalg.qr(random(*shape)).Q
    if shape[0] == shape[1]:
        Q[:, 0] *= torch.linalg.det(Q)  # a reflection has that eigenvalue
    torch.testing.assert_close(cayley(from_orthonormal(Q)), Q, rtol=0, atol=1e-10)


def test_of_zero_is_the_identity_and_zero_rows_below_stay_exactly_zero() -> None:
    G = random(9, 3)
    G[5:] = 0
    Q = cayley(G)
    assert (Q[5:] == 0).all()
    assert (Q[3:5] != 0).all()
    assert torch.equal(cayley(torch.zeros(5, 2)), torch.eye(5, 2, dtype=torch.float64))


def test_float32_is_rounded_once_and_differs_from_one_computed_in_float32() -> None:
    G = torch.cat([random(3, 4), 50 * random(30, 1) @ random(1, 4) + 0.1 * random(30, 4, seed=3)]).float()
    Q = cayley(G)
    assert Q.dtype == torch.float32
    torch.testing.assert_close(Q, cayley(G.double()).float(), rtol=0, atol=0)
    assert abs(stretch(Q)) < 1e-6
    assert stretch(definition(G)) > 1e-4


@pytest.mark.parametrize("batch", [(3,), (4,), (2, 3), (1,)])
def test_batches_equal_a_loop(batch: tuple[int, ...]) -> None:
    """Also a batch of r matrices of r columns, which a solver could take for vectors."""
    G = random(*batch, 10, 4)
    Q = cayley(G)
    assert Q.shape == G.shape
    for one, expected in zip(Q.reshape(-1, 10, 4), G.reshape(-1, 10, 4), strict=True):
        torch.testing.assert_close(one, cayley(expected), rtol=1e-12, atol=1e-13)


def hostile(r: int, m: int) -> dict[str, Tensor]:
    G, columns = random(5, m, r), torch.logspace(-6, 6, r, dtype=torch.float64)
    upper, lower = G.clone(), G.clone()
    upper[:, r:], lower[:, :r] = 0, 0
    one_row = torch.zeros_like(G)
    one_row[:, -1] = 1
    return {
        "random": G,
        "collinear": G[..., :1].expand(5, m, r),
        "nearly collinear": G[..., :1] + 1e-3 * G,
        "rank 2": G[..., :2] @ random(5, min(2, r), r, seed=1),
        "equal": torch.ones(5, m, r, dtype=torch.float64),
        "X alone": upper,
        "Y alone": lower,
        "one row": one_row,
        "graded": G * columns,
        "graded rank 2": (G[..., :2] @ random(5, min(2, r), r, seed=1)) * columns,
    }


@pytest.mark.parametrize("name", hostile(3, 5))
@pytest.mark.parametrize(("m", "r"), [(6, 5), (40, 4), (600, 16)])
def test_hostile_matrices_stay_finite_and_never_longer_than_orthonormal(name: str, m: int, r: int) -> None:
    for scale in 10.0 ** torch.tensor([-30.0, -6, 0, 2, 4, 6, 8, 12, 30], dtype=torch.float64):
        Q = cayley((scale * hostile(r, m)[name]).float())
        assert Q.isfinite().all()
        assert stretch(Q) < 1e-5


def test_the_raised_diagonal_is_what_keeps_them_so() -> None:
    G = (1e6 * hostile(16, 600)["rank 2"]).float().double()
    assert max(stretch(definition(one)) for one in G) > 1e-3


@pytest.mark.parametrize("shape", [(7, 3), (3, 3), (2, 6, 2), (4, 1)])
def test_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    G = random(*shape).requires_grad_()
    assert torch.autograd.gradcheck(cayley, (G,), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(cayley, (G,), eps=1e-6, atol=1e-6)


def test_gradient_by_hand_is_autograds_and_torch_func_gets_that() -> None:
    G, C = random(2, 9, 4), random(2, 9, 4, seed=1)
    leaf = G.clone().requires_grad_()
    (cayley(leaf) * C).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda G: (cayley(G) * C).sum())(G), leaf.grad, rtol=1e-10, atol=1e-12)


def test_gradient_of_float32_parameters_is_that_of_float64_ones() -> None:
    G, C = random(30, 5).float(), random(30, 5, seed=2)
    single, double = G.clone().requires_grad_(), G.double().requires_grad_()
    (cayley(single) * C).sum().backward()
    (definition(double) * C).sum().backward()
    assert single.grad is not None
    assert double.grad is not None
    assert single.grad.dtype == torch.float32
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-6, atol=1e-7)
