"""The theory behind Deep LoRA's start, measured in float64 on plain gradient descent written from the equations.

Source: Yaras, Wang, Balzano and Qu, "Compressible Dynamics in Deep Overparameterized Low-Rank Learning & Adaptation",
arXiv 2406.04112: loss (2), updates (14) and (15), theorem 2.1 with (5) and (6), lemma E.2 with (19), proposition 2.2.
Weights are listed from W_1 to W_L; S = W_L(0) ⋯ W_1(0)/∏ε_l, (out, in); d = max(out, in).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.linalg.subspace import gradient_subspace, signed_permutation
from rankwise.methods.base import Size
from rankwise.methods.deep import Deep

Weights = list[Tensor]
Bases = tuple[Tensor, Tensor]
SPECTRUM = (1.0, 0.8, 0.6)
EQUAL, UNEQUAL = (0.1, 0.1, 0.1), (0.1, 0.2, 0.05)
SIDES = [(30, 18), (18, 30)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(m, k, seed=seed)).Q


def target(m: int, n: int, spectrum: Sequence[float] = SPECTRUM, seed: int = 0) -> Tensor:
    """M (m, n) of the given singular values."""
    s = torch.tensor(spectrum, dtype=torch.float64)
    return (orthonormal(m, len(s), 100 + seed) * s) @ orthonormal(n, len(s), 200 + seed).T


def leading(M: Tensor, k: int) -> Bases:
    """The k leading singular vectors (m, k), (n, k)."""
    u, _, vh = torch.linalg.svd(M, full_matrices=False)
    return u[:, :k], vh[:k].T


def dense(m: int, n: int, seed: int = 0) -> Tensor:
    """The S that `gradient_subspace` uses."""
    return signed_permutation(m, n, seed=seed).apply(torch.eye(n, dtype=torch.float64))


def full_width(S: Tensor, scales: Sequence[float]) -> Weights:
    """W_l(0) = ε_l · (semi-)orthogonal, random but for the product ∏ε_l · S."""
    d = max(S.shape)
    Q = [orthonormal(d, d, 300 + layer) for layer in range(len(scales))]
    if S.shape[0] <= S.shape[1]:
        Q[-1] = S @ product(Q[:-1]).T
    else:
        Q[0] = product(Q[1:]).T @ S
    return [scale * q for scale, q in zip(scales, Q, strict=True)]


def narrow(r: int, scales: Sequence[float]) -> Weights:
    """W_l(0) = ε_l · I_r."""
    return [scale * torch.eye(r, dtype=torch.float64) for scale in scales]


def product(W: Weights) -> Tensor:
    """W_k ⋯ W_1."""
    return functools.reduce(lambda P, factor: factor @ P, W)


def descend(W: Weights, residual: Tensor, rate: float, decay: float = 0.0) -> Weights:
    """Equations (14) and (15): W_l ← (1 − ηλ)·W_l − η·W_{L:l+1}ᵀ · residual · W_{l−1:1}ᵀ."""
    stepped = []
    for layer, factor in enumerate(W):
        gradient = residual
        if layer + 1 < len(W):
            gradient = product(W[layer + 1 :]).T @ gradient
        if layer:
            gradient = gradient @ product(W[:layer]).T
        stepped.append((1 - rate * decay) * factor - rate * gradient)
    return stepped


def descend_compressed(W: Weights, bases: Bases, M: Tensor, rate: float, decay: float = 0.0) -> Weights:
    """The same for loss (9): f_C = U · W_L ⋯ W_1 · Vᵀ with U and V fixed."""
    U, V = bases
    return descend(W, U.T @ (U @ product(W) @ V.T - M) @ V, rate, decay)


def law(rho: list[float], rate: float, decay: float) -> list[float]:
    """Equation (6): ρ_l ← ρ_l·(1 − ηλ − η·∏_{k≠l} ρ_k²)."""
    others = [math.prod(x**2 for k, x in enumerate(rho) if k != layer) for layer in range(len(rho))]
    return [x * (1 - rate * decay - rate * other) for x, other in zip(rho, others, strict=True)]


def loss(f: Tensor, M: Tensor) -> float:
    """‖f − M‖_F²/‖M‖_F²."""
    return float((f - M).square().sum() / M.square().sum())


def both(
    M: Tensor, S: Tensor, bases: Bases, scales: Sequence[float], steps: int, rate: float = 0.2, decay: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The products f and f_C of every tenth iterate of the full-width and the compressed factorisation."""
    W, C = full_width(S, scales), narrow(bases[0].shape[1], scales)
    for step in range(steps + 1):
        if step % 10 == 0:
            yield product(W), bases[0] @ product(C) @ bases[1].T
        W = descend(W, product(W) - M, rate, decay)
        C = descend_compressed(C, bases, M, rate, decay)


def compressed_loss(M: Tensor, bases: Bases, scale: float = 0.1, steps: int = 1500) -> float:
    """The loss that f_C ends at."""
    C = narrow(bases[0].shape[1], [scale] * 3)
    for _ in range(steps):
        C = descend_compressed(C, bases, M, 0.2)
    return loss(bases[0] @ product(C) @ bases[1].T, M)


def excess(M: Tensor, S: Tensor, bases: Bases, scales: Sequence[float], steps: int = 1000) -> float:
    """The largest ‖f − f_C‖_F²/∏ε_l² on the way, after both have learned."""
    pairs = list(both(M, S, bases, scales, steps))
    assert max(loss(f, M) for f in pairs[-1]) < 1e-2
    return max(float((f - f_C).square().sum()) for f, f_C in pairs) / math.prod(scales) ** 2


def test_the_step_is_the_gradient_of_the_loss() -> None:
    """Equation (14) is ∂/∂W_l of ½‖W_L ⋯ W_1 − M‖_F²."""
    M, W = random(5, 7), [random(6, 7), random(6, 6, seed=1), random(5, 6, seed=2)]
    leaves = [w.clone().requires_grad_() for w in W]
    (0.5 * (product(leaves) - M).square().sum()).backward()
    for w, leaf, after in zip(W, leaves, descend(W, product(W) - M, rate=0.1, decay=0.3), strict=True):
        assert torch.allclose(after, (1 - 0.03) * w - 0.1 * leaf.grad, atol=1e-12)  # type: ignore[operator]


def block_bases(M: Tensor, W: Weights, scales: Sequence[float], k: int) -> list[Bases]:
    """(U_l, V_l) of theorem 2.1: V_1 completes orth[V_M, Sᵀ U_M], U_l = W_l(0)·V_l/ε_l, V_{l+1} = U_l."""
    u, v = leading(M, k)
    S = product(W) / math.prod(scales)
    V = torch.linalg.qr(torch.cat([v, S.T @ u, random(len(M), len(M) - 2 * k, seed=9)], 1)).Q
    bases = []
    for w, scale in zip(W, scales, strict=True):
        bases.append((w @ V / scale, V))
        V = bases[-1][0]
    return bases


def assert_blocks(bases: list[Bases], W: Weights, rho: Sequence[float], k: int) -> None:
    """U_lᵀ·W_l·V_l is blkdiag(anything of size 2r̂, ρ_l·I) for every l."""
    for (U, V), w, x in zip(bases, W, rho, strict=True):
        blocks = U.T @ w @ V
        blocks[: 2 * k, : 2 * k] = 0
        blocks.diagonal()[2 * k :] -= x
        assert float(blocks.abs().max()) < 1e-13


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize(
    "scales", [EQUAL, UNEQUAL, (0.3, 0.3), (0.1, 0.4), (0.5, 0.5, 0.5, 0.5), (0.6, 0.3, 0.5, 0.4), (0.9, 1.1, 0.7)]
)
@pytest.mark.parametrize("k", [1, 3])
def test_every_layer_moves_only_in_its_subspace(decay: float, scales: tuple[float, ...], k: int) -> None:
    """Theorem 2.1: W_l(t) = U_l·blkdiag(W̃_l(t), ρ_l(t)·I_{d−2r})·V_lᵀ (5), with law (6), from any orthogonal start."""
    d, rate = 20, 0.1
    M = target(d, d, SPECTRUM[:k])
    W = full_width(orthonormal(d, d, 11), scales)
    bases, rho = block_bases(M, W, scales, k), list(scales)
    for (U, V), w, scale in zip(bases, W, scales, strict=True):
        assert torch.allclose((U.T @ w @ V)[: 2 * k, : 2 * k], scale * torch.eye(2 * k, dtype=w.dtype), atol=1e-14)
    for step in range(301):
        if step % 20 == 0:
            assert_blocks(bases, W, rho, k)
        W, rho = descend(W, product(W) - M, rate, decay), law(rho, rate, decay)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bases_found_from_the_gradient_are_those_of_the_theorem(seed: int) -> None:
    """(5) with V_1 = [V, its complement] from one gradient, V_{l+1} = U_l = W_l(0)·V_l/ε_l, and U the last of them."""
    d, k, scales, rate = 20, 3, UNEQUAL, 0.1
    M = target(d, d, seed=seed)
    U, V = gradient_subspace(-M, 2 * k, seed=seed)
    W, rho = full_width(dense(d, d, seed), scales), list(scales)
    complement = torch.linalg.qr(torch.cat([V, random(d, d - 2 * k, seed=9)], 1)).Q[:, 2 * k :]
    basis, bases = torch.cat([V, complement], 1), []
    for w, scale in zip(W, scales, strict=True):
        bases.append((w @ basis / scale, basis))
        basis = bases[-1][0]
    assert torch.allclose(basis[:, : 2 * k], U, atol=1e-13)
    for step in range(301):
        if step % 20 == 0:
            assert_blocks(bases, W, rho, k)
        W, rho = descend(W, product(W) - M, rate), law(rho, rate, 0.0)


@pytest.mark.parametrize(("m", "n"), [(24, 24), *SIDES])
def test_the_method_starts_in_the_subspace_of_the_first_gradient_at_full_width(m: int, n: int) -> None:
    """(7): ∂L/∂W_1 is −W_{L:2}ᵀM to leading order; from it V_G, and W_1(0)ᵀ times its left vectors, which is Sᵀ U_G.

    The method sees ∂L/∂W at W0 alone, no factor of full width.
    """
    k, scale = 3, 1e-3
    M, S = target(m, n), dense(m, n)
    W = [w.requires_grad_() for w in full_width(S, [scale] * 3)]
    (0.5 * (product(W) - M).square().sum()).backward()
    gradient = W[0].grad
    assert gradient is not None
    assert torch.allclose(gradient, -product([w.detach() for w in W[1:]]).T @ M, rtol=0, atol=10 * scale**5)
    left, right = leading(gradient, k)
    start = Deep(r=2 * k).start_from_gradient(Size(m, n, 2 * k), -M)
    span = torch.linalg.qr(start["V"]).Q
    for inside in (right, W[0].detach().T @ left / scale):
        assert torch.allclose(span @ (span.T @ inside), inside, rtol=0, atol=1e-5)
    image, of = (start["U"], S @ start["V"]) if m <= n else (start["V"], S.T @ start["U"])
    assert torch.equal(image, of)


@pytest.mark.parametrize("scales", [EQUAL, UNEQUAL])
def test_the_repeated_singular_value_has_the_stated_multiplicity(scales: tuple[float, ...]) -> None:
    d, k = 20, 3
    M, W, rho = target(d, d), full_width(orthonormal(d, d, 11), scales), list(scales)
    for _ in range(400):
        W, rho = descend(W, product(W) - M, 0.2), law(rho, 0.2, 0.0)
    for w, x in zip(W, rho, strict=True):
        repeated = (torch.linalg.svdvals(w) - x).abs() < 1e-12
        assert int(repeated.sum()) == d - 2 * k
    found = torch.linalg.svdvals(product(W))
    assert found[:k].tolist() == pytest.approx(SPECTRUM, abs=1e-2)
    assert int(((found - math.prod(rho)).abs() < 1e-12).sum()) == d - 2 * k


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_the_repeated_singular_value_stays_within_its_bounds(decay: float) -> None:
    """(19): ε·(1 − η(λ + ε^{2L−2}))^t ≤ ρ(t) ≤ ε·(1 − ηλ)^t."""
    d, k, scale, rate = 20, 3, 0.3, 0.2
    W = full_width(orthonormal(d, d, 11), [scale] * 3)
    M = target(d, d)
    bases = block_bases(M, W, [scale] * 3, k)
    for step in range(301):
        low, high = scale * (1 - rate * (decay + scale**4)) ** step, scale * (1 - rate * decay) ** step
        for (U, V), w in zip(bases, W, strict=True):
            rho = (U.T @ w @ V).diagonal()[2 * k :]
            assert low * (1 - 1e-12) <= float(rho.min())
            assert float(rho.max()) <= high * (1 + 1e-12)
        W = descend(W, product(W) - M, rate, decay)


@settings(max_examples=100, deadline=None)
@given(
    depth=st.integers(2, 5),
    scale=st.floats(1e-3, 1.0),
    decay=st.sampled_from([0.0, 1e-3, 0.1, 2.0]),
    share=st.floats(0, 1),
)
def test_the_bounds_hold_up_to_the_largest_rate_allowed(depth: int, scale: float, decay: float, share: float) -> None:
    """(19) for law (6) with equal ε and every η ≤ 1/(λ + ε^{2L−2})."""
    rate = share / (decay + scale ** (2 * depth - 2))
    rho = [scale] * depth
    for step in range(50):
        low = scale * max(0.0, 1 - rate * (decay + scale ** (2 * depth - 2))) ** step
        assert low * (1 - 1e-9) <= rho[0] + 1e-15
        assert rho[0] <= scale * max(0.0, 1 - rate * decay) ** step * (1 + 1e-9) + 1e-15
        rho = law(rho, rate, decay)


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("scales", [EQUAL, UNEQUAL, (0.2, 0.2), (0.3, 0.4, 0.5, 0.3)])
@pytest.mark.parametrize("r", [6, 8])
def test_on_the_square_the_products_part_by_the_repeated_value_alone(
    decay: float, scales: tuple[float, ...], r: int
) -> None:
    """Proposition 2.2, exactly: ‖f − f_C‖_F² = (d − 2r̂)·∏ρ_l(t)² ≤ (d − 2r̂)·∏ε_l², for r̂ ≥ rank(G)."""
    d, rate = 24, 0.2
    M, rho = target(d, d), list(scales)
    bases = gradient_subspace(-M, r, seed=2)
    pairs = list(both(M, dense(d, d, seed=2), bases, scales, 400, rate, decay))
    for f, f_C in pairs:
        parted = float((f - f_C).square().sum())
        assert parted == pytest.approx((d - r) * math.prod(rho) ** 2, rel=1e-8)
        assert parted <= (d - r) * math.prod(scales) ** 2 * (1 + 1e-12)
        for _ in range(10):
            rho = law(rho, rate, decay)
    assert max(loss(f, M) for f in pairs[-1]) < 1e-2


def test_compressed_and_full_width_agree_while_they_learn() -> None:
    """d = 60, ε = 1e-3: √54·ε³ = 7.3e-9 apart, from nothing learned to all of it."""
    M = target(60, 60, (1.0, 0.95, 0.9))
    pairs = list(both(M, dense(60, 60), gradient_subspace(-M, 6), [1e-3] * 3, 3500, rate=0.5))
    assert loss(pairs[0][1], M) > 0.999
    assert loss(pairs[-1][1], M) < 1e-6
    assert max(float((f - f_C).norm()) for f, f_C in pairs) < 7.4e-9


def test_they_part_when_the_gradient_has_more_directions_than_the_bases() -> None:
    M = target(24, 24, (1.0, 0.9, 0.8, 0.7, 0.6, 0.5))
    for r, parted in [(6, True), (12, False)]:
        f, f_C = list(both(M, dense(24, 24), gradient_subspace(-M, r), EQUAL, 1000))[-1]
        assert loss(f, M) < 1e-3
        assert (loss(f_C, M) > 0.1) == parted
        assert (float((f - f_C).norm()) > 0.1) == parted


def image_completed_subspace(G: Tensor, k: int, S: Tensor) -> Bases:
    """V = orth[V_G, SᵀU_G, SᵀS V_G] and U = S·V for out < in; U = orth[U_G, S V_G, S SᵀU_G] and V = SᵀU for out > in.

    Off the square S (for out < in) has a null space: with V_G's parts inside and outside it as directions of their
    own, the complement of the bases is invariant again. S SᵀU_G = U_G there would add nothing.
    """
    u, v = leading(G, k)
    if G.shape[0] <= G.shape[1]:
        V = torch.linalg.qr(torch.cat([v, S.T @ u, S.T @ (S @ v)], 1)).Q
        return S @ V, V
    U = torch.linalg.qr(torch.cat([u, S @ v, S @ (S.T @ u)], 1)).Q
    return U, S.T @ U


@pytest.mark.parametrize(("m", "n"), SIDES)
@pytest.mark.parametrize("seed", [0, 1])
def test_off_the_square_the_deviation_exceeds_the_bound_and_shrinks_with_the_start(m: int, n: int, seed: int) -> None:
    """With 2r̂ columns ‖f − f_C‖_F is of order ε, not √(d − 2r̂)·ε^L; f_C learns all the same."""
    M, S, bases = target(m, n, seed=seed), dense(m, n, seed), gradient_subspace(-target(m, n, seed=seed), 6, seed=seed)
    bound = max(m, n) - 6
    wide, close = excess(M, S, bases, [0.1] * 3, 600), excess(M, S, bases, [0.02] * 3, 2000)
    assert wide > 1.5 * bound
    assert close > 100 * bound
    apart = [math.sqrt(wide) * 0.1**3, math.sqrt(close) * 0.02**3]
    assert 3 < apart[0] / apart[1] < 9
    assert apart[1] < 5e-3


@pytest.mark.parametrize(("m", "n"), SIDES)
@pytest.mark.parametrize("scales", [EQUAL, UNEQUAL])
def test_off_the_square_the_bound_holds_with_the_other_sides_image(m: int, n: int, scales: tuple[float, ...]) -> None:
    """‖f − f_C‖_F² ≤ (min(out, in) − 2r̂)·∏ε_l² with 3r̂ columns, met at the start."""
    M, S = target(m, n), dense(m, n)
    bases = image_completed_subspace(-M, 3, S)
    assert excess(M, S, bases, scales, 600) == pytest.approx(min(m, n) - 6, rel=1e-9)


@pytest.mark.parametrize(("m", "n"), [(60, 30), (30, 60)])
def test_the_derived_factor_must_keep_its_pairing(m: int, n: int) -> None:
    """Three orthonormal bases of the derived factor's span in its place: f_C follows f with the polar factor alone.

    With a rotated one it learns by another way. With −U_G in the place of S V_G it learns nothing: the core would have
    to pass from ε·I to a negative matrix. A singular value decomposition gives ±U_G there, since off the square these
    directions have singular value 1 and the others less, and its signs are arbitrary.
    """
    M, S = target(m, n), dense(m, n)
    U, V = gradient_subspace(-M, 6)
    home, derived, image = (U, V, M.T @ U) if m > n else (V, U, M @ V)
    P, _, Qh = torch.linalg.svd(derived, full_matrices=False)
    rotated = P @ Qh @ orthonormal(6, 6, 3)
    opposite = torch.cat([-image[:, :3], derived[:, :3]], 1)
    Q, R = torch.linalg.qr(opposite)
    opposite = Q * R.diagonal().sign()

    def outcome(other: Tensor) -> tuple[float, float]:
        bases = (home, other) if m > n else (other, home)
        pairs = both(M, S, bases, [0.03] * 3, 500)
        return max(float((f - f_C).norm() / M.norm()) for f, f_C in pairs), compressed_loss(M, bases)

    (kept, kept_loss), (near, near_loss) = outcome(derived), outcome(P @ Qh)
    assert max(kept, near) < 0.005
    assert max(kept_loss, near_loss) < 1e-5
    apart, rotated_loss = outcome(rotated)
    assert apart > 0.2
    assert rotated_loss < 1e-5
    assert torch.linalg.matrix_norm(opposite - P @ (P.T @ opposite)) < 1e-10
    assert outcome(opposite)[1] > 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_from_the_identity_a_symmetric_negative_target_is_never_learned(seed: int) -> None:
    """Each eigenvalue would have to cross 0; with the signed permutation for S it need not."""
    d = 20
    P = orthonormal(d, 3, seed)
    M = -(P * torch.tensor(SPECTRUM, dtype=torch.float64)) @ P.T
    identity = torch.eye(d, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([P, random(d, 3, seed=50 + seed)], 1)).Q
    assert compressed_loss(M, (basis, basis)) > 0.9
    assert compressed_loss(M, gradient_subspace(-M, 6, seed=seed)) < 1e-5
    W = narrow(d, EQUAL)
    for _ in range(500):
        W = descend(W, product(W) - M, 0.2)
        assert float(torch.linalg.eigvalsh(product(W)).min()) > -1e-9
    assert compressed_loss(-M, (identity, identity)) < 1e-3


@pytest.mark.parametrize(("m", "n"), [(24, 24), *SIDES])
def test_the_trained_product_lies_in_the_subspaces_known_at_the_start(m: int, n: int) -> None:
    """The leading singular vectors of the full-width product against span(U) and span(V), before and after."""
    M, S = target(m, n), dense(m, n)
    U, V = (torch.linalg.qr(basis).Q for basis in gradient_subspace(-M, 6))
    pairs = list(both(M, S, gradient_subspace(-M, 6), EQUAL, 600))
    u, v = leading(pairs[-1][0], 3)
    tolerance = 1e-10 if m == n else 2e-2
    assert float((u - U @ (U.T @ u)).norm()) < tolerance
    assert float((v - V @ (V.T @ v)).norm()) < tolerance
