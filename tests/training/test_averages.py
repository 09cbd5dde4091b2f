"""Weights that are mixed outside of the optimiser's step: pruned ranks stay pruned in what is evaluated and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from schedulefree import AdamWScheduleFree, RAdamScheduleFree, ScheduleFreeWrapper, SGDScheduleFree
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

import rankwise
from cases import CASES, Case
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers
from rankwise.linalg.prox import soft_threshold

Batch = dict[str, Tensor]
ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
PRUNING = pytest.mark.parametrize("name", ["adalora", "sora", "alora", "salora"])
STEPS = 12
FEWER = {"adalora": 52, "sora": 51, "alora": 52, "salora": 30}
"""The most ranks that are left of thirteen modules after `STEPS` steps."""


def adapted(name: str, **own: Any) -> Any:
    torch.manual_seed(2)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone
    if name == "sora":
        fields["sparse_weight"] = 6.0
    return get_peft_model(tiny_bert(), CONFIGS[name](**fields | own)).train()


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: Any, optimizer: Any, batch: Batch, steps: int, after: Callable[[], Any] = lambda: None) -> list[float]:
    losses = []
    for _ in range(steps):
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        losses.append(float(loss.detach()))
    return losses


def held(model: Any) -> dict[str, int]:
    """The ranks that hold anything."""
    return {name: f.kept().r for name, f in rankwise.factors(model).items()}


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"]).logits


def check_pruned(model: Any, name: str, batch: Batch, folder: Path) -> None:
    """What `ranks` says is what is evaluated, saved and exported."""
    ranks = rankwise.ranks(model)
    assert 0 < sum(ranks.values()) <= FEWER[name]
    assert held(model) == ranks
    expected = logits(model, batch)
    model.save_pretrained(str(folder / "saved"))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(folder / "saved"))
    assert rankwise.ranks(loaded) == held(loaded) == ranks
    torch.testing.assert_close(logits(loaded, batch), expected)
    for source in (model, folder / "saved"):
        base = None if source is model else tiny_bert()
        report = rankwise.export_lora(source, folder / "export", layout="compact", base=base, overwrite=True)
        assert report.ranks == {module: rank for module, rank in ranks.items() if rank}
        plain = PeftModel.from_pretrained(tiny_bert(), str(folder / "export"))
        torch.testing.assert_close(logits(plain, batch), expected, rtol=1e-5, atol=1e-5)


# --- schedule-free optimisers ---------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", [AdamWScheduleFree, SGDScheduleFree, RAdamScheduleFree])


@ROWS
@pytest.mark.parametrize("kind", [AdamWScheduleFree, RAdamScheduleFree])
def test_every_method_trains_under_a_schedule_free_optimiser(name: str, case: Case, kind: Any, batch: Batch) -> None:
    model = adapted(name, **({"sparse_weight": 0.1} if name == "sora" else {}))
    optimizer = kind(trained(model), lr=1e-2, weight_decay=0.1)
    optimizer.train()
    losses = train(model, optimizer, batch, 30)
    optimizer.eval()
    with torch.no_grad():
        assert model.eval()(**batch).loss < losses[0] - 0.05
    assert rankwise.status(model).rules_run == 30


@PRUNING
@KINDS
def test_ranks_stay_pruned_in_the_average(name: str, kind: Any, batch: Batch, tmp_path: Path) -> None:
    model = adapted(name)
    optimizer = kind(trained(model), lr=4e-2 if kind is RAdamScheduleFree else 1e-2)  # whose first steps move nothing
    optimizer.train()
    train(model, optimizer, batch, STEPS + 4)
    in_training = rankwise.ranks(model)
    assert held(model) == in_training
    closed = [(p, p == 0) for p in trained(model)]
    optimizer.eval()
    assert rankwise.ranks(model) == in_training
    assert all((p[zero] == 0).all() for p, zero in closed if name != "salora"), "zeros in the parameters themselves"
    check_pruned(model, name, batch, tmp_path)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    rankwise.finalize(model)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items() if not key.endswith("progress"))
    optimizer.train()
    train(model, optimizer, batch, 3)
    if name != "sora":  # whose gates may close at any step
        assert rankwise.ranks(model) == held(model) == in_training


@PRUNING
def test_ranks_stay_pruned_under_the_wrapper(name: str, batch: Batch, tmp_path: Path) -> None:
    """It steps an inner optimiser while the parameters hold the base step, and the state the average."""
    model = adapted(name)
    optimizer = ScheduleFreeWrapper(torch.optim.SGD(trained(model), lr=1e-2), momentum=0.9)
    optimizer.train()
    train(model, optimizer, batch, STEPS + 4)
    assert held(model) == rankwise.ranks(model)
    optimizer.eval()
    check_pruned(model, name, batch, tmp_path)


@PRUNING
def test_trainer_with_a_schedule_free_optimiser(name: str, batch: Batch, tmp_path: Path) -> None:
    model = adapted(name, **({"total_step": None} if name in ("adalora", "salora") else {}))
    rows = [{key: t[i] for key, t in batch.items()} for i in range(8)]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "steps"}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        optim="schedule_free_adamw",
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        eval_steps=3,
        use_cpu=True,
        **quiet,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert held(model) == rankwise.ranks(model)
    trainer.optimizer.eval()  # type: ignore[union-attr]
    check_pruned(model, name, batch, tmp_path)


def test_soras_gates_take_the_base_step_and_equation_10() -> None:
    """g ← T_{η·λ}(g − η·∇L), not averaged and not decayed, so that a closed gate is 0 in evaluation too."""
    torch.manual_seed(5)
    config = rankwise.SoraConfig(r=3, target_modules=["0"], sparse_weight=0.5, init_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).train()
    t = adapted_layers(model)["0"].tensors("default")
    optimizer = SGDScheduleFree(trained(model), lr=0.05, warmup_steps=3, weight_decay=0.1)
    optimizer.train()
    for i in range(6):
        g = t.g.detach().double().clone()
        model(torch.ones(2, 6)).square().mean().backward()
        gradient = t.g.grad.double().clone()
        optimizer.step()
        optimizer.zero_grad()
        rate = 0.05 * min(1.0, (i + 1) / 3)
        expected = soft_threshold(g - rate * gradient, torch.tensor(0.5 * rate))
        torch.testing.assert_close(t.g.detach().double(), expected, rtol=1e-5, atol=1e-6)
    g, A = t.g.detach().clone(), t.A.detach().clone()
    optimizer.eval()
    assert torch.equal(t.g, g)
    assert not torch.equal(t.A, A), "factors are averaged"
    optimizer.train()
    assert torch.equal(t.g, g)


def test_saloras_gates_have_their_own_rate(batch: Batch) -> None:
    model = adapted("salora", gate_lr=0.03, tinit=0, total_step=20)
    optimizer = SGDScheduleFree(trained(model), lr=1e-2)
    optimizer.train()
    gates = [layer.tensors("default").log_theta for layer in adapted_layers(model).values()]
    for layer in adapted_layers(model).values():
        layer.tensors("default").multiplier.fill_(50.0)
    for _ in range(3):
        before = torch.cat([p.detach().double().clone() for p in gates])
        model.train()(**batch).loss.backward()
        optimizer.step()
        gradient = torch.cat([p.grad.double() for p in gates])
        optimizer.zero_grad()
        moved = torch.cat([p.detach().double() for p in gates]) - before
        torch.testing.assert_close(moved, -0.03 * gradient, rtol=1e-3, atol=1e-6)


def test_deep_loras_start_is_the_start_of_every_sequence(batch: Batch) -> None:
    model = adapted("deep")
    optimizer = AdamWScheduleFree(trained(model), lr=1e-2, weight_decay=0.1)
    optimizer.train()
    train(model, optimizer, batch, 1)
    started = {key: t.clone() for key, t in model.state_dict().items() if "rankwise" in key}
    assert any(t.any() for key, t in started.items() if key.endswith(".U"))
    optimizer.eval()
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in started.items())


def test_a_schedule_free_run_resumes_bit_identical(batch: Batch, tmp_path: Path) -> None:
    """Saved in evaluation mode, as the optimiser asks for."""
    for name in ("adalora", "sora", "salora"):
        whole = adapted(name)
        optimizer = AdamWScheduleFree(trained(whole), lr=1e-2)
        optimizer.train()
        train(whole, optimizer, batch, 6)
        optimizer.eval()
        whole.save_pretrained(str(tmp_path / name))
        kept = copy.deepcopy(optimizer.state_dict())
        second: Any = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / name), is_trainable=True)
        again = AdamWScheduleFree(trained(second), lr=1e-2)
        again.load_state_dict(kept)
        for model, own in ((whole, optimizer), (second, again)):
            own.train()
            train(model, own, batch, 6)
        state = {key: t for key, t in second.state_dict().items() if "rankwise" in key}
        assert all(torch.equal(t, whole.state_dict()[key]) for key, t in state.items())


# --- averages of the model, and interpolations ----------------------------------------------------------------------


@PRUNING
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_has_the_ranks_of_the_model(
    name: str, use_buffers: bool, batch: Batch, tmp_path: Path
) -> None:
    model = adapted(name)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=use_buffers)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, optimizer, batch, STEPS + 2, lambda: average.update_parameters(model))
    assert rankwise.ranks(average.module) == rankwise.ranks(model)
    assert rankwise.status(average.module).step == rankwise.status(model).step
    check_pruned(average.module, name, batch, tmp_path)


def lookahead(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Slow weights that follow the fast ones halfway at each second step, outside of any optimiser."""
    slow, count = [p.detach().clone() for p in parameters], 0

    @torch.no_grad()
    def synchronise() -> None:
        nonlocal count
        count += 1
        if count % 2 == 0:
            for p, s in zip(parameters, slow, strict=True):
                s.lerp_(p, 0.5)
                p.copy_(s)

    return synchronise


@PRUNING
def test_lookahead_brings_no_rank_back(name: str, batch: Batch, tmp_path: Path) -> None:
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, optimizer, batch, STEPS + 2, lookahead(trained(model)))
    check_pruned(model, name, batch, tmp_path)


@PRUNING
def test_parameters_of_an_average_put_into_the_model(name: str, batch: Batch, tmp_path: Path) -> None:
    """As an exponential moving average of bare parameters does; `finalize` puts the zeros into them for good."""
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    shadow = [p.detach().clone() for p in trained(model)]

    def follow() -> None:
        for s, p in zip(shadow, trained(model), strict=True):
            s.lerp_(p.detach(), 0.05)

    train(model, optimizer, batch, STEPS + 2, follow)
    ranks = rankwise.ranks(model)
    with torch.no_grad():
        for p, s in zip(trained(model), shadow, strict=True):
            p.copy_(s)
    if name != "salora":
        assert rankwise.ranks(model) == ranks
    check_pruned(model, name, batch, tmp_path)
    evaluated = logits(model, batch)
    rankwise.finalize(model)
    for layer in adapted_layers(model).values():
        tensors = layer.tensors("default")
        bare = layer.methods["default"].factors(tensors.named(), 1.0)  # from the parameters alone
        assert not bare.s[tensors.closed].any() or name == "alora"
        assert not (bare.B[:, tensors.closed] * bare.s[tensors.closed]).any()
    torch.testing.assert_close(logits(model, batch), evaluated)


def test_finalize_opens_a_kept_gate_that_an_average_has_closed(batch: Batch) -> None:
    model = adapted("salora")
    train(model, torch.optim.AdamW(trained(model), lr=1e-2), batch, STEPS)
    ranks = rankwise.ranks(model)
    kept = {name: layer.kept("default") for name, layer in adapted_layers(model).items()}
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.tensors("default").log_theta.fill_(-3.0)  # below where gates close, and above the floor
    assert not any(rankwise.ranks(model).values())
    rankwise.finalize(model)
    assert rankwise.ranks(model) == ranks
    assert all(torch.equal(layer.kept("default"), kept[name]) for name, layer in adapted_layers(model).items())


@pytest.mark.parametrize("name", ["adalora", "salora"])
def test_a_later_step_closes_the_parameters_again(name: str, batch: Batch) -> None:
    model = adapted(name)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    train(model, optimizer, batch, STEPS)
    ranks = rankwise.ranks(model)
    with torch.no_grad():
        for p in trained(model):
            p += 1.0
    train(model, optimizer, batch, 1)
    for module, layer in adapted_layers(model).items():
        method, tensors = layer.methods["default"], layer.tensors("default").named()
        assert int(method.factors(tensors, 1.0).s.count_nonzero()) == ranks[module]


def test_before_the_kept_set_is_final_nothing_is_hidden(batch: Batch) -> None:
    """Triplets outside of an allocation's kept set train on, and are evaluated as they are."""
    model = adapted("adalora", total_step=40, deltaT=8)
    train(model, torch.optim.AdamW(trained(model), lr=1e-2), batch, 20)
    assert sum(rankwise.ranks(model).values()) < sum(held(model).values())
    assert not any(layer.tensors("default").closed.any() for layer in adapted_layers(model).values())
