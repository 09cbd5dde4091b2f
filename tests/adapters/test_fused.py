"""Base layer and update as one function: the plain way's numbers, and the plain way wherever it would not be them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise
from cases import CASES, Case
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from rankwise.adapters import fused, linear
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.fused import fused_linear, worth_adding
from rankwise.adapters.lookup import adapted_layers
from rankwise.update import Factors, Parts

ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}


def draw(*shape: int, gradient: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=gradient)


def written_out(
    x: Tensor, z: Tensor | None, W: Tensor, b: Tensor | None, update: Factors, frozen: Factors | None = None
) -> Tensor:
    y = F.linear(x, W if frozen is None else W + frozen.delta(), b)
    return y + F.linear((x if z is None else z), update.delta())


@contextmanager
def added_to_weight(always: bool) -> Iterator[None]:
    """The update in the weight always, or never."""
    with ExitStack() as stack:
        for module in (fused, linear):
            stack.enter_context(mock.patch.object(module, "worth_adding", return_value=always))
        yield


PLACES = pytest.mark.parametrize("added", [False, True], ids=["beside", "in the weight"])


@PLACES
@pytest.mark.parametrize("r", [3, 17], ids=["narrow", "wide"])
@pytest.mark.parametrize("own_input", [False, True], ids=["x", "dropped"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_values_and_first_and_second_derivatives(
    r: int, own_input: bool, frozen: bool, shape: tuple[int, ...], added: bool
) -> None:
    x, z = draw(*shape, 6, gradient=True), draw(*shape, 6, gradient=True) if own_input else None
    W, b = draw(5, 6), draw(5) if shape else None
    B, s, A = draw(5, r, gradient=True), draw(r, gradient=True), draw(r, 6, gradient=True)
    F0 = Factors(draw(5, 2), draw(2), draw(2, 6)) if frozen else None
    args = [t for t in (x, z, B, s, A) if t is not None]

    def fast(*args: Tensor) -> Tensor:
        x, *rest = args
        return fused_linear(x, rest[0] if own_input else None, W, b, Factors(*rest[own_input:]), F0)

    with added_to_weight(added):
        torch.testing.assert_close(fast(*args), written_out(x, z, W, b, Factors(B, s, A), F0), rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(fast, args)
        assert torch.autograd.gradgradcheck(fast, args)


@PLACES
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("wanted", [wanted for k in range(1, 5) for wanted in combinations(range(4), k)], ids=str)
def test_only_what_is_wanted_gets_a_gradient(added: bool, frozen: bool, wanted: tuple[int, ...]) -> None:
    tensors = [draw(3, 6), draw(5, 2), draw(2), draw(2, 6)]
    W, F0 = draw(5, 6), Factors(draw(5, 2), draw(2), draw(2, 6)) if frozen else None
    for i in wanted:
        tensors[i].requires_grad_()
    found = []
    for way in (fused_linear, written_out):
        x, *update = tensors
        with added_to_weight(added):
            way(x, None, W, None, Factors(*update), F0).square().sum().backward()
        found.append([t.grad for t in tensors])
        for t in tensors:
            t.grad = None
    torch.testing.assert_close(*found)
    assert [g is not None for g in found[0]] == [i in wanted for i in range(4)]


@PLACES
@pytest.mark.parametrize("r", [3, 17], ids=["narrow", "wide"])
@pytest.mark.parametrize("gated", [False, True], ids=["ones", "gated"])
@pytest.mark.parametrize("own_input", [False, True], ids=["x", "dropped"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_scale_and_ranks_without_a_gate_are_multiplied_by_nothing_of_their_own(
    scale: float, frozen: bool, own_input: bool, gated: bool, r: int, added: bool
) -> None:
    x, z = draw(4, 6, gradient=True), draw(4, 6, gradient=True) if own_input else None
    W, b, F0 = draw(5, 6), draw(5), Factors(draw(5, 2), draw(2), draw(2, 6)) if frozen else None
    B, s, A = draw(5, r, gradient=True), draw(r, gradient=True) if gated else None, draw(r, 6, gradient=True)
    args = [t for t in (x, z, B, A, s) if t is not None]

    def fast(*args: Tensor) -> Tensor:
        x, *rest = args
        B, A, *s = rest[own_input:]
        return fused_linear(x, rest[0] if own_input else None, W, b, Parts(B, *s or (None,), A), F0, scale=scale)

    with added_to_weight(added):
        expected = written_out(x, z, W, b, Parts(B, s, A).scaled(scale), F0)
        torch.testing.assert_close(fast(*args), expected, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(fast, args)
        assert torch.autograd.gradgradcheck(fast, args)


def test_an_update_in_the_weight_keeps_the_inputs_alone() -> None:
    kept: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        update = Factors(*(draw(*shape, gradient=True) for shape in ((5, 2), (2,), (2, 6))))
        fused_linear(draw(300, 6), None, draw(5, 6), None, update)
    assert [shape for shape in kept if 300 in shape] == [(300, 6)]


@PLACES
def test_of_a_frozen_part_its_own_tensors_are_kept_and_nothing_made_of_them(added: bool) -> None:
    kept: list[Tensor] = []
    update = Factors(draw(5, 2, gradient=True), draw(2, gradient=True), draw(2, 6, gradient=True))
    part, x, W = Factors(draw(5, 3), draw(3), draw(3, 6)), draw(7, 6, gradient=True), draw(5, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), added_to_weight(added):
        fused_linear(x, None, W, None, update, part)
    given = {t.data_ptr() for t in (x, W, *update, *part)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in given] == ([] if added else [(7, 2)])  # h


def test_no_open_rank_copies_no_weight() -> None:
    update = Factors(draw(5, 0, gradient=True), draw(0), draw(0, 6))
    W = draw(5, 6)
    with mock.patch.object(torch, "addmm") as spy:
        y = fused_linear(x := draw(300, 6), None, W, None, update)
    spy.assert_not_called()
    torch.testing.assert_close(y, F.linear(x, W))


def ways(name: str, case: Case, model: str = "bert", **fields: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model under a method's adapter that is not at its start, and a batch."""
    torch.manual_seed(3)
    base = MODELS[model]()
    shared = {"r": 4, "target_modules": "all-linear", "init_weights": False} | case.alone
    made = get_peft_model(base, CONFIGS[name](**shared | fields)).train()
    ids = torch.randint(1, 100, (6, 10))
    return made, {"input_ids": ids, "labels": ids[:, 0] % 3 if model == "bert" else ids}


def outcome(model: nn.Module, batch: dict[str, Tensor], *, fast: bool) -> dict[str, Tensor]:
    """Logits and gradients, with the fast way or without."""
    model.zero_grad()
    torch.manual_seed(5)
    with mock.patch.object(linear, "plain_weights", linear.plain_weights if fast else lambda _: None):
        output = model(**batch)
        output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": output.logits.detach()}


def assert_same(fast: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float) -> None:
    assert fast.keys() == plain.keys()
    for name, t in plain.items():
        assert (fast[name] - t).double().norm() <= tolerance * t.double().norm() + tolerance * 1e-3, name


@ROWS
@pytest.mark.parametrize("model", MODELS)
@PLACES
def test_every_method_in_double_precision(name: str, case: Case, model: str, added: bool) -> None:
    made, batch = ways(name, case, model)
    made.double()
    with mock.patch.object(linear, "fused_linear", wraps=fused_linear) as spy, added_to_weight(added):
        fast = outcome(made, batch, fast=True)
        assert spy.call_count == len(adapted_layers(made))
    exact = not any(
        slot.exact for layer in adapted_layers(made).values() for slot in layer.tensors("default").slots.values()
    )
    assert_same(fast, outcome(made, batch, fast=False), 1e-12 if exact else 1e-5)  # gates and the like stay float32


def of_layer(
    name: str, case: Case, *, fast: bool, autocast: bool = False, tokens: int = 128, **fields: Any
) -> dict[str, Tensor]:
    """Output and gradients of one layer that is not at its start."""
    torch.manual_seed(4)
    shared = {"r": 4, "target_modules": ["0"], "init_weights": False} | case.alone
    net = get_peft_model(nn.Sequential(nn.Linear(64, 48)), CONFIGS[name](**shared | fields)).train()
    x = torch.randn(2, tokens, 64, requires_grad=True)
    weights = torch.randn(2, tokens, 48)
    patched = mock.patch.object(linear, "plain_weights", linear.plain_weights if fast else lambda _: None)
    with patched, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    (y.float() * weights).sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return found | {"x": x.grad, "y": y.detach()}  # type: ignore[dict-item]


@ROWS
@pytest.mark.parametrize(("dropout", "tokens"), [(0.0, 128), (0.0, 512), (0.5, 512)], ids=["few", "many", "dropped"])
def test_every_method_in_single_precision(name: str, case: Case, dropout: float, tokens: int) -> None:
    fast, plain = (of_layer(name, case, fast=fast, tokens=tokens, lora_dropout=dropout) for fast in (True, False))
    assert_same(fast, plain, 1e-5)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0])
def test_an_update_in_the_weight_is_as_exact_as_one_beside_it(size: float) -> None:
    torch.manual_seed(0)
    x, W, g = draw(512, 64, gradient=True), draw(48, 64), draw(512, 48)
    update = Factors(draw(48, 8, gradient=True), (size * draw(8)).requires_grad_(), draw(8, 64, gradient=True))
    assert worth_adding(x, W, 8, torch.float32, copies=2)

    def outcome(way: Any, dtype: torch.dtype) -> list[Tensor]:
        args = [t.detach().to(dtype).requires_grad_() for t in (x, *update)]
        y = way(args[0], None, W.to(dtype), None, Factors(*args[1:]))
        return [y, *torch.autograd.grad(y, args, g.to(dtype))]

    exact = outcome(written_out, torch.float64)
    fast, plain = (
        [float((f - e).norm() / e.norm()) for f, e in zip(outcome(way, torch.float32), exact, strict=True)]
        for way in (fused_linear, written_out)
    )
    assert all(ours <= 2 * theirs + 1e-8 for ours, theirs in zip(fast, plain, strict=True))


def test_an_update_stays_beside_a_weight_whose_products_round() -> None:
    x, W = torch.randn(128, 8), torch.randn(8, 8)
    assert worth_adding(x, W, 2, torch.float32)
    assert not worth_adding(x, W, 2, torch.bfloat16)
    assert not worth_adding(x[:4], W, 16, torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert not worth_adding(x, W, 2, torch.float32)
        assert worth_adding(x, W, 2, torch.float64)
    finally:
        torch.set_float32_matmul_precision("highest")


@ROWS
def test_every_method_under_autocast(name: str, case: Case) -> None:
    fast, plain, exact = (
        of_layer(name, case, fast=f, autocast=a) for f, a in ((True, True), (False, True), (False, False))
    )
    assert {name: t.dtype for name, t in fast.items()} == {name: t.dtype for name, t in plain.items()}
    for key, t in exact.items():  # as near to single precision as the plain way
        assert (fast[key] - t).norm() <= 1.5 * (plain[key] - t).norm() + 2e-3 * t.norm(), key


@pytest.mark.parametrize("residual", ["offset", "cached"])
@pytest.mark.parametrize("tokens", [1, 256], ids=["few", "many"])
def test_sorsas_residual(residual: str, tokens: int) -> None:
    torch.manual_seed(0)
    net = get_peft_model(
        nn.Sequential(nn.Linear(24, 16)), rankwise.SorsaConfig(r=4, residual=residual, target_modules=["0"])
    ).train()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(tokens, 24, requires_grad=True)
    found = []
    for plain in (False, True):
        with mock.patch.object(linear, "plain_weights", (lambda _: None) if plain else linear.plain_weights):
            y = net(x)
            found.append(
                [y, *torch.autograd.grad(y.square().sum(), [x, *(p for p in net.parameters() if p.requires_grad)])]
            )
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


class Chain(nn.Module):
    """One layer used twice, its output changed in place, recomputed if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            y = self.lin(x)
            y += x
            return self.lin(y.relu_())

        return checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)  # type: ignore[return-value]


def chain() -> tuple[Any, Chain]:
    torch.manual_seed(0)
    net = Chain()
    return get_peft_model(net, rankwise.SoraConfig(r=2, target_modules=["lin"], init_weights=False)).train(), net


@PLACES
@pytest.mark.parametrize("recompute", [False, True])
def test_used_twice_changed_in_place_and_recomputed(recompute: bool, added: bool) -> None:
    model, net = chain()
    net.recompute = recompute
    x = torch.randn(4, 8, requires_grad=True)
    found = []
    for plain in (False, True):
        with mock.patch.object(linear, "plain_weights", (lambda _: None) if plain else linear.plain_weights):
            wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
            with added_to_weight(added):
                found.append(torch.autograd.grad(model(x).square().sum(), wanted))
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def test_torch_func_goes_the_plain_way() -> None:
    model, _ = chain()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(5, 8)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, one in enumerate(x):
        single = torch.func.grad(loss)(parameters, one)
        torch.testing.assert_close({name: g[i] for name, g in each.items()}, single)


def hooked(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 1)


def patched(layer: Any) -> None:
    own = layer.base_layer.forward
    layer.base_layer.forward = lambda x: own(x) + 1


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def another_class(layer: Any) -> None:
    layer.base_layer.__class__ = Shifted


@pytest.mark.parametrize("meddle", [hooked, patched, another_class])
def test_what_somebody_did_to_the_base_layer_still_happens(meddle: Any) -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(6, 4)), rankwise.LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(3, 6)
    before = net(x)
    meddle(next(iter(adapted_layers(net).values())))
    torch.testing.assert_close(net(x), before + 1)


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(6, 4)), rankwise.LoraConfig(r=2, target_modules=["0"]))
    base: Any = next(iter(adapted_layers(net).values())).get_base_layer()
    base.weight.requires_grad_(True)
    net(torch.randn(3, 6)).sum().backward()
    assert base.weight.grad.any()


def test_inputs_of_another_dtype_than_the_parameters_are_added_in_the_wider_one() -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(6, 4)).bfloat16(), rankwise.LoraConfig(r=2, target_modules=["0"]))
    with mock.patch.object(linear, "fused_linear") as spy:
        assert net(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    spy.assert_not_called()


def one_layer(**fields: Any) -> tuple[Any, Any]:
    net = get_peft_model(
        nn.Sequential(nn.Linear(6, 4)),
        rankwise.LoraConfig(**{"r": 2, "target_modules": ["0"], "init_weights": False} | fields),
    )
    return net.train(), next(iter(adapted_layers(net).values()))


def test_replicas_of_data_parallel_hold_their_tensors_as_attributes() -> None:
    _, layer = one_layer()
    tensors = layer.tensors("default")
    replica = tensors._replicate_for_data_parallel()
    replica.A, replica.B = tensors.A.detach(), tensors.B.detach()
    assert torch.equal(replica.named()["A"], tensors.A)


def test_meta_tensors_pass() -> None:
    net, _ = one_layer()
    assert net.to("meta")(torch.zeros(3, 6, device="meta")).shape == (3, 4)


def test_a_backward_pass_within_autocast_has_the_forward_passs_dtypes() -> None:
    for name, config in CONFIGS.items():
        net = get_peft_model(
            nn.Sequential(nn.Linear(6, 4)),
            config(**{"r": 2, "target_modules": ["0"], "init_weights": False} | CASES[name].alone),
        ).train()
        x = torch.randn(5, 6, requires_grad=True)
        found = []
        for enabled in (False, True):
            y = net(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(torch.autograd.grad(y.square().sum(), x)[0])
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_frozen_update_keeps_no_inputs() -> None:
    net, _ = one_layer()
    net.requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    y = net(x * 1)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = net(x * 1)
    assert all(t.shape not in {(3, 6), (3, 2)} for t in kept)
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_float16_goes_the_plain_way() -> None:
    net, _ = one_layer()
    with mock.patch.object(linear, "fused_linear") as spy:
        net.half()(torch.randn(3, 6).half())
    spy.assert_not_called()


def test_a_traced_model_computes_the_same() -> None:
    net, _ = one_layer()
    net.eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), net(x))


def test_forward_mode_derivatives() -> None:
    net, layer = one_layer()
    x, t = torch.randn(3, 6), torch.randn(3, 6)
    with torch.autograd.forward_ad.dual_level():
        y = net(torch.autograd.forward_ad.make_dual(x, t))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, F.linear(t, layer.get_base_layer().weight + layer.get_delta_weight("default")))


def test_a_copy_reads_its_own_mask() -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(12, 10)), rankwise.AloraConfig(r=2, rounds=0, target_modules=["0"]))
    net(torch.randn(1, 12))
    other = copy.deepcopy(net)
    assert next(iter(adapted_layers(other).values())).tensors("default")._prefix is None


def test_no_rows() -> None:
    net = get_peft_model(nn.Sequential(nn.Linear(6, 4)), rankwise.LoraConfig(r=2, target_modules=["0"])).train()
    y = net(torch.zeros(2, 0, 6))
    assert y.shape == (2, 0, 4)
    y.sum().backward()


@pytest.mark.parametrize("places", [[], [7], [0, 1], [0, 5]], ids=str)
def test_closed_ranks_are_not_computed_and_nothing_changes(places: list[int]) -> None:
    net = get_peft_model(
        nn.Sequential(nn.Linear(12, 10)), rankwise.AloraConfig(r=4, rounds=0, target_modules=["0"], init_weights=False)
    )
    layer: Any = next(iter(adapted_layers(net).values()))
    tensors, x = layer.tensors("default"), torch.randn(5, 12)
    net.eval()(x)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[places] = True
    with torch.no_grad():
        tensors.active.copy_(mask)
        tensors.A.copy_(torch.randn(8, 12) * mask[:, None])
        tensors.B.copy_(torch.randn(10, 8) * mask)
    net.train()
    found = []
    for fast in (True, False):
        with mock.patch.object(linear, "plain_weights", linear.plain_weights if fast else lambda _: None):
            y = net(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [tensors.A, tensors.B])])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow)
    with mock.patch.object(linear, "fused_linear", wraps=fused_linear) as spy:
        net(x)
        net.eval()(x)
    assert [call.args[4].r for call in spy.call_args_list] == [max(places, default=-1) + 1, 8]
