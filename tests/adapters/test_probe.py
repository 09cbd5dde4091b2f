"""The gradient of a frozen base weight, seen in passing, is what autograd gives for a trainable one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import rankwise
from conftest import tiny_bert, tiny_gpt2
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import TrainingError
from rankwise.linalg.subspace import gradient_subspace
from rankwise.methods.deep import Deep

Seen = dict[str, Tensor]
CHECKPOINTING = [None, "non-reentrant", "reentrant"]


@pytest.fixture
def kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep the gradient they were handed instead of the start made of it."""
    monkeypatch.setattr(Deep, "start_from_gradient", lambda self, size, gradient: {"gradient": gradient.clone()})


def adapted(net: nn.Module, targets: Any = "all-linear", **fields: Any) -> Any:
    return get_peft_model(net, rankwise.DeepLoraConfig(r=2, target_modules=targets, **fields)).train()


def handed_over(model: nn.Module) -> Seen:
    """∂L/∂W (out, in) as each layer was told it; layers that were told nothing are left out."""
    found = {name: layer.tensors("default").from_gradient for name, layer in adapted_layers(model).items()}
    return {name: start["gradient"] for name, start in found.items() if start}


def by_autograd(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Seen:
    """∂L/∂W (out, in) of every linear weight."""
    net.train()
    loss(net).backward()
    layers = {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    gradients = {name: layer.weight.grad for name, layer in layers.items()}
    return {n: g.T if isinstance(layers[n], Conv1D) else g for n, g in gradients.items() if g is not None}  # type: ignore[misc]


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


def one(kind: str) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5) if kind == "Linear" else Conv1D(5, 6))


def loss_of(net: Any, x: Tensor) -> Tensor:
    return (net(x) * torch.linspace(-1, 2, 5)).sin().sum()


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("Linear", (6,))]
    + [(kind, shape) for kind in ("Linear", "Conv1D") for shape in [(7, 6), (3, 7, 6), (2, 3, 7, 6), (1300, 6)]],
)
def test_one_layer(kept_whole: None, kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    expected = by_autograd(one(kind), lambda net: loss_of(net, x))["0"]
    model = adapted(one(kind), ["0"], lora_dropout=0.5)
    loss = loss_of(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which a loop may put around the backward pass as well
        loss.backward()
    assert close(handed_over(model)["0"], expected, 1e-5)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_batch_without_rows_gives_no_start(kept_whole: None, kind: str) -> None:
    """Its gradient is zero and has no leading directions; the next batch gives the start."""
    model = adapted(one(kind), ["0"])
    loss_of(model, torch.randn(0, 6)).backward()
    assert handed_over(model) == {}
    x = torch.randn(7, 6)
    expected = by_autograd(one(kind), lambda net: loss_of(net, x))["0"]
    loss_of(model, x).backward()
    assert close(handed_over(model)["0"], expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_of_another_dtype_is_summed_in_float32(kept_whole: None, dtype: torch.dtype) -> None:
    x = torch.randn(1300, 6)
    model = adapted(one("Linear").to(dtype), ["0"])
    loss_of(model, x.to(dtype)).backward()
    net = one("Linear").to(dtype).float()
    expected = by_autograd(net, lambda net: loss_of(net, x.to(dtype).float()))["0"]
    assert close(handed_over(model)["0"], expected, 2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_the_output_is_the_base_layers_bit_for_bit_and_the_input_gets_its_gradient() -> None:
    x = torch.randn(3, 7, 6, requires_grad=True)
    y = torch.randn(3, 7, 6).requires_grad_()
    y.data.copy_(x.data)
    model, net = adapted(one("Linear"), ["0"]), one("Linear")
    assert torch.equal(model(x), net(y))
    loss_of(model, x).backward()
    loss_of(net, y).backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_what_follows_may_change_the_output_in_place(kept_whole: None) -> None:
    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))

    x = torch.randn(7, 6)
    expected = by_autograd(net(), lambda net: loss_of(net, x))
    model = adapted(net(), ["0", "2"])
    loss_of(model, x).backward()
    assert all(close(found, expected[name], 1e-5) for name, found in handed_over(model).items())
    assert handed_over(model).keys() == expected.keys()


def test_of_a_layer_used_twice_only_the_last_use_is_seen(kept_whole: None) -> None:
    """Autograd sums over both uses; the start is taken from the use whose gradient comes first."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor, first: Any = None) -> Tensor:
            return self.b(self.a((first or self.a)(x).tanh()))

    x, net = torch.randn(7, 6), Twice()
    first = nn.Linear(6, 6)
    first.load_state_dict(net.a.state_dict())
    last = by_autograd(net, lambda net: loss_of(lambda x: net(x, first), x))["a"]
    model = adapted(Twice(), ["a"])
    loss_of(model, x).backward()
    assert close(handed_over(model)["a"], last, 1e-5)
    assert not close(first.weight.grad + last, last, 0.1)  # type: ignore[operator]


def test_nothing_is_seen_without_gradients_or_in_evaluation_mode_or_once_started(kept_whole: None) -> None:
    x = torch.randn(7, 6)
    model = adapted(one("Linear"), ["0"])
    with torch.no_grad():
        model(x)
    loss_of(model.eval(), x).backward()
    assert handed_over(model) == {}
    model.train()
    with torch.no_grad():
        model.base_model.model[0].tensors("default").fill({"U": torch.ones(5, 2), "V": torch.ones(6, 2)})
    loss_of(model, x).backward()
    assert handed_over(model) == {}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_gives_no_start(bad: float) -> None:
    x = torch.randn(7, 6)
    model = adapted(one("Linear"), ["0"])
    tensors = model.base_model.model[0].tensors("default")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (loss_of(model, x) * bad).backward()
    assert not tensors.from_gradient
    optimizer.step()
    assert not tensors.U.any()
    assert rankwise.status(model).steps_skipped == 1
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()
    assert tensors.U.any()


@pytest.mark.parametrize("exponent", [-100, -40, 16, 60, 100])
def test_a_loss_scale_leaves_the_subspace_as_it_is(exponent: int) -> None:
    x = torch.randn(7, 6)
    starts = []
    for scale in (1.0, 2.0**exponent):
        model = adapted(one("Linear"), ["0"])
        (loss_of(model, x) * scale).backward()
        start = model.base_model.model[0].tensors("default").from_gradient
        starts.append(start["U"] @ start["V"].T)
    assert torch.allclose(starts[0], starts[1], atol=1e-5)


def test_a_sketched_subspace_does_not_depend_on_the_scale_either() -> None:
    G = torch.randn(300, 3) @ torch.randn(3, 320)
    U, V = gradient_subspace(G, 6)
    for scale in (2.0**-100, 2.0**-40, 2.0**100):
        other_U, other_V = gradient_subspace(G * scale, 6)
        assert torch.allclose(U @ V.T, other_U @ other_V.T, atol=1e-4)


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_every_layer_of_a_model(
    kept_whole: None, make: Callable[[], Any], autocast: bool, checkpointing: str | None
) -> None:
    """Linear and Conv1D; bfloat16 autocast, with the backward pass inside it too; both kinds of checkpointing."""
    tokens = torch.randint(0, 100, (8, 12), generator=torch.Generator().manual_seed(7))
    labels = tokens if make is tiny_gpt2 else tokens[:, 0] % 3

    def loss(net: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return net(input_ids=tokens, labels=labels).loss

    def ready(net: Any) -> Any:
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
            net.enable_input_require_grads()
        return net

    expected = by_autograd(ready(make()), loss)
    model = ready(adapted(make()))
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        loss(model).backward()
    found = handed_over(model)
    assert found.keys() == adapted_layers(model).keys()
    for name, gradient in found.items():
        assert close(gradient, expected[name], 3e-2 if autocast else 1e-5), name


def test_of_accumulated_gradients_the_first_micro_batch_counts(kept_whole: None, batch: dict[str, Tensor]) -> None:
    halves = [{key: t.chunk(2)[i] for key, t in batch.items()} for i in range(2)]
    expected = by_autograd(tiny_bert(), lambda net: net(**halves[0]).loss / 2)
    model = adapted(tiny_bert())
    for half in halves:
        (model(**half).loss / 2).backward()
    assert all(close(found, expected[name], 1e-5) for name, found in handed_over(model).items())


def test_one_gradient_lives_at_a_time(monkeypatch: pytest.MonkeyPatch, batch: dict[str, Tensor]) -> None:
    living: list[weakref.ref[Tensor]] = []
    most = []

    def start(self: Deep, size: Any, gradient: Tensor) -> dict[str, Tensor]:
        living.append(weakref.ref(gradient))
        most.append(sum(reference() is not None for reference in living))
        return {"U": torch.ones(size.out, size.r), "V": torch.ones(size.into, size.r)}

    monkeypatch.setattr(Deep, "start_from_gradient", start)
    model = adapted(tiny_bert())
    model(**batch).loss.backward()
    assert most == [1] * len(adapted_layers(model))


# --- the first step -------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def test_a_layer_that_the_loss_does_not_reach_starts_when_it_does() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            return self.a(x) + self.b(x) if both else self.a(x)

    model = adapted(Fork(), ["a", "b"])
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.5)
    a, b = (layer.tensors("default") for layer in adapted_layers(model).values())
    for both, started in ((False, False), (False, False), (True, True)):
        model(torch.randn(5, 6), both).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert a.U.any()
        assert bool(b.U.any()) == started
        assert torch.equal(b.W, 1e-3 * torch.eye(2).repeat(3, 1, 1))
    assert not torch.equal(a.W, b.W)


def test_without_a_gradient_to_start_from_the_error_names_the_batch() -> None:
    model = adapted(one("Linear"), ["0"]).eval()
    loss_of(model, torch.randn(7, 6)).backward()
    with pytest.raises(TrainingError, match=r"gradient of its base weights, .* pass `init_batch`"):
        torch.optim.SGD(trained(model), lr=0.1).step()


@pytest.mark.parametrize("given", [False, True])
def test_a_model_that_is_compiled_from_the_first_step_on_needs_a_batch(given: bool) -> None:
    """A graph that is compiled holds no probe; `init_batch` is run on the model itself, which is not compiled."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(5, 8)

    def loss(net: Any) -> Tensor:
        return (net(x) - 1).square().sum()

    def run(backend: str | None) -> list[Tensor]:
        torch.manual_seed(2)
        model = adapted(copy.deepcopy(net), ["0", "2"], init_batch=loss if given else None)
        seen: Any = torch.compile(model, backend=backend) if backend else model
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for _ in range(3):
            loss(seen).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in trained(model)]

    if given:
        assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(run("aot_eager"), run(None), strict=True))
    else:
        with pytest.raises(TrainingError, match="pass `init_batch`"):
            run("aot_eager")


# --- memory ---------------------------------------------------------------------------------------------------------

OUT, INTO = 300, 1200
GRADIENT = 4 * OUT * INTO
AT_MOST = 1.4
"""Gradients: itself, its absolute values and squares while it is checked and measured, masks and a narrow sketch."""


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, the most of them, and the largest tensor."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        self.now = self.most = self.largest = 0
        self.known = {p.untyped_storage()._cdata for p in before.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most, self.largest = max(self.most, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of_first_step(config: Any, layers: int) -> Live:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList(nn.Linear(INTO, OUT) for _ in range(layers))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.down:
                x = x + layer(x).tanh().repeat(1, INTO // OUT)
            return x

    model: Any = get_peft_model(Chain(), config(r=4, target_modules=r"down\..*"))
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    x = torch.randn(10, INTO)
    with Live(model) as live:
        model.train()(x).square().sum().backward()
        optimizer.step()
    return live


def test_the_first_step_holds_the_gradient_of_one_layer_at_a_time() -> None:
    """Beside what LoRA's holds, however many layers there are; a factor of full width would be four times as large."""
    extra = {}
    for layers in (2, 8):
        deep = peak_of_first_step(rankwise.DeepLoraConfig, layers)
        assert deep.largest <= GRADIENT
        extra[layers] = deep.most - peak_of_first_step(rankwise.LoraConfig, layers).most
    assert 0.5 * GRADIENT < extra[2] < AT_MOST * GRADIENT
    start = 4 * 4 * (OUT + INTO)  # U and V, kept from the backward pass to the step
    assert extra[8] < extra[2] + 6 * 2 * start
