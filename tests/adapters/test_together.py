"""What is made for all layers of a pass at once is what each layer would have made, and so are its gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise
from rankwise.adapters import together
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers
from rankwise.methods.sorsa import Sorsa

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SaLoRA": ("salora", {"total_step": 100, "tinit": 1, "tfinal": 1}),
    "SORSA": ("sorsa", {}),
    "NB-LoRA": ("nblora", {}),
    "NB-LoRA, split": ("nblora", {"norm": "nuclear"}),
    "NB-LoRA, svd": ("nblora", {"parameterization": "svd", "norm": "frobenius"}),
    "Deep LoRA": ("deep", {}),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


class Net(nn.Module):
    """Four layers of two shapes; blocks can be checkpointed, left out or run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 5)
        self.order: tuple[int, ...] = (0, 1, 2)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(samples, 5)."""
        for i in self.order:
            if self.reentrant is None:
                x = self._block(i, x)
            else:
                x = checkpoint(self._block, i, x, use_reentrant=self.reentrant)  # type: ignore[assignment]
        return self.last(x)

    def _block(self, i: int, x: Tensor) -> Tensor:
        return self.blocks[i](x).tanh()


@pytest.fixture(autouse=True)
def everywhere() -> Iterator[None]:
    """SORSA prepares on other devices than the CPU alone; here it shall."""
    with mock.patch.object(Sorsa, "prepares_on_cpu", True):
        yield


def adapted(case: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    name, own = CASES[case]
    config = CONFIGS[name](r=4, target_modules=r"blocks\.\d|last", init_weights=False, **own | fields)
    model: Any = get_peft_model(Net().double(), config, autocast_adapter_dtype=False).train()
    for layer in adapted_layers(model).values():
        tensors = layer.tensors("default")
        if "u" in tensors.slots:
            tensors.u.uniform_(0.1, 0.9)
    return model


def inputs() -> Tensor:
    return torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model: Any) -> list[Tensor | None]:
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def outcome(model: Any, run: Any = None) -> list[Tensor | None]:
    """The output of one pass, and the gradients of all that trains."""
    y = (run or model)(inputs())
    y.square().sum().backward()
    return [y.detach(), *gradients(model)]


def alone(model: Any) -> list[Tensor | None]:
    """The same where each layer makes its own: the pass is not one of the whole PEFT model."""
    with made(times=0):
        return outcome(model, model.base_model.model)


@contextmanager
def made(times: int) -> Iterator[None]:
    """Something is made for so many stacks of layers within the block."""
    with mock.patch.object(together, "_made_of_stacks", wraps=together._made_of_stacks) as spy:
        yield
    assert spy.call_count == times


def stacks_of(model: Any) -> int:
    """SaLoRA's gates and Deep LoRA's products are of one shape in all layers."""
    return 1 if model.peft_config["default"].method in ("salora", "deep") else 2


def check_same(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    assert [g is None for g in found] == [g is None for g in wanted]
    for one, other in zip(found, wanted, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@EVERY_CASE
def test_a_pass_is_that_of_layers_that_make_their_own(case: str) -> None:
    model = adapted(case)
    with made(stacks_of(model)):
        found = outcome(model)
    check_same(found, alone(model))


@EVERY_CASE
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_have_the_same_gradients(case: str, reentrant: bool) -> None:
    model = adapted(case)
    wanted = alone(model)
    model.base_model.model.reentrant = reentrant
    for _ in range(2):
        check_same(outcome(model), wanted)


@EVERY_CASE
@pytest.mark.parametrize("training", [False, True])
def test_another_pass_between_the_two_of_a_checkpointed_step_changes_nothing(case: str, training: bool) -> None:
    model = adapted(case)
    wanted = alone(model)
    model.base_model.model.reentrant = False
    y = model(inputs())
    with torch.no_grad():
        model.train(training)(inputs())
    model.train()
    y.square().sum().backward()
    check_same([y.detach(), *gradients(model)], wanted)


@EVERY_CASE
def test_a_layer_that_was_not_reached_has_no_gradient(case: str) -> None:
    """Rather than zeros, by which an optimiser's momentum would move it."""
    model = adapted(case)
    model.base_model.model.order = (0, 2)
    found = outcome(model)
    check_same(found, alone(model))
    assert any(g is None for g in found)


@EVERY_CASE
def test_a_layer_may_run_twice(case: str) -> None:
    model = adapted(case)
    model.base_model.model.order = (0, 1, 1, 0)
    check_same(outcome(model), alone(model))


@EVERY_CASE
def test_two_passes_before_one_backward_pass(case: str) -> None:
    """As losses over pairs need them, and steps that accumulate."""
    model = adapted(case)
    found = []
    for run in (model, model.base_model.model):
        first, second = run(inputs()), run(2 * inputs())
        (first * second).sum().backward()
        run(inputs()).sum().backward()
        found.append(gradients(model))
    check_same(*found)


@EVERY_CASE
def test_a_graph_that_is_retained_can_be_gone_through_again(case: str) -> None:
    model = adapted(case)
    loss = model(inputs()).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    check_same(gradients(model), once)


@EVERY_CASE
def test_second_derivatives(case: str) -> None:
    model = adapted(case)
    found = []
    for run in (model, model.base_model.model):
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(run(inputs()).square().sum(), trained, create_graph=True)
        sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]
        found.append(gradients(model))
    check_same(*found)


@EVERY_CASE
def test_what_does_not_train_gets_no_gradient(case: str) -> None:
    model = adapted(case)
    layers = list(adapted_layers(model).values())
    for p in layers[1].tensors("default").trained():
        p.requires_grad_(False)
    layers[3].tensors("default").trained()[0].requires_grad_(False)
    check_same(outcome(model), alone(model))


@EVERY_CASE
def test_the_step_is_that_of_layers_that_make_their_own(case: str) -> None:
    ends = []
    for whole in (True, False):
        model = adapted(case)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            (model if whole else model.base_model.model)(inputs()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in model.parameters() if p.requires_grad])
    check_same(*ends)


@EVERY_CASE
def test_under_autocast(case: str) -> None:
    model = adapted(case).float()
    found = []
    for run in (model, model.base_model.model):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(inputs().float())
        y.float().square().sum().backward()
        found.append([y.detach().float(), *gradients(model)])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("case", ["NB-LoRA", "SaLoRA"])
def test_a_copy_after_a_pass_is_a_model_of_its_own(case: str) -> None:
    model = adapted(case)
    model(inputs())
    twin = copy.deepcopy(model)
    check_same(outcome(twin), alone(model))


def test_nothing_is_made_where_no_layer_would_take_it() -> None:
    model = adapted("NB-LoRA")
    with made(times=0):
        with torch.no_grad():
            model(inputs())
        model.eval()(inputs())
        model.train()
        with model.disable_adapter():
            model(inputs())
        model.add_adapter("other", rankwise.NbLoraConfig(r=2, target_modules=r"blocks\.\d"))
        model.base_model.set_adapter(["default", "other"])
        model(inputs())


def test_a_layer_that_runs_outside_of_a_pass_makes_its_own() -> None:
    model = adapted("NB-LoRA")
    model(inputs()).sum().backward()
    gradients(model)
    found = []
    for _ in range(2):
        model.base_model.model.blocks[0](inputs()).square().sum().backward()
        found.append(gradients(model))
    check_same(*found)


def test_a_pass_that_raises_leaves_nothing_behind() -> None:
    model = adapted("NB-LoRA")
    wanted = alone(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(3, 7, dtype=torch.float64))
    check_same(alone(model), wanted)
    check_same(outcome(model), wanted)


def test_parameters_that_a_functional_call_puts_in_place_are_taken() -> None:
    model = adapted("NB-LoRA")
    others = {name: (1.5 * p).detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    y = torch.func.functional_call(model, others, (inputs(),))
    found = torch.autograd.grad(y.square().sum(), list(others.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in others:
                p.copy_(others[name])
    check_same([y.detach(), *found], outcome(model))
