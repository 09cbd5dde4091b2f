"""Ablation scores from recorded blocks and stacked ranks equal two plain forward passes per rank."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from test_frameworks import tiny_t5
from torch import Tensor, nn

import rankwise
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from rankwise.adapters.lookup import adapted_layers
from rankwise.training import development, scoring
from rankwise.training.aside import evaluation, loss_of

Batch = dict[str, Any]
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (tiny_bert, "SEQ_CLS"),
    "gpt2": (tiny_gpt2, "CAUSAL_LM"),
    "llama": (tiny_llama, "CAUSAL_LM"),
    "t5": (tiny_t5, "SEQ_2_SEQ_LM"),
}


def batch_for(task: str, samples: int = 5, padded: bool = True, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 100, (samples, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(4, 10, (samples, 1), generator=generator)
    labels = tokens[:, 0] % 3 if task == "SEQ_CLS" else tokens
    return {"input_ids": tokens, "labels": labels} | ({"attention_mask": mask.long()} if padded else {})


def adapted(model: nn.Module, task: str | None = None, **fields: Any) -> Any:
    torch.manual_seed(4)
    config = rankwise.AloraConfig(
        **{"r": 2, "max_r": 3, "rounds": 0, "target_modules": "all-linear", "init_weights": False, "task_type": task}
        | fields
    )
    return get_peft_model(model, config)


def plain_scores(model: Any, score: Callable[[], float]) -> dict[tuple[str, int], tuple[float, float]]:
    """(S(M without the rank), S(M with it alone)) of every rank in use, by editing B and running the model."""
    layers = adapted_layers(model)
    whole = {name: layer.tensors("default").B.data.clone() for name, layer in layers.items()}
    found = {}

    def put(values: dict[str, Tensor]) -> None:
        for name, layer in layers.items():
            layer.tensors("default").B.data.copy_(values[name])

    for name, layer in layers.items():
        for j in layer.kept("default").nonzero().flatten().tolist():
            without = {key: t.clone() for key, t in whole.items()}
            without[name][:, j] = 0
            alone = {key: torch.zeros_like(t) for key, t in whole.items()}
            alone[name][:, j] = whole[name][:, j]
            put(without)
            first = score()
            put(alone)
            found[name, j] = (first, score())
    put(whole)
    return found


def check(model: Any, found: scoring.Scores, score: Callable[[], float]) -> None:
    model.eval()
    with torch.no_grad():
        plain, whole = plain_scores(model, score), score()
    assert found.whole == pytest.approx(whole, rel=1e-5)
    for i, (name, layer) in enumerate(adapted_layers(model).items()):
        for j, used in enumerate(layer.kept("default").tolist()):
            pair = (float(found.without[i][j]), float(found.alone[i][j]))
            assert pair == pytest.approx(plain[name, j], rel=1e-5, abs=1e-6) if used else np.isnan(pair).all()


def scores_of(model: Any, batch: Any) -> scoring.Scores:
    roster = next(iter(adapted_layers(model).values())).rosters["default"]
    roster.method.score_batch = batch
    return development.ablate(roster)


def replayed(model: Any, batch: Batch) -> bool:
    layers = list(adapted_layers(model).values())
    with evaluation(model):
        return scoring.Replay(model, batch, layers, "default").replayable


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_scores_equal_plain_passes(name: str, padded: bool) -> None:
    make, task = MODELS[name]
    model, batch = adapted(make(), task), batch_for(task, padded=padded)
    assert replayed(model, batch), "the fast way is not taken"
    check(model, scores_of(model, batch), lambda: -float(loss_of(model, batch)))


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_and_small_stacks(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.STACKED_ENTRIES, "cpu", 2 * 9 * samples)
    model, batch = adapted(tiny_bert(), "SEQ_CLS"), batch_for("SEQ_CLS", samples)
    check(model, scores_of(model, batch), lambda: -float(loss_of(model, batch)))


def test_other_active_adapters_stay_on() -> None:
    model, batch = adapted(tiny_llama(), "CAUSAL_LM"), batch_for("CAUSAL_LM")
    torch.manual_seed(5)
    model.add_adapter("other", rankwise.AloraConfig(r=2, rounds=0, target_modules="all-linear", init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    assert replayed(model, batch)
    check(model, scores_of(model, batch), lambda: -float(loss_of(model, batch)))


def test_a_function_of_the_model() -> None:
    model, batch = adapted(tiny_bert(), "SEQ_CLS"), batch_for("SEQ_CLS")

    def score(model: Any) -> Tensor:
        return -model(**batch).logits.square().sum()

    check(model, scores_of(model, score), lambda: float(score(model)))


def test_batches_of_a_trainer_are_averaged_by_size() -> None:
    model = adapted(tiny_bert(), "SEQ_CLS")
    batches = [batch_for("SEQ_CLS", 6, seed=1), batch_for("SEQ_CLS", 2, seed=2)]
    roster = next(iter(adapted_layers(model).values())).rosters["default"]
    roster.development = lambda: batches
    check(
        model,
        development.ablate(roster),
        lambda: -(6 * float(loss_of(model, batches[0])) + 2 * float(loss_of(model, batches[1]))) / 8,
    )


class Output:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Plain(nn.Module):
    """No blocks at all; or one block that is called twice; or a layer that is not called."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(4, 6), nn.Linear(6, 1), kind
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Output:
        h = self.first(x).tanh()
        if self.kind != "none":
            for block in [*self.blocks, *([self.blocks[0]] if self.kind == "twice" else [])]:
                h = block(h)
        return Output((self.last(h).squeeze(-1) - y).square().mean())


@pytest.mark.parametrize(("kind", "fast"), [("none", False), ("twice", False), ("once", True)])
def test_other_models(kind: str, fast: bool) -> None:
    targets = ["first", "last", "unused", "blocks.0.0", "blocks.1.0"]
    model = adapted(Plain(kind), target_modules=targets)
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6)}
    assert replayed(model, batch) is fast
    check(model, scores_of(model, batch), lambda: -float(loss_of(model, batch)))


class Flat(Plain):
    """A block that sees all tokens of all samples in one dimension: gates per sample cannot reach it."""

    def forward(self, x: Tensor, y: Tensor) -> Output:
        h = self.first(x).tanh()
        flat = self.blocks[1](self.blocks[0](h.flatten(0, 1)))
        return Output((self.last(flat.view_as(h)).squeeze(-1) - y).square().mean())


def test_flattened_tokens_are_scored_the_plain_way() -> None:
    model = adapted(Flat("once"), target_modules=["first", "last", "blocks.0.0", "blocks.1.0"])
    batch = {"x": torch.randn(3, 5, 4), "y": torch.randn(3, 5)}
    check(model, scores_of(model, batch), lambda: -float(loss_of(model, batch)))


def test_closed_ranks_are_not_scored() -> None:
    model = adapted(tiny_bert(), "SEQ_CLS")
    for layer in list(adapted_layers(model).values())[::2]:
        tensors = layer.tensors("default")
        tensors.active[0] = False
        tensors.A.data[0], tensors.B.data[:, 0] = 0, 0
    batch = batch_for("SEQ_CLS")
    check(model, scores_of(model, batch), lambda: -float(loss_of(model, batch)))


@pytest.mark.parametrize("broken", [False, True])
def test_scoring_leaves_nothing_behind(broken: bool) -> None:
    """Modes, parameters, gradients, hooks, caches and random states; also where the model's forward raises."""
    model, batch = adapted(tiny_llama(), "CAUSAL_LM"), batch_for("CAUSAL_LM")
    model.train()
    model.base_model.model.model.layers[0].eval()
    model(**batch).loss.backward()
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    state = copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    keys = [sorted(module.__dict__) for module in model.modules()]
    randoms = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if broken:
        with pytest.raises(TypeError):
            scores_of(model, batch | {"nonsense_ids": batch["input_ids"], "labels": 7})
    else:
        scores_of(model, batch)
    assert all(torch.equal(model.state_dict()[key], t) for key, t in state.items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    assert modes == [module.training for module in model.modules()]
    assert keys == [sorted(module.__dict__) for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.use_cache
    assert not any(layer.gates for layer in adapted_layers(model).values())
    assert torch.equal(randoms[0], torch.get_rng_state())
    assert randoms[1] == random.getstate()
    assert (randoms[2] == np.random.get_state()[1]).all()


def test_dropout_is_off_while_scoring() -> None:
    """A model with dropout scores as its twin without any, which no random mask could do."""
    model = adapted(tiny_bert(), "SEQ_CLS", lora_dropout=0.5).train()
    twin = adapted(tiny_bert(), "SEQ_CLS", lora_dropout=0.0).eval()
    twin.load_state_dict(model.state_dict())
    batch = batch_for("SEQ_CLS")
    one, other = scores_of(model, batch), scores_of(twin, batch)
    assert one.whole == other.whole
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one.without, other.without, strict=True))
