"""Statements of the papers, or of their authors' code, that do not hold as printed: one numeric counterexample each.

Every docstring says what is claimed, where, and what holds instead. SORSA: Cao, arXiv 2409.00055. SoRA: Ding et al.,
arXiv 2311.11696. AdaLoRA: Zhang et al., arXiv 2303.10512. NNM-LoRA: Liu et al., "Nuclear-Norm Maximization for Low-Rank
Updates". Structure-aware LoRA: the L0-gated method of that name.
"""

from __future__ import annotations

import itertools
import math

import peft
import pytest
import torch
from torch import Tensor, nn

from rankwise.linalg.orthonormality import orthonormality_gap
from rankwise.linalg.polar import polar
from rankwise.linalg.prox import soft_threshold
from rankwise.spectral import condition_numbers, weight_drift
from rankwise.update import Factors


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(m, k, seed=seed)).Q


def gap(U: Tensor) -> float:
    """f(U) = ‖UᵀU − I‖_F."""
    return float(orthonormality_gap(U)[0])


# --- SORSA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 9])
def test_sorsa_theorem_1_the_regulariser_is_not_convex(r: int) -> None:
    """Claim (theorem 1): L_reg = ‖UᵀU − I‖_F + ‖VᵀV − I‖_F is convex.

    Instead f(U) = f(−U) = 0 for orthonormal U, while half-way f(0) = √r. The proof's second derivative (eq. 15),
    2‖WᵀW‖_F ≥ 0 in every direction W, has the wrong sign there: at U = 0 it is −2‖W‖_F²/√r.
    """
    U, W, h = orthonormal(12, r), random(12, r, seed=1), 1e-4
    assert max(gap(U), gap(-U)) < 1e-14
    assert gap((U + -U) / 2) == pytest.approx(math.sqrt(r))
    second = (gap(h * W) - 2 * gap(0 * W) + gap(-h * W)) / h**2
    assert second == pytest.approx(-2 * float(W.square().sum()) / math.sqrt(r), rel=1e-4)
    assert float(torch.linalg.matrix_norm(W.T @ W)) > 1


def test_sorsa_theorem_2_the_gradient_is_not_lipschitz_continuous() -> None:
    """Claim (theorem 2): the gradient of L_reg is Lipschitz continuous.

    Instead the proof (eq. 16–20) bounds the function, by (‖U₁‖_F + ‖U₂‖_F)·‖U₁ − U₂‖_F, which does hold. The gradient
    has norm 2 however near orthonormality and turns round across it: ‖∇f(U₁) − ∇f(U₂)‖/‖U₁ − U₂‖ = 4/‖U₁ − U₂‖.
    """
    U = orthonormal(12, 4)
    ratios = []
    for distance in (1e-1, 1e-3, 1e-5, 1e-7):
        outer, inner = (1 + distance) * U, (1 - distance) * U
        (high, up), (low, down) = orthonormality_gap(outer), orthonormality_gap(inner)
        apart = float((outer - inner).norm())
        assert abs(float(high - low)) <= float(outer.norm() + inner.norm()) * apart
        assert float((up - down).norm()) == pytest.approx(4, rel=0.01)
        ratios.append(float((up - down).norm()) / apart)
    assert all(later > 99 * earlier for earlier, later in itertools.pairwise(ratios))
    assert ratios[-1] > 9e6


def converges(rate: float, gamma: float, L_train: float, L_reg: float) -> bool:
    """Gradient descent (eq. 10) on ½·L_train·w² + (γ/η)·½·L_reg·w², by autograd."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    for _ in range(500):
        loss = L_train * w**2 / 2 + gamma / rate * L_reg * w**2 / 2
        (slope,) = torch.autograd.grad(loss, w)
        w = (w - rate * slope).detach().clamp(-1e9, 1e9).requires_grad_()
    return abs(float(w.detach())) < 1e-2


def test_sorsa_eq_11_forgets_to_divide_the_training_loss_by_k() -> None:
    """Claim (theorem 3, eq. 11 = 23): descent converges for 0 ≤ γ < 2/(k·η_d) − L_train, where L_reg = k·η_d.

    Instead (eq. 22) γ < (2 − η_d·L_train)/L_reg, which with L_reg = k·η_d is 2/(k·η_d) − L_train/k. For k < 1 eq. 11
    allows weights that diverge (150 below), for k > 1 it forbids weights that converge, here every γ ≥ 0.
    """
    rate, L_train = 0.1, 10.0
    for k, wrong, at_wrong in ((0.1, 150.0, False), (4.0, 2.0, True)):
        L_reg = k * rate
        by_22, by_11 = (2 - rate * L_train) / L_reg, 2 / (k * rate) - L_train
        assert by_22 == pytest.approx(2 / (k * rate) - L_train / k)
        assert converges(rate, 0.99 * by_22, L_train, L_reg)
        assert not converges(rate, 1.01 * by_22, L_train, L_reg)
        assert converges(rate, wrong, L_train, L_reg) is at_wrong is (wrong < by_22)
        assert (wrong < by_11) is not at_wrong


def test_sorsa_lemma_4_an_absolute_bound_is_no_relative_one() -> None:
    """Claim (lemma 4, eq. 28 ⇒ 29 = 12): |σ_reg − σ_unreg| ≤ ε gives (1−ε)σ_unreg ≤ σ_reg ≤ (1+ε)σ_unreg.

    Instead that follows for σ_unreg ≥ 1 only. ε = 0.1: a perturbation of norm 0.1 takes the singular value 0.2 to 0.11,
    below 0.18. With it the bound on condition numbers that theorem 5 takes from it fails: κ grows by 0.2/0.11 = 1.82,
    and (1+ε)/(1−ε) = 1.22. What holds is (1 ± ε/σ_min).
    """
    eps = 0.1
    unreg = torch.diag(torch.tensor([2.0, 0.2], dtype=torch.float64))
    moved = unreg - torch.diag(torch.tensor([0.0, 0.09], dtype=torch.float64))
    before, after = torch.linalg.svdvals(unreg), torch.linalg.svdvals(moved)
    assert float((moved - unreg).norm()) <= eps
    assert ((after - before).abs() <= eps).all()
    assert float(after[1]) < (1 - eps) * float(before[1])
    growth = float((after[0] / after[1]) / (before[0] / before[1]))
    assert growth == pytest.approx(0.2 / 0.11)
    assert growth > 1.4 * (1 + eps) / (1 - eps)
    assert (after >= before * (1 - eps / before.min())).all()
    large = 1 + 9 * torch.rand(1000, dtype=torch.float64)
    near = large + eps * (2 * torch.rand(1000, dtype=torch.float64) - 1)
    assert ((near >= (1 - eps) * large) & (near <= (1 + eps) * large)).all()


def train_sorsa(M: Tensor, W: Tensor, gamma: float, steps: int, stops: tuple[int, ...]) -> list[Factors]:
    """A stack of W_p = U diag(S) Vᵀ from W's first 3 triplets to ½‖W_p − M‖_F² by eq. 10 at a falling rate."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh, rate, seen = U[..., :3], S[..., :3], Vh[..., :3, :], 0.02, []
    for step in range(steps + 1):
        if step in stops:
            seen.append(Factors(U, S, Vh))
        share, error = 1 - step / steps, Factors(U, S, Vh).delta() - M
        to_U, to_V = error @ (Vh.mT * S[:, None]), (S[..., None] * U.mT) @ error
        to_S = (U.mT @ error @ Vh.mT).diagonal(dim1=-2, dim2=-1)
        apart_U, apart_V = orthonormality_gap(U)[1], orthonormality_gap(Vh.mT)[1].mT
        U, S = U - share * (rate * to_U + gamma * apart_U), S - share * rate * to_S
        Vh = Vh - share * (rate * to_V + gamma * apart_V)
    return seen


def test_sorsa_theorem_5_the_condition_number_of_the_product_is_measured_not_bounded() -> None:
    """Claim (theorem 5, eq. 37–39): κ(W_reg)/κ(W_unreg) ≤ (1+δ₁)(1+δ₂)(1+ε)/(1−ε) / (κ(U_unreg)·κ(V_unreg)) < 1.

    Measured instead, on 48 targets of rank 3 that both runs can fit. What the penalty does: κ(U)·κ(V) ends at 1.00
    (median), without it at 2.57. What does not follow: both products tend to the same target, so that the ratio of
    their condition numbers tends to 1 (median 0.995, where eq. 37 allows 0.47); eq. 37 fails on 46 of the 48; and half
    way through a few of the regularised products are the worse conditioned ones, by up to 5 %.
    """
    W = random(48, 12, 10)
    M = random(48, 12, 3, seed=1) @ random(48, 3, 10, seed=2)
    M = M * (torch.linalg.svdvals(W)[:, :3].norm(dim=1) / M.norm(dim=(1, 2)))[:, None, None]
    steps = 2000
    stops = (0, steps // 2, steps)
    without, penalised = train_sorsa(M, W, 0.0, steps, stops), train_sorsa(M, W, 0.02, steps, stops)
    start, midway, end = [(condition_numbers(a), condition_numbers(b)) for a, b in zip(without, penalised, strict=True)]
    assert torch.allclose(start[1].W / start[0].W, torch.ones(48, dtype=torch.float64))  # eq. 13, which does hold
    assert float((end[1].U * end[1].V).median()) < 1.001
    assert float((end[0].U * end[0].V).median()) > 2
    eps = (without[-1].singular_values() - penalised[-1].singular_values()).abs().amax(-1)
    assert float(eps.max()) < 1
    ratio = end[1].W / end[0].W
    bound = end[1].U * end[1].V * (1 + eps) / (1 - eps) / (end[0].U * end[0].V)
    assert float(ratio.median()) > 0.95 > 0.6 > float(bound.median())
    assert int((ratio > bound).sum()) >= 40
    assert (midway[1].W > 1.01 * midway[0].W).any()


def test_sorsa_eq_4_has_no_term_zero() -> None:
    """Claim (eq. 4): ΔD_t = 1 − (1/2k) Σ_{i=0}^k (ΔU_{t,i} + ΔV_{t,i}) lies in (0, 1), with k = min(m, n).

    Instead there are k singular vectors, not k + 1. A further term of 1 + 1 for W_t = W_0 would give −1/k; over
    i = 1..k it is 0, and 1 can be reached too, so that the interval is closed.
    """
    W, k = random(9, 5), 5
    drift = weight_drift(W, W)
    assert len(drift.left) == len(drift.right) == k
    as_printed = 1 - (float((drift.left + drift.right).sum()) + 2) / (2 * k)
    assert as_printed == pytest.approx(-1 / k)
    assert float(drift.vectors) == pytest.approx(0, abs=1e-14)
    moved = weight_drift(torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 3.0])))
    assert float(moved.vectors) == 1


# --- structure-aware LoRA -------------------------------------------------------------------------------------------


def expected_open(log_theta: Tensor) -> Tensor:
    """E‖G‖_0 (eq. 8) with temperature 2/3 on (−0.1, 1.1)."""
    return torch.sigmoid(log_theta - 2 / 3 * math.log(0.1 / 1.1)).sum()


def test_structure_aware_lora_eq_11_is_the_number_of_matrices_with_all_gates_open() -> None:
    """Claim (eq. 11): the density C(Θ) = Σ_i E‖G_i‖_0·(d_i + k_i)/(#B_i + #A_i) shall equal a target b, a share.

    Instead that sum of ratios is K with all gates open, so that a b in [0, 1] asks K = 36 matrices for 1/36 of it. The
    ratio of sums is the share of parameters kept; the mean of ratios is not: closing a large matrix and opening a small
    one changes one of them from 0.5 to 0.02.
    """

    def densities(layers: list[tuple[int, int, Tensor]]) -> tuple[float, float]:
        kept = [float(expected_open(gates)) * (d + k) for d, k, gates in layers]
        held = [len(gates) * (d + k) for d, k, gates in layers]
        return sum(a / b for a, b in zip(kept, held, strict=True)), sum(kept) / sum(held)

    all_open, closed = torch.full((8,), 30.0), torch.full((8,), -30.0)
    as_printed, share = densities([(384, 384, all_open)] * 24 + [(1536, 384, all_open)] * 12)
    assert as_printed == pytest.approx(36)
    assert share == pytest.approx(1)
    as_printed, share = densities([(8, 8, all_open), (384, 384, closed)])
    assert as_printed / 2 == pytest.approx(0.5)
    assert share == pytest.approx(16 / 784)


# --- NNM-LoRA -------------------------------------------------------------------------------------------------------


def test_nnm_the_frobenius_norm_does_affect_the_differentiation() -> None:
    """Claim (below eq. 10): ‖A‖_F in −‖A‖_*/‖A‖_F "does not directly affect the differentiation process".

    Instead it does. With ‖A‖_F held constant the step is polar(A)/‖A‖_F: every singular value grows alike, their
    differences stay, and the ratio approaches √r (eq. 11) only as ‖A‖_F grows without end. Differentiating the ratio
    also takes ‖A‖_*·A/‖A‖_F³ away: ‖A‖_F stays, and 99.9 % of √r is reached 50 times sooner (148 steps, not 7,399).
    """
    r, goal, rate = 8, 0.999 * math.sqrt(8), 0.01
    spectrum = torch.logspace(0, -2, r, dtype=torch.float64)
    start = (orthonormal(r, r) * spectrum) @ orthonormal(64, r, seed=1).T

    def descend(*, held: bool, limit: int) -> tuple[int, Tensor]:
        A = start
        for step in range(limit):
            Q, nuclear = polar(A)
            norm = A.norm()
            if float(nuclear / norm) >= goal:
                return step, A
            A = A + rate * (Q / norm - (0 if held else nuclear / norm**3) * A)
        return limit, A

    leaf = start.clone().requires_grad_()
    (torch.linalg.matrix_norm(leaf, "nuc") / leaf.norm()).backward()
    Q, nuclear = polar(start)
    assert torch.allclose(leaf.grad, Q / start.norm() - nuclear / start.norm() ** 3 * start)  # type: ignore[arg-type]

    steps, free = descend(held=False, limit=1000)
    assert steps < 200
    assert float(free.norm()) < 1.01 * float(start.norm())
    spent, held = descend(held=True, limit=20 * steps)
    assert spent == 20 * steps
    assert torch.allclose(torch.linalg.svdvals(held).diff(), spectrum.diff(), atol=1e-9)
    assert float(held.norm()) > 10 * float(start.norm())
    assert float(polar(held)[1] / held.norm()) < goal


# --- SoRA and AdaLoRA: the authors' code against their equations ----------------------------------------------------


def three_cases_in_place(x: Tensor, threshold: float) -> Tensor:
    """The cases of eq. 11 as the authors' optimiser applies them: each to what the one before has left."""
    x = torch.where(x > threshold, x - threshold, x)
    x = torch.where(x < -threshold, x + threshold, x)
    return torch.where(x.abs() < threshold, 0, x)


def test_sora_the_authors_code_zeroes_up_to_twice_the_threshold() -> None:
    """Claim (the authors' optimiser): it applies T_ξ of eq. 11, which is 0 for |x| ≤ ξ and moves the others by ξ.

    Instead its three cases run one after another in place: what the first two have moved below ξ the third sets to 0,
    so that every |x| < 2ξ vanishes (but |x| = ξ itself, which no case touches) and the map jumps there from 0 to ξ.
    `soft_threshold` is eq. 11.
    """
    x, threshold = torch.arange(-64, 65, dtype=torch.float64) / 64, 0.25
    theirs, equation = three_cases_in_place(x, threshold), soft_threshold(x, threshold)
    for value, found in zip(x.tolist(), equation.tolist(), strict=True):
        assert found == (value - 0.25 if value > 0.25 else value + 0.25 if value <= -0.25 else 0)
    untouched = x.abs() == threshold
    assert torch.equal(theirs[untouched], x[untouched])
    assert torch.equal(theirs == 0, (x.abs() < 2 * threshold) & ~untouched)
    assert torch.equal(equation == 0, x.abs() <= threshold)
    agree = (x.abs() < threshold) | (x.abs() >= 2 * threshold)
    assert torch.equal(theirs == equation, agree)
    assert float(three_cases_in_place(x.new_tensor(2 * threshold), threshold)) == threshold


def test_adalora_weights_after_the_step_times_gradients_before_it_rank_otherwise() -> None:
    """Claim (the authors' code): it scores by the sensitivity I(w) = |w·∂L/∂w| of eq. 8.

    Instead it reads w after the optimiser moved it and the gradient from before: |(w − η·g)·g| under plain descent.
    With w = (1, 0.1), g = (0.5, 4), η = 0.1 eq. 8 gives (0.5, 0.4), that product (0.475, 1.2): another weight is kept.
    """
    w, rate = torch.tensor([1.0, 0.1], dtype=torch.float64, requires_grad=True), 0.1
    (w @ torch.tensor([0.5, 4.0], dtype=torch.float64)).backward()
    before = (w * w.grad).abs().detach()  # type: ignore[operator]
    torch.optim.SGD([w], lr=rate).step()
    after = (w * w.grad).abs().detach()  # type: ignore[operator]
    assert before.tolist() == pytest.approx([0.5, 0.4])
    assert after.tolist() == pytest.approx([0.475, 1.2])
    assert int(before.argmax()) != int(after.argmax())


def test_adalora_in_peft_scores_zero_weights_above_zero() -> None:
    """The same in PEFT's port, run as its documentation says: every Λ starts at 0, where eq. 8 is 0; it scores η·g²."""
    rate = 0.1
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=0, tfinal=1, total_step=10, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=False)), config)  # type: ignore[arg-type]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (name,) = [name for name in trained if "lora_E" in name]
    model(torch.randn(16, 6)).square().sum().backward()
    start, gradient = trained[name].detach().clone(), trained[name].grad.clone()  # type: ignore[union-attr]
    torch.optim.SGD(trained.values(), lr=rate).step()
    model.base_model.update_and_allocate(1)  # type: ignore[operator]
    (scored,) = [score for key, score in model.base_model.rankallocator.ipt.items() if "lora_E" in key]  # type: ignore
    assert (start == 0).all()
    assert float(gradient.abs().min()) > 0
    assert torch.allclose(scored, rate * gradient.square(), rtol=1e-5)
    assert (scored > (start * gradient).abs()).all()
