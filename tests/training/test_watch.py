"""What happens between two steps without a step is noticed, and what is harmless is not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model

import rankwise
from cases import CASES, Case
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import TrainingError

ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
Batch = dict[str, torch.Tensor]


def adapted(name: str, case: Case) -> Any:
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", "init_weights": False}
    return get_peft_model(tiny_bert(), CONFIGS[name](**fields | case.alone)).train()


def parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def state(model: Any) -> dict[str, torch.Tensor]:
    kept = {name: t for name, t in model.state_dict().items() if "rankwise" in name and not name.endswith("progress")}
    return copy.deepcopy(kept)


@ROWS
def test_a_step_the_loss_scale_skipped_is_counted(name: str, case: Case, batch: Batch) -> None:
    """A plain optimiser is not called on overflow."""
    model = adapted(name, case)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2, foreach=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = state(model)
    for overflow in (True, True, False):
        loss = model(**batch).loss * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            assert all(torch.equal(t, before[key]) for key, t in state(model).items())
    told = rankwise.status(model)
    assert (told.step, told.steps_skipped, told.rules_run) == (3, 2, 1)


@ROWS
def test_accumulating_gradients_is_no_skip(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-3)
    for _ in range(2):
        for _ in range(3):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(**batch)
    told = rankwise.status(model)
    assert (told.step, told.steps_skipped) == (2, 0)


@ROWS
def test_weights_that_move_without_a_step_are_an_error(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    model(**batch).loss.backward()
    with torch.no_grad():
        for p in parameters(model):  # what an engine with its own optimiser does
            if p.grad is not None:
                p.data -= 0.1 * p.grad
                p.grad = None
    with pytest.raises(TrainingError, match=r"moved after a backward pass and no optimiser step was seen"):
        model(**batch)


@ROWS
def test_loads_casts_copies_and_finalize_are_no_such_moves(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    other = {key: t + 0.01 for key, t in state(model).items() if t.is_floating_point()}
    model(**batch).loss.backward()
    model.load_state_dict(other, strict=False)
    model(**batch).loss.backward()
    model.double().float()
    model(**batch).loss.backward()
    rankwise.finalize(model)
    model(**batch).loss.backward()
    twin = copy.deepcopy(model)
    twin(**batch)
    assert rankwise.status(model).steps_skipped == 0


@ROWS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_run(name: str, case: Case, batch: Batch, reentrant: bool) -> None:
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = adapted(name, case)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
        for _ in range(4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(state(model))
        assert rankwise.status(model).rules_run == 4
    # Reentrant blocks make their own factors and gates, which may round in another way than those made at once.
    for key, t in ends[0].items():
        torch.testing.assert_close(ends[1][key], t, rtol=1e-5, atol=3e-6)


@ROWS
def test_a_cast_by_hand_leaves_exact_tensors_float32(name: str, case: Case, batch: Batch) -> None:
    """TRL casts every trainable parameter of a quantised model to bfloat16 after the adapter was made."""
    model = adapted(name, case)
    for p in parameters(model):
        p.data = p.data.to(torch.bfloat16)
    model.classifier.modules_to_save["default"].float()
    model(**batch).loss.backward()
    torch.optim.AdamW(parameters(model), lr=1e-2).step()
    for layer in adapted_layers(model).values():
        tensors = layer.tensors("default")
        wrong = [
            key for key, slot in tensors.slots.items() if slot.exact and getattr(tensors, key).dtype != torch.float32
        ]
        assert not wrong
    assert rankwise.status(model).rules_run == 1


@ROWS
def test_bfloat16_autocast_trains_and_keeps_exact_tensors(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for layer in adapted_layers(model).values():
        tensors = layer.tensors("default")
        assert all(getattr(tensors, key).dtype == torch.float32 for key, slot in tensors.slots.items() if slot.exact)


def test_one_bad_adapter_skips_the_step_for_every_adapter_of_the_optimiser(batch: Batch) -> None:
    fields = {"r": 4, "target_modules": ["query", "value"], "sparse_weight": 5.0, "init_weights": False}
    model = get_peft_model(tiny_bert(), CONFIGS["sora"](**fields)).train()
    model.add_adapter("other", CONFIGS["sora"](**fields))
    model.base_model.set_adapter(["default", "other"])
    before = state(model)
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    model(**batch).loss.backward()
    next(p for n, p in model.named_parameters() if n.endswith("other.A")).grad[0, 0] = float("inf")
    optimizer.step()
    assert all(torch.equal(t, before[key]) for key, t in state(model).items())
    for adapter in ("default", "other"):
        told = rankwise.status(model, adapter)
        assert (told.step, told.steps_skipped, told.rules_run) == (1, 1, 0)


def test_large_finite_gradients_are_not_bad(batch: Batch) -> None:
    model = adapted("nnm", CASES["nnm"])
    (1e25 * model(**batch).loss).backward()
    torch.optim.SGD(parameters(model), lr=0.0).step()
    assert rankwise.status(model).steps_skipped == 0


def test_frozen_tensors_get_no_penalty(batch: Batch) -> None:
    model = adapted("nnm", CASES["nnm"])
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("default.A")}
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name not in frozen)
    model(**batch).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(model.get_parameter(name), t) for name, t in frozen.items())


def test_an_inactive_adapter_takes_no_part(batch: Batch) -> None:
    model = adapted("sora", CASES["sora"])
    optimizer = torch.optim.AdamW(parameters(model), lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    model.add_adapter("other", CONFIGS["sora"](r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    model.set_adapter("other")
    for _ in range(3):
        optimizer.step()
    assert rankwise.status(model).step == 1


def test_a_closure_called_twice_is_refused(batch: Batch) -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for _ in range(2):
                with torch.enable_grad():
                    closure()

    model = adapted("lora", CASES["lora"])
    with pytest.raises(TrainingError, match="calls its closure many times"):
        Twice(parameters(model), lr=0.1).step(lambda: model(**batch).loss.backward())
