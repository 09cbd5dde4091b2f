"""What two updates have in common, against the dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.spectral import pretrained_lengths, subspace_alignment, update_cosine
from rankwise.update import Factors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(m, k, seed=seed)).Q


def factors(out: int, into: int, r: int, seed: int = 0) -> Factors:
    return Factors(random(out, r, seed=seed), random(r, seed=seed + 1), random(r, into, seed=seed + 2))


def test_alignment_is_the_mean_squared_cosine_of_the_principal_angles() -> None:
    U, V = orthonormal(9, 3), orthonormal(9, 5, seed=1)
    cosines = torch.linalg.svdvals(U.T @ V)
    assert float(subspace_alignment(U, V)) == pytest.approx(float(cosines.square().mean()), rel=1e-12)


def test_alignment_does_not_depend_on_the_basis() -> None:
    U, turn = orthonormal(9, 4), orthonormal(4, 4, seed=1)
    assert float(subspace_alignment(U, U @ turn)) == pytest.approx(1)
    complement = torch.linalg.svd(U, full_matrices=True).U[:, 4:]
    assert float(subspace_alignment(U, complement)) == pytest.approx(0, abs=1e-12)


def test_random_subspaces_share_l_of_d() -> None:
    shared = [
        float(subspace_alignment(orthonormal(50, 3, seed=i), orthonormal(50, 5, seed=1000 + i))) for i in range(200)
    ]
    assert sum(shared) / len(shared) == pytest.approx(5 / 50, rel=0.1)


def test_the_cosine_is_that_of_the_dense_updates() -> None:
    one, other = factors(8, 6, 3), factors(8, 6, 5, seed=10)
    left, right = one.delta(), other.delta()
    expected = (left * right).sum() / (left.norm() * right.norm())
    assert float(update_cosine(one, other)) == pytest.approx(float(expected), rel=1e-10)
    assert float(update_cosine(one, one)) == pytest.approx(1)
    assert float(update_cosine(one, Factors(one.B, 0 * one.s, one.A))) == 0


def test_lengths_are_those_of_the_dense_weight() -> None:
    W0, update = random(8, 6, seed=3), factors(8, 6, 4).orthogonal()
    expected = [float(abs(update.B[:, i] @ W0 @ update.A[i])) for i in range(4)]
    assert pretrained_lengths(W0, update).tolist() == pytest.approx(expected, rel=1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match="`V` must have as many rows as U, 4; found 5"):
        subspace_alignment(torch.eye(4, 2), torch.eye(5, 2))
    with pytest.raises(ArgumentError, match=r"`other` must be an update of the same shape, \(8, 6\); found \(8, 7\)"):
        update_cosine(factors(8, 6, 2), factors(8, 7, 2))
    with pytest.raises(ArgumentError, match=r"`update` must fit the shape of W0, \(3, 3\); found \(8, 6\)"):
        pretrained_lengths(torch.eye(3), factors(8, 6, 2))
