"""The step counter is the number of optimiser steps, whatever the gradients are, and a schedule ends where it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import rankwise
from cases import CASES
from conftest import tiny_llama
from rankwise.errors import TrainingError
from small import FINAL, adapted, check_same, config_of, inputs, loss_of, state, trained

NAMES = pytest.mark.parametrize("name", CASES)
ACCUMULATION = pytest.mark.parametrize("accumulation", [1, 4, 16])
STEPS = 12


def counted(model: nn.Module, adapter: str = "default") -> tuple[int, int, int]:
    told = rankwise.status(model, adapter)
    return told.step, told.rules_run, told.steps_skipped


def steps_until_final(model: nn.Module, steps: Iterator[None]) -> tuple[int, int | None]:
    """How many steps there were, and after which of them the ranks were final; from there on they must not change."""
    final, kept, step = None, None, 0
    scheduled = rankwise.status(model).final_ranks_due is not None
    for step, _ in enumerate(steps, 1):
        if scheduled and final is None and rankwise.status(model).final_ranks_due is None:
            final, kept = step, rankwise.ranks(model)
        assert kept is None or rankwise.ranks(model) == kept
    return step, final


# --- micro-batches that give no gradient ----------------------------------------------------------------------------


def run(model: nn.Module, accumulation: int, passes: Callable[[int], list[float]]) -> Iterator[None]:
    """Twelve steps; `passes(j)` are the weights of the losses of micro-batch j of every step, in turn."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for i in range(STEPS):
        for j in range(accumulation):
            for weight in passes(j):
                (weight * loss_of(model, accumulation * i + j) / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


@NAMES
@ACCUMULATION
def test_micro_batches_without_a_gradient_change_nothing(name: str, accumulation: int) -> None:
    """Rows whose labels are all masked, groups of equal reward: their gradients are exactly 0."""
    ends = []
    for passes in ([1.0], [1.0, 0.0], [0.0, 1.0, 0.0]):
        model = adapted(name)
        steps, final = steps_until_final(model, run(model, accumulation, lambda _, passes=passes: passes))
        assert counted(model) == (steps, steps, 0) == (STEPS, STEPS, 0)
        assert final == FINAL.get(name)
        ends.append(state(model))
    check_same(ends[0], ends[1])
    check_same(ends[0], ends[2])


@NAMES
@ACCUMULATION
def test_a_step_whose_gradients_are_all_zero_is_a_step(name: str, accumulation: int) -> None:
    """The first one too: Deep LoRA then takes its start from the second."""
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for i in range(STEPS):
        weight = 0.0 if i % 3 == 0 else 1.0
        for j in range(accumulation):
            (weight * loss_of(model, accumulation * i + j)).backward()
        before = state(model)
        optimizer.step()
        optimizer.zero_grad()
        if name == "deep" and i == 0:
            after = state(model)
            counters = ("progress", "peaks")  # the step and its learning rate are counted; nothing else has moved
            assert all(torch.equal(after[key], t) for key, t in before.items() if not key.endswith(counters))
        if name == "deep" and i == 1:
            assert all(bool(f.B.any()) for f in rankwise.factors(model).values())
        assert counted(model) == (i + 1, i + 1, 0)
        due = rankwise.status(model).final_ranks_due
        assert (due is None) == (i + 1 >= FINAL.get(name, 0))


@NAMES
@pytest.mark.parametrize("zeros", [True, False])
def test_a_step_without_a_backward_pass_is_a_step(name: str, zeros: bool) -> None:
    """Of an adapter that trains: gradients of zero and none at all make no difference."""
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for i in range(STEPS):
        if i % 3 != 1:
            loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not zeros)
        assert counted(model) == (i + 1, i + 1, 0)


def test_deep_lora_cannot_start_without_a_backward_pass() -> None:
    model = adapted("deep")
    with pytest.raises(TrainingError, match="no backward pass has shown one: pass `init_batch`"):
        torch.optim.SGD(trained(model), lr=0.1).step()


# --- the figures of whole runs --------------------------------------------------------------------------------------


def tokens(i: int) -> Tensor:
    return torch.randint(3, 100, (4, 8), generator=torch.Generator().manual_seed(i))


def llama(config: Any) -> Any:
    return get_peft_model(tiny_llama(), config).train()


def train_llama(model: Any, steps: int, accumulation: int, masked: int = 0) -> Iterator[None]:
    """The first `masked` micro-batches of every step have no label left, as where prompts fill the whole length."""
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    for i in range(steps):
        for j in range(accumulation):
            x = tokens(accumulation * i + j)
            labels = torch.full_like(x, -100) if j < masked else x
            logits = model(input_ids=x).logits[:, :-1].flatten(0, 1)
            total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            (total / 28 / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


@pytest.mark.parametrize("masked", [0, 2])
def test_masked_micro_batches_do_not_hasten_adalora(masked: int) -> None:
    model = llama(rankwise.AdaLoraConfig(r=4, target_modules=["q_proj", "v_proj"], total_step=40))
    assert steps_until_final(model, train_llama(model, 40, 4, masked)) == (40, 28)
    assert counted(model) == (40, 40, 0)


@pytest.mark.parametrize("accumulation", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_closed_gates_of_the_first_layer_do_not_hasten_salora(accumulation: int) -> None:
    """A layer all of whose gates a draw has closed gets no gradient in that step."""
    config = rankwise.SaloraConfig(r=1, target_modules=["q_proj", "v_proj"], total_step=60, density=0.25)
    model = llama(config)
    assert steps_until_final(model, train_llama(model, 60, accumulation)) == (60, 42)
    assert counted(model) == (60, 60, 0)


@ACCUMULATION
def test_ranks_that_leave_the_first_layer_do_not_hasten_alora(accumulation: int) -> None:
    fields = {"rounds": 6, "warmup_steps": 10, "recovery_steps": 5, "prune_per_round": 2}
    batch = {"input_ids": tokens(99), "labels": tokens(99)}
    model = llama(rankwise.AloraConfig(r=1, target_modules=["q_proj", "v_proj"], score_batch=batch, **fields))
    moves, before = [], rankwise.ranks(model)
    for step, _ in enumerate(train_llama(model, 36, accumulation), 1):
        if rankwise.ranks(model) != before:
            moves.append(step)
            before = rankwise.ranks(model)
    assert set(moves) <= {10, 15, 20, 25, 30, 35}
    assert moves
    assert counted(model) == (36, 36, 0)


# --- what is frozen -------------------------------------------------------------------------------------------------


@NAMES
@ACCUMULATION
def test_an_adapter_with_frozen_layers_trains_on(name: str, accumulation: int) -> None:
    model = adapted(name)
    for key, p in model.named_parameters():
        if ".0." in key:
            p.requires_grad_(False)
    frozen = {key: t for key, t in state(model).items() if ".0." in key and not key.endswith("progress")}
    steps, final = steps_until_final(model, run(model, accumulation, lambda _: [1.0]))
    assert counted(model) == (steps, steps, 0) == (STEPS, STEPS, 0)
    assert final == FINAL.get(name)
    parameters = dict(model.named_parameters())
    if name not in FINAL:  # an allocation takes ranks from frozen layers too
        assert all(torch.equal(parameters[key], t) for key, t in frozen.items() if key in parameters)


def test_adalora_ends_its_schedule_with_lower_layers_frozen() -> None:
    model = llama(rankwise.AdaLoraConfig(r=4, target_modules="all-linear", total_step=20))
    model.enable_input_require_grads()
    for key, p in model.named_parameters():
        if ".layers.0." in key:
            p.requires_grad_(False)
    assert steps_until_final(model, train_llama(model, 20, 4)) == (20, 14)


@NAMES
@pytest.mark.parametrize("zeros", [True, False])
def test_a_frozen_adapter_beside_a_trained_one_takes_no_part(name: str, zeros: bool) -> None:
    """Both are active, the older one is frozen after some steps, and one optimiser holds both."""
    model = adapted(name)
    optimizer = torch.optim.SGD(trained(model), lr=1e-2)
    for i in range(3):
        loss_of(model, i).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not zeros)
    model.add_adapter("other", config_of(name))
    model.base_model.set_adapter(["default", "other"])
    for p in trained(model, "default"):
        p.requires_grad_(False)
    optimizer.add_param_group({"params": trained(model)})
    frozen = state(model)
    for i in range(5):
        for j in range(4):
            loss_of(model, 4 * i + j).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not zeros)
    check_same(frozen, state(model))
    assert counted(model) == (3, 3, 0)
    assert counted(model, "other") == (5, 5, 0)


@NAMES
def test_an_adapter_that_never_trains_counts_nothing(name: str) -> None:
    """Frozen and active, it is run and differentiated through, and no optimiser holds it."""
    model = adapted(name, init_weights=False)
    for p in model.parameters():
        p.requires_grad_(False)
    before = state(model)
    head = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for i in range(3):
        x = inputs(i).requires_grad_()
        head(model(x)).square().mean().backward()
        optimizer.step()
    check_same(before, state(model))


# --- gradients that are computed and dropped ------------------------------------------------------------------------


@NAMES
@ACCUMULATION
def test_probes_of_the_gradient_count_as_nothing(name: str, accumulation: int) -> None:
    """`autograd.grad`, a backward pass whose gradients are dropped, and gradients of several tasks put together."""
    ends = []
    for probing in (False, True):
        model = adapted(name)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for i in range(STEPS):
            for j in range(accumulation):
                k = accumulation * i + j
                if probing:
                    torch.autograd.grad(loss_of(model, k + 7), trained(model), allow_unused=True)
                    held = [(p, p.grad) for p in trained(model)]
                    optimizer.zero_grad()
                    loss_of(model, k + 9).backward()
                    for p, gradient in held:
                        p.grad = gradient
                loss_of(model, k).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert counted(model) == (i + 1, i + 1, 0)
        ends.append(state(model))
    check_same(*ends)


@pytest.mark.parametrize("probe", ["autograd.grad", "set to None", "set to zero"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_probe_before_the_first_step_does_not_decide_the_start(probe: str, accumulation: int) -> None:
    ends = []
    for probing in (False, True):
        model = adapted("deep")
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        if probing and probe == "autograd.grad":
            torch.autograd.grad(loss_of(model, 50), trained(model), allow_unused=True)
        elif probing:
            loss_of(model, 50).backward()
            optimizer.zero_grad(set_to_none=probe == "set to None")
        for i in range(3):
            for j in range(accumulation):
                loss_of(model, accumulation * i + j).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(state(model))
    check_same(*ends)


@NAMES
def test_gradients_of_tasks_put_together_are_one_step(name: str) -> None:
    ends = []
    for by_task in (False, True):
        model = adapted(name)
        optimizer = torch.optim.SGD(trained(model), lr=1e-2)
        for i in range(STEPS):
            if by_task:
                tasks = [torch.autograd.grad(loss_of(model, 2 * i + j), trained(model)) for j in range(2)]
                for p, *gradients in zip(trained(model), *tasks, strict=True):
                    p.grad = gradients[0] + gradients[1]
            else:
                for j in range(2):
                    loss_of(model, 2 * i + j).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert counted(model) == (STEPS, STEPS, 0)
        ends.append(state(model))
    check_same(*ends)


@NAMES
def test_making_an_optimisers_state_is_no_step(name: str) -> None:
    """`torch.distributed.checkpoint` calls `step()` with gradients of zero for it, before the first step."""
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    before = state(model)
    get_optimizer_state_dict(model, optimizer)
    check_same(before, state(model))
    loss_of(model, 0).backward()
    optimizer.step()
    assert counted(model) == (1, 1, 0)


# --- two adapters ---------------------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("shared", [False, True])
def test_two_adapters_share_an_accumulation_window(name: str, shared: bool) -> None:
    """Backward of one, backward of the other, then both steps: each ends as if it had trained alone."""
    ends: dict[str, list[dict[str, Tensor]]] = {"first": [], "second": []}
    for interleaved in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), config_of(name), "first").train()
        model.add_adapter("second", config_of(name))
        both = trained(model, "first") + trained(model, "second")
        together = torch.optim.AdamW(both, lr=1e-2)
        alone = {adapter: torch.optim.AdamW(trained(model, adapter), lr=1e-2) for adapter in ends}
        for i in range(STEPS):
            for k, adapter in enumerate(ends):
                model.set_adapter(adapter)
                loss_of(model, 2 * i + k).backward()
                if not interleaved:
                    alone[adapter].step()
                    alone[adapter].zero_grad()
            if interleaved:
                for optimizer in [together] if shared else alone.values():
                    optimizer.step()
                    optimizer.zero_grad()
        for adapter, states in ends.items():
            assert counted(model, adapter) == (STEPS, STEPS, 0)
            states.append(state(model, adapter))
    if name == "alora":  # ranks are scored with the adapter that is active at that moment
        return
    check_same(*ends["first"])
    check_same(*ends["second"])
