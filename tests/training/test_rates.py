"""Rules take the learning rate that an optimiser really applies, and the peak of its schedule, whoever sets them."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from torch.optim import lr_scheduler
from transformers.optimization import Adafactor

import rankwise
from cases import CASES, Case
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import TrainingError
from rankwise.training.rates import declared_peak, rate_of

ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
STEPS = 12
PEAK = 1e-2


# --- what a group of an optimiser says -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "rate", "peak"),
    [
        pytest.param({"lr": 1e-3}, 1e-3, 0.0, id="nothing declared"),
        pytest.param({"lr": torch.tensor(0.5)}, 0.5, 0.0, id="a tensor"),
        pytest.param({"lr": 1e-4, "initial_lr": 1e-3}, 1e-4, 1e-3, id="a scheduler"),
        pytest.param({"lr": 4e-5, "initial_lr": 4e-5, "max_lr": 1e-3, "min_lr": 4e-9}, 4e-5, 1e-3, id="one cycle"),
        pytest.param({"lr": 1e-4, "initial_lr": 1.0}, 1e-4, 0.0, id="LambdaLR on a base of 1"),
        pytest.param({"lr": 1.0, "d": 1e-6, "d0": 1e-6, "d_max": 1e-6}, 1e-6, 0.0, id="Prodigy"),
        pytest.param({"lr": 0.5, "initial_lr": 0.5, "d": 1e-2, "d0": 1e-6}, 5e-3, 0.0, id="Prodigy, scheduled"),
        pytest.param({"lr": 1.0, "d": 1e-3, "growth_rate": 1.02, "k": 0}, 1e-3, 0.0, id="D-Adaptation"),
        pytest.param({"lr": 1e-2, "d": 2.0, "beta2_decay": -0.8}, None, 0.0, id="torch's Adafactor: d clips"),
        pytest.param({"lr": 1e-3, "scale_parameter": True}, None, 0.0, id="Adafactor, scaled by the parameter"),
        pytest.param({"lr": 1e-3, "rho": 0.9, "eps": 1e-6}, None, 0.0, id="Adadelta, whatever its factor"),
        pytest.param({"lr": 1e-3, "rho": 0.05, "eps": 1e-8, "betas": (0.9, 0.999)}, 1e-3, 0.0, id="SAM on Adam"),
        pytest.param({"lr": 1.0, "betas": (0.9, 0.999)}, None, 0.0, id="an unknown factor"),
        pytest.param({"lr": 2.0, "dampening": 0, "nesterov": False}, 2.0, 0.0, id="SGD"),
        pytest.param({"lr": 1.0, "scheduled_lr": 0.0}, 1.0, 0.0, id="schedule-free SGD"),
        pytest.param({"lr": None, "relative_step": True}, None, 0.0, id="Adafactor, its own rate"),
        pytest.param({"lr": 1e-3, "relative_step": True}, None, 0.0, id="Adafactor, its own rate reported"),
        pytest.param({"lr": 1e-3, "relative_step": False}, 1e-3, 0.0, id="Adafactor, a given rate"),
    ],
)
def test_the_rate_and_the_declared_peak_of_a_group(group: dict[str, Any], rate: float | None, peak: float) -> None:
    assert rate_of(group) == (None if rate is None else pytest.approx(rate))
    assert declared_peak(group) == pytest.approx(peak)


# --- models that show which rate a rule has used --------------------------------------------------------------------


def one_layer(config: Any) -> Any:
    torch.manual_seed(5)
    return get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).train()


def tensors_of(model: Any) -> Any:
    return next(iter(adapted_layers(model).values())).tensors("default")


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def backward(model: Any, task: float) -> None:
    (task * model(torch.ones(2, 6)).square().sum()).backward()


def sora(**fields: Any) -> Any:
    """Gates that no threshold of these tests can close, and factors without an update."""
    return one_layer(rankwise.SoraConfig(r=3, target_modules=["0"], gate_init="ones", sparse_weight=0.5, **fields))


def sora_rate(model: Any, optimizer: Any) -> float:
    """η_t of a step in which the task says nothing, so that the threshold alone moves the gates."""
    before = tensors_of(model).g.detach().clone()
    backward(model, 0.0)
    optimizer.step()
    optimizer.zero_grad()
    moved = before - tensors_of(model).g.detach()
    assert torch.allclose(moved, moved[0].expand(3), atol=1e-7)
    return float(moved[0]) / 0.5


def sorsa() -> Any:
    model = one_layer(rankwise.SorsaConfig(r=3, target_modules=["0"], orth_reg_weight=4e-4))
    with torch.no_grad():
        for p in trained(model):
            p += 0.3 * torch.randn_like(p)  # away from orthonormality, where the penalty is 0
    return model


def sorsa_peak(model: Any, optimizer: Any) -> float:
    """η_d of a step: γ times the mean gap of U and V, divided by the penalty."""

    def gap(P: Tensor) -> float:
        return float((P.double().T @ P.double() - torch.eye(3, dtype=torch.float64)).norm())

    t = tensors_of(model)
    gaps = gap(t.U.detach()) + gap(t.Vh.detach().T)
    backward(model, 0.0)
    optimizer.step()
    optimizer.zero_grad()
    penalty = rankwise.status(model).last_penalty
    assert penalty is not None
    return math.inf if penalty == 0 else 4e-4 * gaps / 2 / penalty


def salora() -> Any:
    fields = {"tinit": 0, "tfinal": 1, "total_step": STEPS + 2, "gate_lr": 0.02, "multiplier_lr": 1e-3}
    model = one_layer(rankwise.SaloraConfig(r=3, target_modules=["0"], density=0.5, **fields))
    tensors_of(model).multiplier.fill_(50.0)  # a density term that moves the gates from the first step on
    return model


def salora_share(model: Any, optimizer: Any) -> float:
    """The gates' rate in a step of plain SGD, as a share of the `gate_lr` that they have at the peak."""
    before = tensors_of(model).log_theta.detach().clone()
    backward(model, 1.0)
    optimizer.step()
    t = tensors_of(model)
    share = float((before - t.log_theta.detach()).sum() / t.log_theta.grad.sum()) / 0.02
    optimizer.zero_grad()
    return share


# --- schedules ------------------------------------------------------------------------------------------------------


def by_hand(rates: list[float]) -> Callable[[Any], Any]:
    """What a loop does that writes the rate itself: the first rate now, each call the next."""

    class Hand:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.left = optimizer, iter(rates)
            self.step()

        def step(self) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] = next(self.left, 0.0)

    return Hand


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """A metric that never falls: each second step divides the rate by ten."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, factor=0.1, patience=1)

    def step(self) -> None:  # type: ignore[override]
        """Nothing has improved."""
        super().step(1.0)


def warm_up(i: int) -> float:
    return min(1.0, i / 4) * (1 - max(0, i - 4) / STEPS)


RATES = [PEAK * (0.5 + 0.5 * math.cos(math.pi * i / STEPS)) for i in range(STEPS)]
MOUNTAIN = [1e-3, 4e-3, 1e-2, 5e-3, 2e-3, 8e-3, 1.5e-2, 1e-4, 1e-4, 1e-3, 1e-3, 1e-3]
SCHEDULES: dict[str, tuple[Callable[[Any], Any], float | None]] = {
    "constant": (by_hand([PEAK] * STEPS), PEAK),
    "warm-up and decay": (lambda o: lr_scheduler.LambdaLR(o, warm_up), PEAK),
    "cosine decay": (lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS), PEAK),
    "one cycle": (
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=3 * PEAK, total_steps=STEPS + 2, cycle_momentum=False),
        3 * PEAK,
    ),
    "plateau": (Plateau, PEAK),
    "decay by hand": (by_hand(RATES), PEAK),
    "up and down by hand": (by_hand(MOUNTAIN), None),
    "cyclic": (lambda o: lr_scheduler.CyclicLR(o, 1e-3, PEAK, step_size_up=3, cycle_momentum=False), None),
    "LambdaLR on a base of 1": (lambda o: lr_scheduler.LambdaLR(o, lambda i: MOUNTAIN[min(i, STEPS - 1)]), None),
}
"""How the rate is set, and its peak; None: the highest rate so far."""
SCHEDULED = pytest.mark.parametrize(("schedule", "peak"), SCHEDULES.values(), ids=list(SCHEDULES))


def follow(
    model: Any, measure: Callable[[Any, Any], float], schedule: Callable[[Any], Any], *, base: float = PEAK
) -> tuple[list[float], list[float]]:
    """(what was measured, the rate) of every step."""
    optimizer = torch.optim.SGD(trained(model), lr=base)
    scheduler = schedule(optimizer)
    rates, found = [], []
    for _ in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        found.append(measure(model, optimizer))
        scheduler.step()
    return found, rates


def peaks(rates: list[float], peak: float | None) -> list[float]:
    return list(itertools.accumulate(rates, max)) if peak is None else [peak] * len(rates)


def base_of(schedule: Callable[[Any], Any]) -> float:
    return 1.0 if schedule is SCHEDULES["LambdaLR on a base of 1"][0] else PEAK


@SCHEDULED
def test_sorsas_penalty_has_the_weight_of_the_peak_rate(schedule: Callable[[Any], Any], peak: float | None) -> None:
    """Equation 10: γ/η_d, with η_d the peak of the schedule, at every step of it."""
    found, rates = follow(sorsa(), sorsa_peak, schedule, base=base_of(schedule))
    assert found == pytest.approx(peaks(rates, peak), rel=1e-4)
    assert len(set(rates)) > 3 or len(set(rates)) == 1, "a schedule that moves"


@SCHEDULED
def test_soras_threshold_has_the_rate_of_the_step(schedule: Callable[[Any], Any], peak: float | None) -> None:
    """Equation 10: η_t·λ, with η_t the rate of the step and not the peak."""
    found, rates = follow(sora(), sora_rate, schedule, base=base_of(schedule))
    assert found == pytest.approx(rates, rel=1e-3, abs=1e-6)


@SCHEDULED
def test_a_gate_rate_of_its_own_follows_the_schedule(schedule: Callable[[Any], Any], peak: float | None) -> None:
    """The gates' rate is `gate_lr` where the optimiser's is at its peak, and falls with it."""
    found, rates = follow(sora(gate_lr=0.02), sora_rate, schedule, base=base_of(schedule))
    shares = [rate / top if top else 0.0 for rate, top in zip(rates, peaks(rates, peak), strict=True)]
    assert found == pytest.approx([0.02 * share for share in shares], rel=1e-3, abs=1e-6)


@SCHEDULED
def test_saloras_gates_follow_the_schedule(schedule: Callable[[Any], Any], peak: float | None) -> None:
    found, rates = follow(salora(), salora_share, schedule, base=base_of(schedule))
    expected = [rate / top if top else 0.0 for rate, top in zip(rates, peaks(rates, peak), strict=True)]
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["sorsa", "salora"])
def test_the_same_rates_by_hand_and_from_a_scheduler_are_the_same_run(name: str, batch: dict[str, Tensor]) -> None:
    ends = []
    for schedule in (by_hand(RATES), lambda o: lr_scheduler.LambdaLR(o, lambda i: RATES[min(i, STEPS - 1)] / PEAK)):
        torch.manual_seed(2)
        fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone
        model = get_peft_model(tiny_bert(), CONFIGS[name](**fields)).train()
        optimizer = torch.optim.AdamW(trained(model), lr=PEAK)
        scheduler = schedule(optimizer)
        for _ in range(STEPS):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        ends.append(torch.cat([p.detach().flatten() for p in trained(model)]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_a_later_stage_with_a_lower_peak_is_not_measured_by_the_first_ones() -> None:
    model = sorsa()
    follow(model, sorsa_peak, SCHEDULES["warm-up and decay"][0])
    found, _ = follow(model, sorsa_peak, SCHEDULES["warm-up and decay"][0], base=PEAK / 10)
    assert found == pytest.approx([PEAK / 10] * STEPS, rel=1e-4)


def test_groups_of_different_rates_have_peaks_of_their_own() -> None:
    """As with LoRA+: U at one rate, V at another; each has the weight of its own peak."""
    model = sorsa()
    t = tensors_of(model)
    optimizer = torch.optim.SGD([{"params": [t.U, t.S], "lr": 4e-2}, {"params": [t.Vh], "lr": 1e-2}])
    for share in (1.0, 0.1):
        for group, top in zip(optimizer.param_groups, (4e-2, 1e-2), strict=True):
            group["lr"] = share * top
        plain = {name: getattr(t, name).detach().double().requires_grad_() for name in ("U", "Vh")}
        backward(model, 0.0)
        optimizer.step()
        for name, top in (("U", 4e-2), ("Vh", 1e-2)):
            P = plain[name] if name == "U" else plain[name].T
            (4e-4 / top / 2 * (P.T @ P - torch.eye(3, dtype=torch.float64)).norm()).backward()
            torch.testing.assert_close(getattr(t, name).grad.double(), plain[name].grad, rtol=1e-4, atol=1e-8)
        optimizer.zero_grad()


# --- the peak outlives the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sorsa", "salora", "sora"])
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_run_with_rates_by_hand_resumes_bit_identical(
    name: str, stop: int, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    own = {"gate_lr": 0.05} if name == "sora" else {}
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone | own

    def run(model: Any, optimizer: Any, rates: list[float]) -> None:
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            model.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> Any:
        torch.manual_seed(2)
        return get_peft_model(tiny_bert(), CONFIGS[name](**fields))

    whole, first = fresh(), fresh()
    run(whole, torch.optim.AdamW(trained(whole), lr=1.0), MOUNTAIN)
    optimizer = torch.optim.AdamW(trained(first), lr=1.0)
    run(first, optimizer, MOUNTAIN[:stop])
    first.save_pretrained(str(tmp_path))
    second: Any = PeftModel.from_pretrained(tiny_bert(), str(tmp_path), is_trainable=True)
    again = torch.optim.AdamW(trained(second), lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(second, again, MOUNTAIN[stop:])
    ends = [{k: t for k, t in model.state_dict().items() if "rankwise" in k} for model in (whole, second)]
    assert all(torch.equal(ends[1][key], t) for key, t in ends[0].items())


def test_the_peak_survives_a_cast_and_a_copy() -> None:
    model = sorsa()
    follow(model, sorsa_peak, by_hand(MOUNTAIN))
    stored = tensors_of(model).peaks.clone()
    assert stored.tolist() == pytest.approx([max(MOUNTAIN)] * 3)
    assert torch.equal(tensors_of(copy.deepcopy(model)).peaks, stored)
    model.to(torch.bfloat16)
    assert torch.equal(tensors_of(model).peaks, stored)
    assert tensors_of(model).peaks.dtype == torch.float32


def test_a_step_that_fails_leaves_no_peak_behind() -> None:
    model = sorsa()
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    backward(model, float("nan"))
    optimizer.step()
    assert tensors_of(model).peaks.tolist() == [0.0] * 3


# --- nominal rates --------------------------------------------------------------------------------------------------


def test_sora_under_prodigy_thresholds_by_the_rate_before_the_step() -> None:
    """d·lr, with lr = 1 by default. With lr alone every gate closed within a few steps."""
    model = sora()
    optimizer = Prodigy(trained(model), lr=1.0)
    for d in (1e-6, 2e-3, 5e-2):
        optimizer.param_groups[0]["d"] = d
        assert sora_rate(model, optimizer) == pytest.approx(d, rel=1e-3, abs=1e-6)


def test_soras_gates_stay_open_while_prodigy_searches_its_rate(batch: dict[str, Tensor]) -> None:
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert(), rankwise.SoraConfig(**fields)).train()
    optimizer = Prodigy(trained(model), lr=1.0)
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert set(rankwise.ranks(model).values()) == {4}
    assert optimizer.param_groups[0]["d"] > 1e-3, "the search is over"


def test_prodigys_peak_is_the_highest_real_rate() -> None:
    model = sorsa()
    optimizer = Prodigy(trained(model), lr=1.0, d0=1e-4)
    found = []
    for d, lr in ((1e-4, 1.0), (3e-3, 1.0), (3e-3, 0.1), (2e-2, 0.5)):
        optimizer.param_groups[0].update(d=d, lr=lr)
        found.append(sorsa_peak(model, optimizer))
    assert found == pytest.approx([1e-4, 3e-3, 3e-3, 1e-2], rel=1e-4)


@pytest.mark.parametrize(("d0", "warns"), [(1e-6, True), (1e-4, False)])
def test_sorsa_says_when_its_penalty_may_hold_prodigys_rate_down(d0: float, warns: bool) -> None:
    model = sorsa()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sorsa_peak(model, Prodigy(trained(model), lr=1.0, d0=d0))
    said = [str(w.message) for w in told if "first estimate of its learning rate" in str(w.message)]
    assert len(said) == warns
    if warns:
        assert "is 1e-06, at which the penalty's weight, orth_reg_weight / rate, is 400" in said[0]
        assert "start at 4e-05 or above" in said[0]


@pytest.mark.parametrize("kind", [AdamWScheduleFree, SGDScheduleFree])
def test_sora_under_a_schedule_free_optimiser_thresholds_by_the_scheduled_rate(kind: Any) -> None:
    model = sora()
    optimizer = kind(trained(model), lr=PEAK, warmup_steps=4)
    optimizer.train()
    found = [sora_rate(model, optimizer) for _ in range(6)]
    assert found == pytest.approx([PEAK * share for share in (0.25, 0.5, 0.75, 1, 1, 1)], rel=1e-3)


def test_steps_that_a_schedule_free_optimiser_does_not_take_threshold_nothing() -> None:
    """RAdam's first steps only gather statistics, at a rate of 0."""
    model = sora()
    optimizer = RAdamScheduleFree(trained(model), lr=PEAK)
    optimizer.train()
    found = []
    for _ in range(8):
        rate = sora_rate(model, optimizer)
        found.append(rate)
        assert rate == pytest.approx(optimizer.param_groups[0]["scheduled_lr"], rel=1e-3, abs=1e-6)
    assert found[0] == 0 < found[-1]


@ROWS
def test_adafactor_with_its_own_rate_trains_or_is_refused_by_name(
    name: str, case: Case, batch: dict[str, Tensor]
) -> None:
    torch.manual_seed(2)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | case.alone
    model = get_peft_model(tiny_bert(), CONFIGS[name](**fields)).train()
    own = {"lr": None, "relative_step": True, "scale_parameter": True, "warmup_init": False}
    optimizer = Adafactor(trained(model), **own)
    if name in ("sora", "salora", "sorsa"):
        model(**batch).loss.backward()
        with pytest.raises(TrainingError, match=r"needs the learning rate .* give the optimiser `lr`"):
            optimizer.step()
        return
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert rankwise.status(model).rules_run == 10


@pytest.mark.parametrize(
    "config",
    [
        rankwise.SoraConfig(target_modules=["0"], sparse_weight=0.0),
        rankwise.SorsaConfig(r=3, target_modules=["0"], orth_reg_weight=0.0),
    ],
    ids=["sora", "sorsa"],
)
def test_without_a_threshold_or_a_penalty_no_rate_is_needed(config: Any) -> None:
    model = one_layer(config)
    optimizer = Adafactor(trained(model), lr=None, relative_step=True, warmup_init=True)
    backward(model, 1.0)
    optimizer.step()
    assert rankwise.status(model).rules_run == 1


def test_adafactor_with_a_given_rate_has_that_rate() -> None:
    model = sora()
    optimizer = Adafactor(trained(model), lr=PEAK, relative_step=False, scale_parameter=False)
    assert sora_rate(model, optimizer) == pytest.approx(PEAK, rel=1e-3)


class Factor(torch.optim.Optimizer):
    """Finds its rate by itself, as DoG does, and multiplies it by lr."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:
        """A hundredth, whatever the gradient's size."""
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.add_(p.grad.sign(), alpha=-0.01)


NOT_ITS_RATE: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "Adadelta": torch.optim.Adadelta,
    "Adadelta, a small factor": lambda own: torch.optim.Adadelta(own, lr=PEAK),
    "an unknown factor": Factor,
    "Adafactor, scaled": lambda own: Adafactor(own, lr=PEAK, relative_step=False, scale_parameter=True),
    "torch's Adafactor": lambda own: torch.optim.Adafactor(own, lr=PEAK),
}
"""Optimisers whose `lr` is not the rate at which they move, and that tell no other."""


@pytest.mark.parametrize("kind", NOT_ITS_RATE.values(), ids=list(NOT_ITS_RATE))
@ROWS
def test_an_lr_that_is_no_rate_is_refused_where_a_rule_needs_one(
    kind: Callable[[list[nn.Parameter]], Any], name: str, case: Case, batch: dict[str, Tensor]
) -> None:
    """SoRA closed every gate within three steps of Adadelta, without a word."""
    fields = {"r": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"} | case.alone
    model = get_peft_model(tiny_bert(), CONFIGS[name](**fields)).train()
    before = rankwise.ranks(model)
    optimizer = kind(trained(model))
    model(**batch).loss.backward()
    if name in ("sora", "salora", "sorsa"):
        with pytest.raises(TrainingError, match=r"give the optimiser `lr` below 1, .* scale_parameter=False"):
            optimizer.step()
        assert rankwise.ranks(model) == before
    else:
        optimizer.step()
        assert rankwise.status(model).rules_run == 1
