"""Convolutions and embeddings keep what linear layers promise, for every method whose update is of LoRA's form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

import rankwise
from cases import CASES, Case
from conftest import tiny_bert, tiny_gpt2
from rankwise.adapters.configs import CONFIGS, AdapterConfig
from rankwise.adapters.layer import AdapterLayer, NotPerSampleError
from rankwise.adapters.lookup import adapted_layers
from rankwise.adapters.tensors import AdapterTensors
from rankwise.errors import ArgumentError
from rankwise.training.aside import loss_of
from rankwise.training.development import ablate
from rankwise.training.scoring import gated, one_by_one

PAD = 3
IDS = torch.arange(60).view(10, 6) % 20
LABELS = torch.arange(10) % 3
LORA_FORM = {name: case for name, case in CASES.items() if not CONFIGS[name].linear_only}
LAYERS = {"strided": "conv", "pointwise": "one", "embedding": "emb"}
ROWS = pytest.mark.parametrize(("name", "case"), LORA_FORM.items(), ids=list(LORA_FORM))
KINDS = pytest.mark.parametrize("target", LAYERS.values(), ids=list(LAYERS))


class Net(nn.Module):
    """An embedding, a convolution with all its options and a 1×1 one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb = nn.Embedding(20, 8, padding_idx=PAD)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.one = nn.Conv2d(6, 5, 1, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.emb(x).reshape(len(x), 3, 4, 4)
        return self.head(self.one(self.conv(image).tanh()).flatten(1))


def score(model: nn.Module) -> float:
    return -float(nn.functional.cross_entropy(model(IDS).float(), LABELS))


def config_of(name: str, targets: Any, **fields: Any) -> AdapterConfig:
    own = LORA_FORM[name].alone | ({"score_batch": score} if name == "alora" else {})
    return CONFIGS[name](**{"r": 4, "target_modules": targets} | own | fields)


def adapted(name: str, *targets: str, **fields: Any) -> Any:
    torch.manual_seed(2)
    return get_peft_model(Net(), config_of(name, list(targets), **fields)).eval()


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(IDS), LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    return losses


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def only_layer(model: nn.Module) -> AdapterLayer:
    (layer,) = adapted_layers(model).values()
    return layer


def tensors_of(model: nn.Module) -> AdapterTensors:
    return only_layer(model).tensors("default")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "rankwise" in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def randomised(layer: nn.Module, **fields: Any) -> tuple[AdapterLayer, Tensor]:
    """A layer with a random LoRA, and its dense update."""
    model = get_peft_model(
        nn.Sequential(layer), rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False, **fields)
    )
    found = only_layer(model).eval()
    return found, found.get_delta_weight("default").detach()


def with_update(root: Any, delta: Tensor) -> Any:
    dense = copy.deepcopy(root)
    dense.weight.data += delta
    return dense


# --- the update -------------------------------------------------------------------------------------------------------


@ROWS
@KINDS
def test_layer_computes_base_plus_dense_update(name: str, case: Case, target: str) -> None:
    model = adapted(name, target, init_weights=False, lora_alpha=12)
    layer, base = only_layer(model), getattr(Net(), target)
    (factors,) = rankwise.factors(model).values()
    delta = layer.get_delta_weight("default").detach()
    assert delta.shape == base.weight.shape
    assert torch.equal(layer.base_weight(), layer.as_matrix(base.weight))
    torch.testing.assert_close(delta, (factors.delta().T if target == "emb" else factors.delta()).reshape(delta.shape))
    x = IDS if target == "emb" else torch.randn(2, base.in_channels, 5, 7)
    torch.testing.assert_close(layer(x), with_update(base, delta)(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x[0]), with_update(base, delta)(x[0]), rtol=1e-5, atol=1e-5)


@ROWS
@KINDS
def test_start_is_the_base_exactly_and_a_random_one_is_not(name: str, case: Case, target: str) -> None:
    base = logits(Net())
    assert torch.equal(logits(adapted(name, target)), base)
    assert (logits(adapted(name, target, init_weights=False)) - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"padding": "same", "dilation": 2},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)},
        {"padding": 1, "padding_mode": "circular", "bias": False},
        {"dilation": (1, 2), "padding_mode": "replicate", "padding": 1},
    ],
)
def test_every_option_of_a_convolution(fields: dict[str, Any]) -> None:
    root = nn.Conv2d(3, 4, (3, 2), **fields)
    layer, delta = randomised(copy.deepcopy(root))
    x = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(layer(x), with_update(root, delta)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])
def test_scaled_embeddings_scale_the_update(kind: Any) -> None:
    root = kind(20, 8, PAD, embed_scale=3.0)
    layer, delta = randomised(copy.deepcopy(root))
    torch.testing.assert_close(layer(IDS), with_update(root, delta)(IDS), rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(IDS), with_update(root, delta)(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["conv", "one"])
def test_dropout_reaches_convolutions_and_not_ids(target: str) -> None:
    model = adapted("lora", target, init_weights=False, lora_dropout=0.5)
    expected = logits(model)
    assert not torch.equal(logits(model.train()), expected)
    model = adapted("lora", "emb", init_weights=False, lora_dropout=0.5)
    expected = logits(model)
    assert torch.equal(logits(model.train()), expected)


@KINDS
def test_half_precision_and_autocast(target: str) -> None:
    model = adapted("lora", target, init_weights=False)
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), expected, rtol=0.1, atol=0.1)


# --- against PEFT's own layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1),
        lambda: nn.Conv2d(3, 6, 1),
        lambda: nn.Embedding(20, 8, padding_idx=PAD),
        lambda: nn.Embedding(20, 8, scale_grad_by_freq=True),
        lambda: nn.Embedding(20, 8, max_norm=0.1),
    ],
    ids=["strided", "pointwise", "padding_idx", "scale_grad_by_freq", "max_norm"],
)
def test_lora_is_pefts_with_the_same_factors(make: Any) -> None:
    """The same output and the same gradients, to rounding."""
    torch.manual_seed(3)
    root = make()
    fields = {"r": 2, "lora_alpha": 5, "target_modules": ["0"]}
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(root)), LoraConfig(**fields, init_lora_weights=False))
    ours = get_peft_model(nn.Sequential(root), rankwise.LoraConfig(**fields, init_weights=False))
    mine: Any = tensors_of(ours)
    A, B = (p for n, p in theirs.named_parameters() if p.requires_grad)
    with torch.no_grad():
        if isinstance(root, nn.Embedding):
            mine.A[:, PAD] = 0  # where PEFT starts, and where padding stays
        A.copy_(mine.A.view_as(A))
        B.copy_(mine.B.view_as(B))
    x = IDS if isinstance(root, nn.Embedding) else torch.randn(2, 3, 7, 7)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    torch.testing.assert_close(mine.A, A.view_as(mine.A))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.A.grad, A.grad.view_as(mine.A), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine.B.grad, B.grad.view_as(mine.B), rtol=1e-4, atol=1e-4)


def test_start_of_a_convolution_is_pefts() -> None:
    torch.manual_seed(4)
    theirs = get_peft_model(nn.Sequential(nn.Conv2d(3, 6, 3)), LoraConfig(r=4, target_modules=["0"]))
    (A, _) = (p for p in theirs.parameters() if p.requires_grad)
    bound = (3 * 3 * 3) ** -0.5
    for start in (A, tensors_of(adapted("lora", "conv")).A):
        assert 0.8 * bound < start.abs().max() <= bound  # type: ignore[union-attr]


# --- training ---------------------------------------------------------------------------------------------------------


@ROWS
@KINDS
def test_training_moves_every_tensor_and_lowers_the_loss(name: str, case: Case, target: str) -> None:
    model = adapted(name, target)
    start = state(model)
    losses = train(model, 12)
    assert min(losses[1:]) < losses[0]
    assert rankwise.status(model).rules_run == 12
    trained = {key for key, slot in tensors_of(model).slots.items() if slot.trained}
    assert trained <= {key.rsplit(".", 1)[1] for key, t in state(model).items() if not torch.equal(t, start[key])}


@ROWS
@KINDS
def test_penalty_gradient_is_the_equations(name: str, case: Case, target: str) -> None:
    model = adapted(name, target, init_weights=False)
    tensors = tensors_of(model)
    optimizer = torch.optim.SGD(tensors.parameters(), lr=1e-3)
    nn.functional.cross_entropy(model.train()(IDS), LABELS).backward()
    plain = {key: p.detach().double().requires_grad_() for key, p in tensors.named_parameters()}
    expected = {key: p.grad.double() for key, p in tensors.named_parameters()}
    if case.penalty:
        case.penalty([plain], 1e-3).backward()
    optimizer.step()
    for key, parameter in tensors.named_parameters():
        total = expected[key] + (0 if plain[key].grad is None else plain[key].grad)
        torch.testing.assert_close(parameter.grad.double(), total, rtol=1e-4, atol=1e-6)


@ROWS
def test_padding_never_has_an_update(name: str, case: Case) -> None:
    model = adapted(name, "emb", "conv")
    train(model, 12)
    layer = adapted_layers(model)["emb"]
    delta = layer.get_delta_weight("default")
    assert not delta[PAD].any()
    assert delta.any(1).sum() == (0 if not layer.kept("default").any() else 19)
    assert torch.equal(layer(torch.tensor([PAD])), layer.base_layer(torch.tensor([PAD])))


@ROWS
def test_all_kinds_at_once_save_load_and_resume(name: str, case: Case, tmp_path: Any) -> None:
    model = adapted(name, "emb", "conv", "one", "head")
    train(model, 9)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert same(state(loaded), state(model))
    assert rankwise.ranks(loaded) == rankwise.ranks(model)
    assert list(rankwise.ranks(model)) == ["emb", "conv", "one", "head"]
    twin = copy.deepcopy(model)
    assert train(twin, 3) == train(model, 3)
    assert same(state(twin), state(model))


def test_parameters_are_counted_as_exported() -> None:
    told = rankwise.status(adapted("lora", "emb", "conv", init_weights=False)).parameters
    assert told.exported == told.final == 4 * (20 + 8) + 4 * (27 + 6)


# --- merging, several adapters ----------------------------------------------------------------------------------------


@ROWS
@KINDS
def test_merging_is_the_same_function_and_unmerging_exact(name: str, case: Case, target: str) -> None:
    model = adapted(name, target, init_weights=False)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.to(torch.bfloat16)
    base = only_layer(model).get_base_layer().weight.clone()  # type: ignore[operator]
    expected = logits(model)
    for _ in range(10):
        model.merge_adapter(safe_merge=True)
        assert not torch.equal(only_layer(model).weight, base)
        model.unmerge_adapter()
    assert torch.equal(only_layer(model).weight, base)
    assert torch.equal(logits(model), expected)


@ROWS
@KINDS
def test_two_adapters_train_apart_and_disabled_is_the_base(name: str, case: Case, target: str) -> None:
    model = adapted(name, target)
    train(model, 3)
    first = logits(model)
    model.add_adapter("other", config_of(name, [target]))
    model.set_adapter("other")
    train(model, 5)
    assert (rankwise.status(model).step, rankwise.status(model, "other").step) == (3, 5)
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(Net()))
    assert not torch.equal(first, second)


def test_merging_a_tied_embedding_leaves_the_output_layer() -> None:
    """GPT-2's output layer shares the embedding's weight: an update of the one is none of the other."""
    for target in ("wte", "lm_head"):
        config = rankwise.LoraConfig(r=2, target_modules=[target], init_weights=False)
        model = get_peft_model(tiny_gpt2(), config).eval()
        base: Any = model.base_model.model
        shared = base.lm_head.weight
        with torch.no_grad():
            expected = model(IDS).logits
            model.merge_adapter()
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
        assert base.lm_head.weight is base.transformer.wte.weight is shared


# --- what is refused --------------------------------------------------------------------------------------------------


class Shifted(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.Conv3d(2, 2, 1), r"name linear layers, Conv1D of transformers, Conv2d or Embedding; found '0: Conv3d'"),
        (nn.Conv2d(4, 4, 3, groups=2), r"name convolutions with groups=1; found '0: groups=2'"),
        (Shifted(4, 4, 3), r"name convolutions that compute what torch's Conv2d does; found '0: Shifted'"),
        (nn.Embedding(4, 3, sparse=True), r"name embeddings with dense gradients; found '0: sparse=True'"),
        (
            OPTLearnedPositionalEmbedding(4, 3),
            r"name embeddings that look up their input .*; found '0: OPTLearnedPositionalEmbedding'",
        ),
    ],
)
def test_layers_that_cannot_be_adapted(layer: nn.Module, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^`target_modules` must {sentence}$"):
        get_peft_model(nn.Sequential(layer), rankwise.LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("name", sorted(CASES.keys() - LORA_FORM.keys()))
@pytest.mark.parametrize(("target", "kind"), [("conv", "Conv2d"), ("emb", "Embedding")])
def test_methods_for_linear_layers_alone(name: str, target: str, kind: str) -> None:
    able = r"\(convolutions and embeddings are for alora, lora, nnm, salora, sora\)"
    sentence = rf"^`target_modules` must name linear layers for {name} {able}; found '{target}: {kind}'$"
    config = CONFIGS[name](r=4, target_modules=[target], **CASES[name].fields)
    with pytest.raises(ArgumentError, match=sentence):
        get_peft_model(Net(), config)


def test_all_linear_means_linear_also_the_second_time() -> None:
    model = adapted("lora", "emb", "conv")
    model.add_adapter("other", rankwise.LoraConfig(target_modules="all-linear"))
    assert list(adapted_layers(model, "other")) == ["head"]


# --- gates, while ranks are scored ------------------------------------------------------------------------------------


@KINDS
def test_gates_per_sample(target: str) -> None:
    model = adapted("alora", target, init_weights=False)
    layer = only_layer(model)
    base: Any = layer.get_base_layer()
    x = IDS if target == "emb" else torch.randn(10, base.in_channels, 5, 5)
    gates = torch.rand(10, layer.tensors("default").size.r)
    with gated([layer], "default", {0: gates}):
        together = layer(x)
    for i in range(10):
        with gated([layer], "default", {0: gates[i]}):
            torch.testing.assert_close(layer(x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-5)
    with gated([layer], "default", {0: None}):
        assert torch.equal(layer(x), layer.base_layer(x))
    with gated([layer], "default", {0: gates[:3]}), pytest.raises(NotPerSampleError, match="3 samples have gates"):
        layer(x)
    with gated([layer], "default", {0: gates[:3]}), pytest.raises(NotPerSampleError):
        layer(x[0])


def test_stacked_scores_are_those_of_single_runs(batch: dict[str, Tensor]) -> None:
    config = rankwise.AloraConfig(
        r=2, target_modules=["word_embeddings", "query"], init_weights=False, rounds=0, score_batch=batch
    )
    model = get_peft_model(tiny_bert(), config).eval()
    layers = list(adapted_layers(model).values())
    kept = [layer.kept("default") for layer in layers]
    with torch.no_grad():
        stacked = ablate(layers[0].rosters["default"])
        plain = one_by_one(lambda: -float(loss_of(model, batch)), layers, "default", kept)
    assert stacked.whole == pytest.approx(plain.whole)
    for found, expected in zip([*stacked.without, *stacked.alone], [*plain.without, *plain.alone], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
