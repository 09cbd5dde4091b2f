"""SORSA's start and penalty, and two of its paper's theorems, which do not hold."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import rankwise
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import ArgumentError
from rankwise.linalg.orthonormality import orthonormality_gap
from rankwise.methods.base import Penalty, Size, Stack, Step
from rankwise.methods.sorsa import Sorsa

STEP = Step(1, 0, None)
KINDS = pytest.mark.parametrize("svd", ["randomized", "full"])
SHAPES = pytest.mark.parametrize(("out", "into", "r"), [(48, 64, 8), (64, 48, 8), (40, 40, 3), (5, 30, 5), (30, 5, 5)])


def weight_of(out: int, into: int) -> Tensor:
    """A weight with singular values falling as i^-½ from 3."""
    generator = torch.Generator().manual_seed(5)
    k = min(out, into)
    U = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(into, k, generator=generator, dtype=torch.float64)).Q
    return ((U * (3 * torch.arange(1, k + 1) ** -0.5)) @ V.T).float()


def start_of(method: Sorsa, W: Tensor, r: int) -> dict[str, Tensor]:
    return method.start(Size(*W.shape, r), lambda: W)


def stack(layers: list[dict[str, Tensor]], peaks: list[float]) -> Stack:
    sizes = [Size(t["U"].shape[0], t["Vh"].shape[1], t["U"].shape[1]) for t in layers]
    values = {name: [t[name] for t in layers] for name in layers[0]}
    return Stack(sizes, values, rates=lambda name: [(0.0, peak) for peak in peaks])


def principal(t: dict[str, Tensor]) -> Tensor:
    """W_p = U_p diag(S_p) V_pᵀ of eq. 7."""
    return (t["U"].double() * t["S"].double()) @ t["Vh"].double()


# --- the start ------------------------------------------------------------------------------------------------------


@SHAPES
@KINDS
def test_residual_and_principal_part_add_up_to_the_weight(svd: str, out: int, into: int, r: int) -> None:
    """With the full SVD W_r is what the other triplets make; either way W_r x + W_p x = W0 x."""
    W = weight_of(out, into)
    t = start_of(Sorsa(svd=svd), W, r)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    x = torch.randn(9, into)
    residual = W - principal(t).float()
    assert torch.allclose(x @ residual.T + ((x @ t["Vh"].T) * t["S"]) @ t["U"].T, x @ W.T, atol=3e-5)
    if svd == "full":
        others = (U[:, r:] * S[r:]) @ Vh[r:]
        assert torch.allclose(others + principal(t), W.double(), atol=1e-5)
    assert float(residual.double().square().sum()) == pytest.approx(float(S[r:].square().sum()), rel=2e-2, abs=1e-8)


@SHAPES
@KINDS
def test_the_update_is_zero_at_the_start(svd: str, out: int, into: int, r: int) -> None:
    W = weight_of(out, into)
    method = Sorsa(svd=svd)
    t = start_of(method, W, r)
    update = method.factors(t, 123.0)
    assert update.r == 2 * r
    assert all(x.dtype == torch.float32 for x in t.values())
    assert float(update.delta().abs().max()) <= 1e-6 * float(torch.linalg.matrix_norm(W, 2))
    assert float(update._replace(s=update.s.abs()).delta().abs().max()) > 0.1


@KINDS
def test_the_start_is_the_same_at_every_call_and_leaves_the_random_state_alone(svd: str) -> None:
    W = weight_of(48, 64)
    torch.manual_seed(1)
    one = start_of(Sorsa(svd=svd), W, 8)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    other = start_of(Sorsa(svd=svd), W.clone(), 8)
    assert torch.equal(before, torch.get_rng_state())
    assert one.keys() == other.keys() == {"U", "S", "Vh", "U0", "S0", "Vh0"}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_update_is_the_moved_triplets_minus_the_first_ones() -> None:
    W = weight_of(20, 16)
    t = start_of(Sorsa(), W, 4)
    first = principal(t)
    moved = t | {name: t[name] + 0.1 * torch.randn_like(t[name]) for name in ("U", "S", "Vh")}
    assert torch.allclose(Sorsa().factors(moved, 7.0).delta().double(), principal(moved) - first, atol=1e-5)


def test_the_update_is_zero_at_the_start_of_rounded_parameters_too() -> None:
    t = start_of(Sorsa(), weight_of(24, 16), 4)
    rounded = t | {name: t[name].bfloat16() for name in ("U", "Vh")}
    x = torch.eye(16, dtype=torch.bfloat16)
    moved = Sorsa().factors(rounded, 1.0).add_to(torch.zeros(16, 24, dtype=torch.bfloat16), x)
    assert moved.dtype == torch.bfloat16
    assert float(moved.float().abs().max()) <= 1e-6


@pytest.mark.parametrize("residual", ["offset", "cached"])
@pytest.mark.parametrize("samples", [2, 200])
@pytest.mark.parametrize("train", [True, False])
def test_the_layer_is_the_residual_weight_plus_the_moved_triplets(residual: str, samples: int, train: bool) -> None:
    """(7) and (14): W_r x + U_p diag(S_p) V_pᵀ x, W_r = W0 − U⁰ S⁰ V⁰ᵀ, the diagonal as one elementwise product."""
    net = nn.Sequential(nn.Linear(16, 20))
    net[0].weight.data = weight_of(20, 16)
    W0, bias = net[0].weight.detach().double(), net[0].bias.detach().double()
    model = get_peft_model(net, rankwise.SorsaConfig(r=4, target_modules=["0"], residual=residual)).train(train)
    t = {name: value.detach() for name, value in adapted_layers(model)["0"].tensors("default").named().items()}
    residual_weight = W0 - (t["U0"].double() * t["S0"].double()) @ t["Vh0"].double()
    assert torch.allclose(W0 - residual_weight, principal(t), atol=1e-6)
    for name in ("U", "S", "Vh"):
        t[name] += 0.1 * torch.randn_like(t[name])  # the layer's own memory
    x = torch.randn(samples, 16)
    moved = ((x.double() @ t["Vh"].double().T) * t["S"].double()) @ t["U"].double().T
    expected = x.double() @ residual_weight.T + moved + bias
    torch.testing.assert_close(model(x).detach().double(), expected, rtol=0, atol=1e-4)


def test_the_frozen_part_and_the_moving_part_add_up_to_the_update() -> None:
    """W_r is W0 with −U⁰ S⁰ V⁰ᵀ added; what moves beside it is U S Vᵀ."""
    t = start_of(Sorsa(), weight_of(20, 16), 4)
    first = principal(t)
    t = t | {name: t[name] + 0.1 * torch.randn_like(t[name]) for name in ("U", "S", "Vh")}
    frozen, moving = Sorsa().frozen_part(t), Sorsa().moving_part(t).scaled(1.0)
    assert frozen is not None
    assert torch.allclose(frozen.delta().double(), -first, atol=1e-5)
    assert torch.allclose(moving.delta().double(), principal(t), atol=1e-5)
    x, y = torch.randn(3, 16), torch.randn(3, 20)
    whole = Sorsa().factors(t, 7.0).add_to(y, x)
    torch.testing.assert_close(moving.add_to(frozen.add_to(y, x), x), whole, rtol=0, atol=1e-4)
    assert Sorsa(residual="cached").caches_frozen_part
    assert not Sorsa(residual="offset").caches_frozen_part


def test_the_full_decomposition_is_exact_where_a_sketch_is_not() -> None:
    """A Gaussian matrix has a flat spectrum, which one subspace iteration captures only roughly."""
    W = torch.randn(150, 140, generator=torch.Generator().manual_seed(3))
    exact = torch.linalg.svdvals(W.double())[:6]

    def error(**fields: Any) -> float:
        found = start_of(Sorsa(**fields), W, 6)["S"].double()
        return float(((found - exact).abs() / exact).max())

    assert error(svd="full") < 1e-5
    assert error(svd="randomized", svd_iterations=1) > 1e-2
    assert error(svd="randomized", svd_iterations=12) < 0.8 * error(svd="randomized", svd_iterations=1)


def test_a_start_that_is_not_zero_is_clearly_not_zero() -> None:
    W = weight_of(24, 16)
    method = Sorsa()
    t = method.start(Size(24, 16, 4), lambda: W, zero=False)
    assert float(method.factors(t, 1.0).delta().norm()) > 1


# --- the penalty ----------------------------------------------------------------------------------------------------


def penalty_of(method: Sorsa, stacks: list[Stack]) -> Penalty:
    penalty = method.penalty(stacks, STEP)
    assert penalty is not None
    return penalty


@pytest.mark.parametrize("r", [1, 8, 32])
@KINDS
def test_nothing_is_nan_at_the_first_step(svd: str, r: int) -> None:
    """At the start both matrices are orthonormal to rounding, where the norm has no gradient: it is 0 there."""
    t = start_of(Sorsa(svd=svd), weight_of(96, 64), r)
    found = penalty_of(Sorsa(), [stack([t, t], [3e-5, 1e-3])])
    assert float(found.value) <= 4e-4 / 3e-5 * 1e-4
    for gradient in found.gradients[0].values():
        assert (gradient == 0).all()


def away(out: int, into: int, r: int) -> dict[str, Tensor]:
    return {"U": 0.4 * torch.randn(out, r), "S": torch.rand(r), "Vh": 0.3 * torch.randn(r, into)}


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_both_forms_equal_autograd_with_each_layers_own_peak(form: str) -> None:
    groups = [[away(9, 7, 3), away(9, 7, 3)], [away(5, 6, 2)]]
    peaks = [[1e-3, 2e-2], [0.5]]
    gamma, matrices = 0.07, 6 if form == "mean" else 1
    total = torch.zeros((), dtype=torch.float64)
    leaves = [[{n: t[n].double().requires_grad_() for n in ("U", "Vh")} for t in group] for group in groups]
    for group, its_peaks in zip(leaves, peaks, strict=True):
        for t, peak in zip(group, its_peaks, strict=True):
            eye = torch.eye(t["U"].shape[1], dtype=torch.float64)
            gaps = (t["U"].T @ t["U"] - eye).norm() + (t["Vh"] @ t["Vh"].T - eye).norm()
            total = total + gamma / peak / matrices * gaps
    total.backward()
    method = Sorsa(orth_reg_weight=gamma, orth_reg_form=form)
    found = penalty_of(method, [stack(g, p) for g, p in zip(groups, peaks, strict=True)])
    assert float(found.value) == pytest.approx(float(total.detach()), rel=1e-5)
    for group, gradients in zip(leaves, found.gradients, strict=True):
        assert gradients.keys() == {"U", "Vh"}
        for name, gradient in gradients.items():
            expected = torch.stack([t[name].grad for t in group])  # type: ignore[misc]
            assert torch.allclose(gradient.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_the_weight_is_gamma_over_the_peak_rate_and_zero_where_the_peak_is_zero() -> None:
    t = away(9, 7, 3)
    method = Sorsa(orth_reg_weight=4e-4)
    found = penalty_of(method, [stack([t, t, t], [1e-3, 5e-4, 0.0])])
    alone = penalty_of(method, [stack([t, t, t], [1e-3, 0.0, 0.0])])
    for name in ("U", "Vh"):
        first, second, still = found.gradients[0][name]
        assert torch.allclose(second, 2 * first, rtol=1e-5)
        assert float(first.norm()) > 0
        assert (still == 0).all()
    assert float(found.value) == pytest.approx(3 * float(alone.value), rel=1e-5)
    nowhere = penalty_of(method, [stack([t], [0.0])])
    assert float(nowhere.value) == 0


def test_weight_zero_adds_nothing() -> None:
    assert Sorsa(orth_reg_weight=0.0).penalty([stack([away(4, 4, 2)], [1e-3])], STEP) is None


def gap(U: Tensor) -> float:
    return float((U.double().T @ U.double() - torch.eye(U.shape[1], dtype=torch.float64)).norm())


@pytest.mark.parametrize("form", ["mean", "sum"])
def test_under_a_decaying_rate_the_penalty_alone_leads_to_orthonormal_vectors(form: str) -> None:
    """Plain descent at rate η_t moves by η_t·γ/η_max: the norm ends no farther out than that step."""
    t, steps, peak = away(20, 16, 4), 1000, 0.01
    gamma = 4e-3 if form == "sum" else 8e-3  # two matrices
    method = Sorsa(orth_reg_weight=gamma, orth_reg_form=form)
    S = t["S"].clone()
    assert min(gap(t["U"]), gap(t["Vh"].T)) > 0.5
    for k in range(steps):
        share = 1 - k / steps
        gradients = penalty_of(method, [stack([t], [peak])]).gradients[0]
        t = t | {name: t[name] - peak * share * gradient[0] for name, gradient in gradients.items()}
        if k > 0.7 * steps:
            assert max(gap(t["U"]), gap(t["Vh"].T)) <= 5 * 4e-3 * share + 1e-5
    assert max(gap(t["U"]), gap(t["Vh"].T)) < 1e-4
    assert torch.equal(t["S"], S)


# --- theorems 1 and 2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 9])
def test_counterexample_to_theorem_1_the_regulariser_is_not_convex(r: int) -> None:
    U = torch.eye(12, r, dtype=torch.float64)
    ends = [float(orthonormality_gap(end)[0]) for end in (U, -U)]
    middle = float(orthonormality_gap((U + -U) / 2)[0])
    assert ends == [0.0, 0.0]
    assert middle == pytest.approx(r**0.5)
    assert middle > sum(ends) / 2


def test_counterexample_to_theorem_2_the_gradient_is_not_lipschitz_near_orthonormality() -> None:
    """The proof bounds the function (ratio ≤ ‖U₁‖_F + ‖U₂‖_F); the gradient turns round across the minimum."""
    U = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64)).Q
    ratios = []
    for distance in (1e-1, 1e-3, 1e-5, 1e-7):
        outer, inner = (1 + distance) * U, (1 - distance) * U
        (high, up), (low, down) = orthonormality_gap(outer), orthonormality_gap(inner)
        apart = float((outer - inner).norm())
        assert abs(float(high - low)) <= float(outer.norm() + inner.norm()) * apart
        ratios.append(float((up - down).norm()) / apart)
    assert all(later > 90 * earlier for earlier, later in itertools.pairwise(ratios))
    assert ratios[-1] > 1e6


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"orth_reg_weight": -1e-4}, r"`orth_reg_weight` must be a number ≥ 0; found -0\.0001"),
        ({"orth_reg_form": "max"}, r"`orth_reg_form` must be one of mean, sum; found 'max'"),
        ({"svd": "fast"}, r"`svd` must be one of randomized, full; found 'fast'"),
        ({"svd_iterations": 0}, r"`svd_iterations` must be a whole number ≥ 1; found 0"),
    ],
)
def test_rules_that_are_broken_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sorsa(**fields).check()
