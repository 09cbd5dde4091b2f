"""Products on the observed entries, dense and sparse, against the plain masked matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.completion import entries as module
from rankwise.completion.entries import Dense, Entries, Sparse, split
from rankwise.completion.misfit import misfit
from rankwise.completion.polish import polish
from rankwise.completion.standard import standardised
from rankwise.completion.starts import leading

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**16))


def both(m: int, n: int, seed: int, seen: float = 0.6) -> tuple[Dense, Sparse, Tensor, Tensor]:
    """The same entries, dense and sparse, and M and its mask."""
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(m, n, generator=generator, dtype=torch.float64)
    mask = (torch.rand(m, n, generator=generator) < seen).double()
    mask[0, 0] = 1
    rows, columns = mask.nonzero().T
    order = torch.randperm(len(rows), generator=generator)
    rows, columns = rows[order], columns[order]
    return Dense(M * mask, mask), Sparse(rows, columns, M[rows, columns], (m, n)), M, mask


def spread(entries: Entries, values: Tensor) -> Tensor:
    """Values as a matrix, zero off Ω."""
    return values if isinstance(entries, Dense) else entries.with_data(values).fill(values.new_zeros(entries.shape))


@pytest.fixture(params=["kernels", "pieces"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's sparse kernels, and without, a few entries at a time."""
    if request.param == "pieces":
        monkeypatch.setattr(module, "_has_kernels", lambda X: False)
        monkeypatch.setattr(module, "CHUNK", 5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("seed", range(4))
def test_products_are_those_of_the_masked_matrix(seed: int) -> None:
    m, n, k = 6, 9, 3
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.randn(side, k, generator=generator, dtype=torch.float64) for side in (m, n))
    for found in both(m, n, seed)[:2]:
        _, _, M, mask = both(m, n, seed)
        torch.testing.assert_close(spread(found, found.data), M * mask)
        torch.testing.assert_close(spread(found, found.at(P, Q)), (P @ Q.T) * mask)
        torch.testing.assert_close(found.times(found.data, Q), (M * mask) @ Q)
        torch.testing.assert_close(found.transposed_times(found.data, P), (M * mask).T @ P)
        torch.testing.assert_close(found.mT.times(found.mT.data, P), (M * mask).T @ P)
        torch.testing.assert_close(found.mT.transposed_times(found.mT.data, Q), (M * mask) @ Q)
        torch.testing.assert_close(found.counts(), mask.sum(1))
        torch.testing.assert_close(found.mT.counts(), mask.sum(0))
        assert found.count == int(mask.sum())
        assert found.mT.mT.shape == (m, n)


@given(SHAPES)
@settings(max_examples=40, deadline=None)
def test_parts_and_splits_keep_every_entry_once(shape: tuple[int, int, int, int]) -> None:
    m, n, _, seed = shape
    for found in both(m, n, seed)[:2]:
        if found.count < 2:
            continue
        train, held = split(found, 0.3, seed=seed)
        assert train.count + held.count == found.count
        assert min(train.count, held.count) >= 1
        together = spread(train, train.data) + spread(held, held.data)
        torch.testing.assert_close(together, spread(found, found.data))


def test_dense_and_sparse_are_split_alike() -> None:
    dense, sparse, *_ = both(8, 9, 0)
    for a, b in zip(split(dense, 0.3, seed=1), split(sparse, 0.3, seed=1), strict=True):
        torch.testing.assert_close(spread(a, a.data), spread(b, b.data))


@given(SHAPES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_loss_and_its_gradients_are_autograds(shape: tuple[int, int, int, int], center: bool) -> None:
    m, n, k, seed = shape
    dense, sparse, M, mask = both(m, n, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    P, Q = (torch.randn(side, k, generator=generator, dtype=torch.float64, requires_grad=True) for side in (m, n))
    offset = ((M - P @ Q.T) * mask).sum() / mask.sum() if center else 0.0
    plain = 0.5 * ((P @ Q.T + offset - M) * mask).square().sum()
    expected = torch.autograd.grad(plain, (P, Q))
    for found in (dense, sparse):
        loss = misfit(found, P, Q, center=center)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, (P, Q)), expected)


def test_leading_triplets_of_sparse_entries_are_those_of_the_matrix() -> None:
    dense, sparse, *_ = both(40, 30, 0)
    U, S, Vh = leading(sparse, 3, seed=0)
    exact = torch.linalg.svdvals(dense.data)
    torch.testing.assert_close(S, exact[:3], rtol=0.03, atol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_alternating_least_squares_end_where_no_step_helps(center: bool, ridge: float) -> None:
    """At the end the gradient of ½‖Ω ⊙ (PQᵀ + μ − M)‖² + ½λ(‖P‖² + ‖Q‖²) vanishes in P, Q and μ."""
    dense, sparse, *_ = both(25, 20, 3, seen=0.8)
    A, B = (
        torch.randn(side, 2, generator=torch.Generator().manual_seed(side), dtype=torch.float64) for side in (25, 20)
    )
    for found in (dense, sparse):
        found = found.with_data(found.at(A, B) + 0.1 * found.data)
        start = torch.randn(45, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).split([25, 20])
        fit = polish(found, *start, center=center, tol=1e-15, max_iter=5000, ridge=ridge)
        P, Q, offset = (part.clone().requires_grad_() for part in (fit.P, fit.Q, fit.offset))
        residual = found.at(P.detach(), Q.detach()) + offset.detach() * found.ones - found.data
        dP = found.times(residual, Q.detach()) + ridge * P.detach()
        dQ = found.transposed_times(residual, P.detach()) + ridge * Q.detach()
        assert float(dP.norm()) < 1e-5
        assert float(dQ.norm()) < 1e-5
        assert not center or abs(float(residual.sum())) < 1e-6
        assert fit.error == pytest.approx(float(residual.norm()))


def test_units_do_not_depend_on_scale_and_offset() -> None:
    dense, _, M, mask = both(20, 15, 0)
    one, units = standardised(dense, center=True, seed=0)
    other, theirs = standardised(Dense((3e5 * M + 40) * mask, mask), center=True, seed=0)
    torch.testing.assert_close(one.data, other.data, rtol=1e-7, atol=1e-9)
    assert theirs.scale == pytest.approx(3e5 * units.scale)
    assert theirs.offset == pytest.approx(3e5 * units.offset + 40)
    share = one.count / (20 * 15)
    assert float(torch.linalg.matrix_norm(one.data, 2)) == pytest.approx(share)
    assert abs(float(one.data.sum())) < 1e-10


@pytest.mark.parametrize("value", [1e300, 1e-300, -7.0, 0.0])
def test_a_constant_has_units_without_nan(value: float) -> None:
    mask = torch.ones(4, 3, dtype=torch.float64)
    found, units = standardised(Dense(value * mask, mask), center=True, seed=0)
    assert not found.data.any()
    assert units.offset == pytest.approx(value, rel=1e-12)
    assert np.isfinite(units.scale)
