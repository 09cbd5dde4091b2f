"""SoRA's gates: the proximal step, the supports it finds, and when it says that it cannot find any."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise.errors import ArgumentError
from rankwise.methods.base import Size, Stack, Step
from rankwise.methods.sora import Sora

STEP = Step(1, 0, 100)


def stack(gates: list[Tensor], rates: list[tuple[float, float]] | None = None) -> Stack:
    sizes = [Size(32, 32, len(g)) for g in gates]
    return Stack(sizes, {"g": gates}, rates=None if rates is None else lambda name: rates)


def equation_11(x: float, threshold: float) -> float:
    if x > threshold:
        return x - threshold
    return 0.0 if x > -threshold else x + threshold


def in_place(x: Tensor, threshold: float) -> Tensor:
    """The authors' code: the three cases of equation 11 one after another, each on the last one's result."""
    x = x.clone()
    x[x > threshold] -= threshold
    x[x < -threshold] += threshold
    x[x.abs() < threshold] = 0
    return x


@pytest.mark.parametrize("weight", [0.0, 0.375, 4.0])
def test_the_step_is_the_equation_with_each_layers_own_rate(weight: float) -> None:
    gates = [[torch.randn(5) for _ in range(3)], [torch.randn(2) for _ in range(2)]]
    rates = [[(0.5, 1.0), (0.03, 0.1), (0.0, 0.1)], [(0.25, 0.25), (2.0, 2.0)]]
    updates = Sora(sparse_weight=weight).after_step([stack(g, r) for g, r in zip(gates, rates, strict=True)], STEP)
    for group, its_rates, update in zip(gates, rates, updates, strict=True):
        assert update.keys() == {"g", "closed"}
        assert torch.equal(update["closed"], update["g"] == 0)
        for g, (rate, _), new in zip(group, its_rates, update["g"], strict=True):
            expected = [equation_11(x, rate * weight) for x in g.tolist()]
            assert new.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)
            assert [x == 0 for x in new.tolist()] == [x == 0 for x in expected]


def test_without_a_rate_nothing_is_thresholded() -> None:
    g = torch.randn(6)
    assert torch.equal(Sora().after_step([stack([g])], STEP)[0]["g"][0], g)


def test_counterexample_the_authors_code_zeroes_twice_as_far_as_the_equation() -> None:
    threshold = 0.25
    g = torch.tensor([0.1, -0.1, 0.3, -0.3, 0.45, -0.45, 0.6, -0.6])
    (update,) = Sora(sparse_weight=1.0).after_step([stack([g], [(threshold, threshold)])], STEP)
    ours, theirs = update["g"][0], in_place(g, threshold)
    assert ours.tolist() == pytest.approx([0, 0, 0.05, -0.05, 0.2, -0.2, 0.35, -0.35])
    assert torch.equal(ours == 0, g.abs() <= threshold)
    assert torch.equal(theirs == 0, g.abs() < 2 * threshold)


# --- a sparse problem with a known solution -------------------------------------------------------------------------

RANK, ROWS, WEIGHT = 12, 240, 0.4
PLANTED = {1: 2.0, 4: -1.5, 7: 1.2, 10: -3.0}


class Lasso:
    """Loss over the gates of one layer with orthonormal A, B and orthogonal inputs: ½‖ΔW x − y‖² per row.

    The least-squares gates are ĝ = Σ_rows z ⊙ y / rows, and the minimum of the loss + λ‖g‖₁ is T_λ(ĝ). `noise` is in
    the targets once and for all, `fresh` is drawn anew in every batch.
    """

    def __init__(self, noise: float = 1.0, fresh: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(11)

        def orthonormal(m: int, n: int) -> Tensor:
            return torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q

        self.A, self.B = orthonormal(20, RANK).T, orthonormal(16, RANK)
        self.x = ROWS**0.5 * orthonormal(ROWS, 20)
        true = torch.zeros(RANK, dtype=torch.float64)
        for j, value in PLANTED.items():
            true[j] = value
        self.y = (self.x @ self.A.T * true) @ self.B.T
        self.y += noise * torch.randn(ROWS, 16, generator=generator, dtype=torch.float64)
        self.fresh, self.generator = fresh, generator
        self.least_squares = ((self.x @ self.A.T) * (self.y @ self.B)).sum(0) / ROWS
        self.g = nn.Parameter(torch.randn(RANK, generator=generator, dtype=torch.float64))

    def loss(self, batch: int) -> Tensor:
        rows = torch.randperm(ROWS, generator=self.generator)[:batch]
        x, y = self.x[rows], self.y[rows]
        y = y + self.fresh * torch.randn(y.shape, generator=self.generator, dtype=torch.float64)
        update = Sora().factors({"A": self.A, "B": self.B, "g": self.g}, 1.0)
        return 0.5 * (update.add_to(torch.zeros_like(y), x) - y).square().sum() / batch

    def minimum(self, weight: float) -> Tensor:
        return torch.tensor([equation_11(x, weight) for x in self.least_squares.tolist()], dtype=torch.float64)

    def train(
        self, optimizer: torch.optim.Optimizer, rates: Iterable[float], *, weight: float, batch: int = ROWS
    ) -> None:
        method = Sora(sparse_weight=weight)
        for t, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()
            (update,) = method.after_step([stack([self.g], [(rate, rate)])], Step(t + 1, t, None))
            with torch.no_grad():
                self.g.copy_(update["g"][0])

    def support(self) -> set[int]:
        return {j for j, g in enumerate(self.g.tolist()) if g != 0}


def falling(rate: float, steps: int) -> list[float]:
    return [rate * (1 - t / steps) for t in range(steps)]


def test_the_planted_support_is_that_of_the_closed_form_and_not_of_the_start_or_of_least_squares() -> None:
    problem = Lasso()
    assert {j for j, g in enumerate(problem.minimum(WEIGHT).tolist()) if g != 0} == PLANTED.keys()
    assert (problem.least_squares != 0).all()
    assert len(problem.support()) == RANK


def test_sgd_converges_to_the_lasso_solution() -> None:
    problem = Lasso()
    problem.train(torch.optim.SGD([problem.g]), [0.2] * 200, weight=WEIGHT)
    assert problem.support() == PLANTED.keys()
    assert torch.allclose(problem.g, problem.minimum(WEIGHT), atol=1e-6)


def test_momentum_converges_to_the_lasso_solution_of_a_weight_that_much_smaller() -> None:
    """A steady gradient moves the gate by η/(1 − μ) a step, and the threshold is η·λ."""
    problem = Lasso()
    problem.train(torch.optim.SGD([problem.g], momentum=0.75), [0.05] * 600, weight=4 * WEIGHT)
    assert problem.support() == PLANTED.keys()
    assert torch.allclose(problem.g, problem.minimum(WEIGHT), atol=1e-6)


@pytest.mark.parametrize(("batch", "fresh"), [(ROWS, 0.0), (60, 0.0), (60, 1.0)])
@pytest.mark.parametrize(
    ("make", "rate", "weight"),
    [
        pytest.param(lambda g: torch.optim.SGD([g]), 0.1, WEIGHT, id="sgd"),
        pytest.param(lambda g: torch.optim.AdamW([g], weight_decay=0.0), 0.05, 0.6, id="adamw"),
    ],
)
def test_the_exact_support_is_recovered(
    make: Callable[[Tensor], Any], rate: float, weight: float, batch: int, fresh: float
) -> None:
    problem = Lasso(noise=0.0, fresh=fresh)
    problem.train(make(problem.g), falling(rate, 1000), weight=weight, batch=batch)
    assert problem.support() == PLANTED.keys()
    assert all(problem.g[j] * value > 0 for j, value in PLANTED.items())


def test_without_the_step_rule_no_gate_closes() -> None:
    problem = Lasso()
    problem.train(torch.optim.AdamW([problem.g], weight_decay=0.0), falling(0.05, 300), weight=0.0, batch=60)
    assert len(problem.support()) == RANK


# --- advice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "peaks", "fields", "total", "fires"),
    [
        pytest.param([[1.0, -2.0]], [1e-3], {}, 100, True, id="too short"),
        pytest.param([[1.0, -2.0]], [1e-3], {}, 3000, False, id="long enough for the smallest"),
        pytest.param([[1.0, -2.0]], [1e-3], {"sparse_weight": 20.0}, 100, False, id="heavy enough"),
        pytest.param([[1.0, 2.0], [1.0, -0.01]], [1e-3, 1e-3], {}, 100, False, id="one gate within reach"),
        pytest.param([[1.0, 2.0], [3.0, 2.0]], [1e-3, 1e-3], {}, 100, True, id="no layer within reach"),
        pytest.param([[1.0], [1.0]], [1e-3, 1e-1], {}, 100, False, id="one layer fast enough"),
        pytest.param([[1.0], [0.01]], [1e-3, 0.0], {}, 100, True, id="the reachable gate does not move"),
        pytest.param([[1.0]], [1e-3], {"gate_lr": 0.1}, 100, False, id="the gates' own rate is enough"),
        pytest.param([[1.0]], [0.1], {"gate_lr": 1e-3}, 100, True, id="the gates' own rate is too low"),
        pytest.param([[1.0]], [1e-3], {"sparse_weight": 0.0}, 100, False, id="nothing asked for"),
        pytest.param([[1.0]], [1e-3], {}, None, False, id="length unknown"),
        pytest.param([[1.0]], [1e-6], {"estimated": True}, 100, False, id="Prodigy has not found its rate yet"),
    ],
)
def test_advice_is_given_when_no_gate_can_close_and_not_otherwise(
    gates: list[list[float]], peaks: list[float], fields: dict[str, Any], total: int | None, fires: bool
) -> None:
    estimated = fields.get("estimated", False)
    method = Sora(**{name: value for name, value in fields.items() if name != "estimated"})
    rates = [(0.0, peak) for peak in peaks]  # a warm-up starts at 0: the peak is what counts
    stacks = [stack([torch.tensor(g)], [rate]) for g, rate in zip(gates, rates, strict=True)]
    said = method.advice(stacks, Step(1, 0, total, rate_estimated=estimated))
    assert (said is not None) is fires
    if said is not None:
        assert "no gate can close" in said
        assert "`sparse_weight`" in said


def test_the_reach_in_the_advice_is_the_most_a_run_can_shrink_a_gate() -> None:
    peak, total, weight = 0.01, 50, 0.5
    reach = peak * total * weight
    method = Sora(sparse_weight=weight)
    for smallest, fires in ((0.99 * reach, False), (1.01 * reach, True)):
        g = torch.tensor([smallest, 2.0])
        assert (method.advice([stack([g], [(peak, peak)])], Step(1, 0, total)) is not None) is fires
        for t in range(total):
            (update,) = method.after_step([stack([g], [(peak, peak)])], Step(t + 1, t, total))
            g = update["g"][0]
        assert bool(g[0] == 0) is not fires


# --- the optional penalty, factors, settings ------------------------------------------------------------------------


def test_the_sparse_penalty_is_the_mean_modulus_over_all_gates() -> None:
    groups = [[torch.randn(5) for _ in range(3)], [torch.randn(2)]]
    groups[0][1][2] = 0
    leaves = [[g.double().requires_grad_() for g in group] for group in groups]
    expected = 10 * torch.cat([g.abs() for group in leaves for g in group]).mean()
    expected.backward()
    penalty = Sora(sparse_penalty=10.0).penalty([stack(group) for group in groups], STEP)
    assert penalty is not None
    assert float(penalty.value) == pytest.approx(float(expected.detach()), rel=1e-6)
    for group, found in zip(leaves, penalty.gradients, strict=True):
        assert found.keys() == {"g"}
        assert torch.allclose(found["g"].double(), torch.stack([g.grad for g in group]), atol=1e-7)  # type: ignore[misc]
    assert Sora().penalty([stack(groups[0])], STEP) is None


def test_factors_put_the_scaled_gate_between_the_projections() -> None:
    A, B, g = torch.randn(3, 5), torch.randn(4, 3), torch.tensor([1.5, 0.0, -2.0])
    found = Sora().factors({"A": A, "B": B, "g": g}, 0.5)
    assert torch.allclose(found.delta(), 0.5 * B @ torch.diag(g) @ A, atol=1e-6)
    assert Sora().kept({"g": g}).tolist() == [True, False, True]
    assert found.kept().r == 2


@pytest.mark.parametrize(("kind", "spread"), [("normal", True), ("ones", False)])
def test_gates_start_as_asked_and_the_update_at_zero(kind: str, spread: bool) -> None:
    size = Size(6, 7, 400)
    start = Sora(gate_init=kind).start(size, lambda: torch.zeros(6, 7))
    assert start.keys() == {"A", "g"}
    assert float(start["g"].std()) == pytest.approx(1.0 if spread else 0.0, abs=0.15)
    assert float(start["g"].mean()) == pytest.approx(0.0 if spread else 1.0, abs=0.2)


@pytest.mark.parametrize(
    ("tensor", "gate_lr", "peak", "ratio"),
    [("g", 0.1, 1e-3, 100.0), ("g", None, 1e-3, 1.0), ("g", 0.1, 0.0, 1.0), ("A", 0.1, 1e-3, 1.0)],
)
def test_only_the_gates_have_a_rate_of_their_own(tensor: str, gate_lr: float | None, peak: float, ratio: float) -> None:
    assert Sora(gate_lr=gate_lr).ratio(tensor, peak, STEP) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparse_weight": -0.1}, r"`sparse_weight` must be a number ≥ 0; found -0\.1"),
        ({"sparse_penalty": -1}, r"`sparse_penalty` must be a number ≥ 0; found -1"),
        ({"gate_init": "zeros"}, r"`gate_init` must be one of normal, ones; found 'zeros'"),
        ({"gate_lr": 0.0}, r"`gate_lr` must be a number ≥ .*; found 0\.0"),
        ({"r": 0}, r"`r` must be a whole number ≥ 1; found 0"),
    ],
)
def test_rules_that_are_broken_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Sora(**fields).check()
