"""NNM's penalty against the singular value decomposition, and what it does to the factors on its own."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftConfig
from torch import Tensor

from rankwise import NnmLoraConfig
from rankwise.errors import ArgumentError
from rankwise.methods.base import Size, Stack, Step
from rankwise.methods.nnm import Nnm

STEP = Step(1, 0, None)
RANK, WIDTH = 4, 12
FORMS = ["differentiated", "held", "none"]


def stack(factors: list[Tensor]) -> Stack:
    return Stack([Size(5, A.shape[1], A.shape[0]) for A in factors], {"A": factors})


def random(r: int, n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(r, n)


def planted(spectrum: Tensor, n: int) -> Tensor:
    """A random float64 matrix (r, n) with the singular values given."""
    r = len(spectrum)
    U, V = torch.linalg.qr(random(r, r).double()).Q, torch.linalg.qr(random(n, r).double()).Q
    return (U * spectrum) @ V.T


def by_autograd(A: Tensor, weight: float, form: str) -> tuple[float, Tensor]:
    """−λ‖A‖_*/‖A‖_F and its gradient in float64, by autograd through the singular value decomposition."""
    leaf = A.detach().double().requires_grad_()
    singular_values = torch.linalg.svd(leaf, full_matrices=False).S
    norm = {"differentiated": leaf.norm(), "held": leaf.detach().norm(), "none": torch.ones(())}[form]
    value = -weight * singular_values.sum() / norm
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


def by_rule(A: Tensor, weight: float, form: str) -> tuple[float, Tensor]:
    penalty = Nnm(nuclear_weight=weight, frobenius=form).penalty([stack([A])], STEP)
    assert penalty is not None
    return float(penalty.value), penalty.gradients[0]["A"][0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [5.0, 0.3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_and_gradient_are_the_equation_summed_over_layers(form: str, weight: float, scale: float) -> None:
    groups = [[random(4, 9, scale) for _ in range(3)], [random(8, 64, 0.1 * scale)], [random(2, 2, scale)] * 2]
    penalty = Nnm(nuclear_weight=weight, frobenius=form).penalty([stack(g) for g in groups], STEP)
    assert penalty is not None
    expected = [[by_autograd(A, weight, form) for A in group] for group in groups]
    assert float(penalty.value) == pytest.approx(sum(value for group in expected for value, _ in group), rel=1e-6)
    for group, found in zip(expected, penalty.gradients, strict=True):
        assert found.keys() == {"A"}
        for (_, gradient), one in zip(group, found["A"], strict=True):
            assert (one.double() - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=25)
@given(r=st.integers(2, 12), wider=st.integers(0, 40), decades=st.floats(0.01, 3.0), log_scale=st.floats(-6.0, 6.0))
def test_the_gradient_is_autograds_at_any_shape_scale_and_condition(
    form: str, r: int, wider: int, decades: float, log_scale: float
) -> None:
    """Condition numbers up to 1e3; near 1 the two terms of the differentiated form nearly cancel."""
    A = (10**log_scale * planted(torch.logspace(0, -decades, r), r + wider)).float()
    value, gradient = by_autograd(A, 1.0, form)
    found_value, found = by_rule(A, 1.0, form)
    assert found_value == pytest.approx(value, rel=1e-6)
    assert (found.double() - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_the_value_with_the_norm_differentiated_held_or_left_out(form: str) -> None:
    A = random(3, 7)
    assert torch.allclose(by_rule(A, 2.0, form)[1].double(), by_autograd(A, 2.0, form)[1], atol=1e-6)


def test_the_differentiated_gradient_is_orthogonal_to_the_factor_and_vanishes_at_a_flat_spectrum() -> None:
    """‖A‖_*/‖A‖_F does not change with the scale of A, and has its maximum, √r, where the singular values are equal."""
    A = random(6, 20)
    gradient = by_rule(A, 1.0, "differentiated")[1]
    assert abs(float((gradient * A).sum())) <= 1e-6 * float(gradient.norm() * A.norm())
    flat = 3 * torch.linalg.qr(random(20, 6)).Q.T
    assert by_rule(flat, 1.0, "differentiated")[0] == pytest.approx(-math.sqrt(6))
    assert float(by_rule(flat, 1.0, "differentiated")[1].norm()) <= 1e-6
    assert float(by_rule(flat, 1.0, "held")[1].norm()) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_zero_rows_and_zero_layers_get_a_finite_gradient_and_leave_the_others_alone(form: str) -> None:
    A, rows = random(3, 7), random(3, 7)
    rows[1] = 0
    penalty = Nnm(frobenius=form).penalty([stack([A, rows, torch.zeros(3, 7)])], STEP)
    assert penalty is not None
    gradient = penalty.gradients[0]["A"]
    assert gradient.isfinite().all()
    assert (gradient[1, 1] == 0).all()
    assert (gradient[2] == 0).all()
    whole, without_the_row = by_autograd(A, 5.0, form), by_autograd(rows[[0, 2]], 5.0, form)
    assert float(penalty.value) == pytest.approx(whole[0] + without_the_row[0], rel=1e-6)
    assert torch.allclose(gradient[0].double(), whole[1], atol=1e-5)
    assert torch.allclose(gradient[1, [0, 2]].double(), without_the_row[1], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_repeated_singular_values_give_a_finite_gradient(form: str) -> None:
    A = planted(torch.tensor([2.0, 2.0, 2.0, 1.0]), 9).float()
    gradient = by_rule(A, 1.0, form)[1]
    assert gradient.isfinite().all()
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize(("older", "meant"), [(True, "held"), (False, "none")])
def test_the_older_spelling_stays_readable_in_arguments_and_saved_configs(
    older: bool, meant: str, tmp_path: Path
) -> None:
    config = NnmLoraConfig(scale_by_frobenius=older)
    assert (config.frobenius, config.scale_by_frobenius) == (meant, None)
    config.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["frobenius"] == meant
    del saved["frobenius"]
    file.write_text(json.dumps(saved | {"scale_by_frobenius": older}))  # as earlier versions wrote it
    assert PeftConfig.from_pretrained(str(tmp_path)).frobenius == meant  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match=r"`scale_by_frobenius` must be left out beside frobenius; found "):
        NnmLoraConfig(scale_by_frobenius=older, frobenius="none" if older else "held")


def test_weight_zero_adds_nothing_and_a_negative_weight_is_refused() -> None:
    assert Nnm(nuclear_weight=0.0).penalty([stack([random(2, 3)])], STEP) is None
    with pytest.raises(ArgumentError, match=r"`nuclear_weight` must be a number ≥ 0; found -1"):
        Nnm(nuclear_weight=-1.0).check()


# --- under the penalty alone ----------------------------------------------------------------------------------------


def lopsided() -> Tensor:
    """Norm about 1, singular values 1, 0.3, 0.1, 0.03."""
    return planted(torch.tensor([1.0, 0.3, 0.1, 0.03]), WIDTH)


def ratio(A: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A, "nuc") / A.norm())


def descend(A: Tensor, rate: float, form: str) -> Tensor:
    return A - rate * by_rule(A, 1.0, form)[1]


@pytest.mark.parametrize("form", FORMS)
def test_the_ratio_of_norms_rises_towards_the_root_of_the_rank(form: str) -> None:
    """Eq. 11: ‖A‖_F ≤ ‖A‖_* ≤ √r ‖A‖_F, with the upper bound approached; only the differentiated form does not grow."""
    A = lopsided()
    ratios, norms = [ratio(A)], [float(A.norm())]
    for _ in range(300):
        A = descend(A, 0.1 if form == "held" else 0.02, form)
        ratios.append(ratio(A))
        norms.append(float(A.norm()))
    goal = math.sqrt(RANK)
    assert ratios[0] < 0.7 * goal
    assert 0.99 * goal < ratios[-1] < goal + 1e-6
    risen = [after > before for before, after in itertools.pairwise(ratios) if before < 0.9999 * goal]
    assert all(risen)
    if form == "differentiated":
        assert norms[-1] < 1.05 * norms[0]
    else:
        assert all(after > before for before, after in itertools.pairwise(norms))
        assert norms[-1] > 5 * norms[0]


def test_counterexample_holding_the_norm_constant_affects_the_differentiation() -> None:
    """Differences of singular values never shrink: only growth of the norm evens them out, and that is slow."""
    start = lopsided()
    held, free = start, start
    for _ in range(80):
        held, free = descend(held, 0.05, "held"), descend(free, 0.05, "differentiated")
    spread = torch.linalg.svdvals(start)
    assert torch.allclose(torch.linalg.svdvals(held).diff(), spread.diff(), atol=1e-5)
    goal = math.sqrt(RANK)
    assert ratio(held) > ratio(start)
    assert goal - ratio(held) > 100 * (goal - ratio(free))
    assert float(free.norm()) < 1.1 * float(start.norm())
    assert float(held.norm()) > 3 * float(start.norm())


def test_without_the_frobenius_norm_every_singular_value_rises_by_the_rate() -> None:
    A = lopsided()
    moved = torch.linalg.svdvals(A - 0.01 * by_rule(A, 3.0, "none")[1])
    assert torch.allclose(moved, torch.linalg.svdvals(A) + 0.03, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_only_the_differentiated_norm_bears_the_papers_figures_out(optimizer: str) -> None:
    """The paper's Fig. 2(b) and Table 3: with the norm the spectrum is more uniform, and ‖A‖_* does not grow large.

    The penalty alone, λ = 5, from singular values that fall as 1/i.
    """
    start = planted(3 / torch.arange(1, 17), 48).float()

    def trained(form: str) -> Tensor:
        A = torch.nn.Parameter(start.clone())
        stepper = torch.optim.SGD([A], 1e-3) if optimizer == "SGD" else torch.optim.Adam([A], 1e-4)
        for _ in range(1000):
            A.grad = by_rule(A.detach(), 5.0, form)[1]
            stepper.step()
        return A.detach()

    ends = {form: trained(form) for form in FORMS}
    flatness = {form: ratio(A) / math.sqrt(len(A)) for form, A in ends.items()}
    growth = {form: float(A.norm() / start.norm()) for form, A in ends.items()}
    assert growth["differentiated"] < 1.1 < 1.4 < growth["held"] < growth["none"]
    assert flatness["held"] < flatness["none"], "what the paper says of its norm is false of a norm held constant"
    assert flatness["held"] + 0.04 < flatness["differentiated"]
    if optimizer == "Adam":  # the paper's; under plain descent "none" ends flat, and six times as large as it began
        assert flatness["none"] + 0.04 < flatness["differentiated"]
    else:
        assert growth["none"] > 5
