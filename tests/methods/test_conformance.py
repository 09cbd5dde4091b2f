"""Every registered method keeps the promises that make it exchangeable. A new method is one row in `cases.py`."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import rankwise
from cases import CASES, Case
from conftest import tiny_bert, tiny_gpt2
from rankwise.adapters.configs import CONFIGS, AdapterConfig
from rankwise.adapters.lookup import adapted_layers
from rankwise.adapters.tensors import AdapterTensors
from rankwise.methods import METHODS
from rankwise.update import Factors

Batch = dict[str, Tensor]
ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))


def config_of(name: str, case: Case, **fields: Any) -> AdapterConfig:
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    return CONFIGS[name](**shared | case.alone | fields)


def adapted(name: str, case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(tiny_bert(), config_of(name, case, **fields)).eval()


def optimizer_of(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Any:
    return kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2} | options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, steps: int) -> None:
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if "rankwise" in name}


def tensors_of(model: nn.Module) -> list[AdapterTensors]:
    return [layer.rankwise_tensors["default"] for layer in adapted_layers(model).values()]  # type: ignore[misc]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_method_has_a_row_and_a_config() -> None:
    assert CASES.keys() == METHODS.keys() == CONFIGS.keys()


@ROWS
def test_config_survives_json_and_pickle(name: str, case: Case, tmp_path: Any) -> None:
    config = config_of(name, case)
    config.save_pretrained(str(tmp_path))
    read = type(config).from_pretrained(str(tmp_path))
    assert read.to_dict() == config.to_dict()
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert config.method == name


@ROWS
def test_start_leaves_the_model_as_it_was(name: str, case: Case, batch: Batch) -> None:
    base = logits(tiny_bert(), batch)
    difference = (logits(adapted(name, case), batch) - base).abs().max()
    assert difference <= case.start_error * base.abs().max()


@ROWS
def test_random_start_changes_the_model(name: str, case: Case, batch: Batch) -> None:
    base = logits(tiny_bert(), batch)
    assert (logits(adapted(name, case, init_weights=False), batch) - base).abs().max() > 1e-2


@ROWS
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_layer_computes_base_plus_factors(name: str, case: Case, make: Any) -> None:
    model = get_peft_model(make(), config_of(name, case, init_weights=False, lora_alpha=12)).eval()
    for module, layer in adapted_layers(model).items():
        x = torch.randn(5, layer.in_features)
        dense = rankwise.factors(model)[module].delta()
        assert dense.shape == (layer.out_features, layer.in_features)
        expected = layer.base_layer(x) + x @ dense.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        merged = layer.get_delta_weight("default")
        torch.testing.assert_close(merged.T if layer.fan_in_fan_out else merged, dense)


@ROWS
def test_factors_of_a_stack_are_the_stack_of_factors(name: str, case: Case) -> None:
    model = adapted(name, case, init_weights=False)
    layers = [t for t in tensors_of(model) if t.size == tensors_of(model)[0].size]
    method = config_of(name, case)
    stacked = method.factors({key: torch.stack([t.named()[key] for t in layers]) for key in layers[0].slots}, 0.5)
    for i, tensors in enumerate(layers):
        alone = method.factors(tensors.named(), 0.5)
        assert all(torch.equal(part[i], whole) for part, whole in zip(stacked, alone, strict=True))
        assert isinstance(alone, Factors)


@ROWS
def test_penalty_gradient_is_the_equations(name: str, case: Case, batch: Batch) -> None:
    """What the optimiser step adds to the task's gradient is the gradient of λR, taken by autograd in float64."""
    model = adapted(name, case, init_weights=False, **({"importance": "magnitude"} if name == "adalora" else {}))
    with torch.no_grad():
        for parameter in (p for t in tensors_of(model) for p in t.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    optimizer = optimizer_of(model, torch.optim.SGD, lr=1e-3)
    model.train()
    model(**batch).loss.backward()
    before = [{key: p.grad.clone() for key, p in t.named_parameters()} for t in tensors_of(model)]
    plain = [{key: p.detach().double().requires_grad_() for key, p in t.named_parameters()} for t in tensors_of(model)]
    value = case.penalty(plain, 1e-3) if case.penalty else torch.zeros(())
    if case.penalty:
        value.backward()
    optimizer.step()
    for tensors, task, parts in zip(tensors_of(model), before, plain, strict=True):
        for key, parameter in tensors.named_parameters():
            added = parts[key].grad if parts[key].grad is not None else torch.zeros_like(parts[key])
            torch.testing.assert_close(parameter.grad.double(), task[key].double() + added, rtol=1e-4, atol=1e-6)
    told = rankwise.status(model).last_penalty
    assert told == (pytest.approx(value.item(), rel=1e-5) if case.penalty else None)


@ROWS
@pytest.mark.parametrize("accumulation", [2, 4])
def test_penalty_counts_once_however_the_batch_is_cut(name: str, case: Case, batch: Batch, accumulation: int) -> None:
    gradients = []
    for parts in (1, accumulation):
        model = adapted(name, case, init_weights=False)
        optimizer = optimizer_of(model, torch.optim.SGD, lr=1e-3)
        model.train()
        for i in range(parts):
            piece = {key: t.chunk(parts)[i] for key, t in batch.items()}
            (model(**piece).loss / parts).backward()
        optimizer.step()
        gradients.append(torch.cat([p.grad.flatten() for t in tensors_of(model) for p in t.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@ROWS
def test_saved_and_loaded_is_the_same_function_and_state(name: str, case: Case, batch: Batch, tmp_path: Any) -> None:
    model = adapted(name, case)
    train(model, optimizer_of(model), batch, 12)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert same(state(loaded), state(model))
    assert rankwise.ranks(loaded) == rankwise.ranks(model)
    assert rankwise.status(loaded).step == 12


@ROWS
@pytest.mark.parametrize("stop", [1, 5, 9, 11])
def test_resumed_run_ends_bit_identical(name: str, case: Case, batch: Batch, stop: int, tmp_path: Any) -> None:
    whole = adapted(name, case)
    train(whole, optimizer_of(whole, weight_decay=0.1), batch, 12)

    first = adapted(name, case)
    optimizer = optimizer_of(first, weight_decay=0.1)
    train(first, optimizer, batch, stop)
    first.save_pretrained(str(tmp_path))
    kept = io.BytesIO()
    torch.save(optimizer.state_dict(), kept)

    second = PeftModel.from_pretrained(tiny_bert(), str(tmp_path), is_trainable=True)
    for unsaved in {"score_batch", "init_batch"} & case.alone.keys():  # a function is not saved with a config
        setattr(second.peft_config["default"], unsaved, case.alone[unsaved])
    optimizer = optimizer_of(second, weight_decay=0.1)
    optimizer.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    train(second, optimizer, batch, 12 - stop)
    assert same(state(second), state(whole))


@ROWS
def test_unmerging_gives_the_base_back_bit_for_bit(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case, init_weights=False).to(torch.bfloat16)
    base = {key: t.clone() for key, t in model.state_dict().items() if "base_layer" in key}
    adapter = logits(model, batch)
    for _ in range(10):
        model.merge_adapter(safe_merge=True)
        model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[key], t) for key, t in base.items())
    assert torch.equal(logits(model, batch), adapter)


@ROWS
def test_merged_model_computes_the_same(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case, init_weights=False)
    expected = logits(model, batch)
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, rtol=1e-4, atol=1e-4)


@ROWS
def test_disabled_adapter_is_the_base_exactly(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case, init_weights=False)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), logits(tiny_bert(), batch))


@ROWS
def test_two_adapters_train_apart(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    train(model, optimizer_of(model), batch, 3)
    first = logits(model, batch)
    model.add_adapter("other", config_of(name, case))
    model.set_adapter("other")
    train(model, optimizer_of(model), batch, 5)
    assert rankwise.status(model, "other").step == 5
    assert rankwise.status(model).step == 3
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)


@ROWS
def test_two_adapters_at_once_add_up_and_unmerge_to_the_bit(name: str, case: Case) -> None:
    x = torch.arange(24).view(2, 12) % 90
    torch.manual_seed(2)
    fields = {"task_type": "CAUSAL_LM", "init_weights": False}
    model = get_peft_model(tiny_gpt2(), config_of(name, case, **fields)).eval()
    model.add_adapter("other", config_of(name, case, **fields))
    model.base_model.set_adapter(["default", "other"])
    plain, before = tiny_gpt2().eval(), {key: t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        for adapter in ("default", "other"):
            for key, f in rankwise.factors(model, adapter).items():
                plain.get_submodule(key).weight += f.delta().T  # a Conv1D's weight is (in, out)
        both, expected = model(x).logits, plain(x).logits
        scale = float(expected.abs().max())
        assert float((both - expected).abs().max()) <= 1e-4 * scale
        model.merge_adapter()
        assert float((model(x).logits - both).abs().max()) <= 1e-4 * scale
        model.unmerge_adapter()
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


@ROWS
def test_copied_model_trains_like_the_first(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    optimizer = optimizer_of(model)
    train(model, optimizer, batch, 2)
    twin = copy.deepcopy(model)
    frozen = state(model)
    twin_optimizer = optimizer_of(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(twin, twin_optimizer, batch, 8)
    assert same(state(model), frozen)
    train(model, optimizer, batch, 8)
    assert same(state(model), state(twin))
    assert rankwise.status(twin).step == 10


@ROWS
def test_gates_and_counters_are_declared_exact_and_buffers_are_not_trained(name: str, case: Case) -> None:
    """What the other tests ask of exact tensors and of buffers, they ask of those that the method declares."""
    for tensors in tensors_of(adapted(name, case)):
        assert {key for key, slot in tensors.slots.items() if slot.exact} == case.exact
        assert {key for key, slot in tensors.slots.items() if not slot.trained} == case.buffers
        assert tensors.slots.keys() - case.buffers == {key for key, _ in tensors.named_parameters()}


@ROWS
def test_exact_tensors_stay_float32_and_do_not_decay(name: str, case: Case, batch: Batch) -> None:
    """Weight decay alone (no gradient to speak of) shrinks factors; gates and singular values it must leave alone."""
    model = adapted(name, case, init_weights=False)
    model.to(torch.bfloat16)
    exact = [(t, key) for t in tensors_of(model) for key, slot in t.slots.items() if slot.exact]
    assert all(getattr(t, key).dtype == torch.float32 for t, key in exact)
    model = adapted(name, case, init_weights=False, **({"sparse_weight": 0.0} if name == "sora" else {}))
    held = {}
    for kind, options in ((torch.optim.AdamW, {"foreach": True}), (torch.optim.SGD, {}), (torch.optim.Adam, {})):
        for decay in (0.0, 0.5):
            run = copy.deepcopy(model)
            train(run, optimizer_of(run, kind, weight_decay=decay, **options), batch, 1)
            held[decay] = [
                getattr(t, key).detach()
                for t in tensors_of(run)
                for key, slot in t.slots.items()
                if slot.exact and slot.trained
            ]
        for without, decayed in zip(held[0.0], held[0.5], strict=True):
            torch.testing.assert_close(decayed, without, rtol=1e-5, atol=1e-6)


@ROWS
def test_overflow_of_the_loss_scale_changes_nothing(name: str, case: Case, batch: Batch) -> None:
    """A fused optimiser calls its hooks on overflow too, with scaled gradients: METHODS' contract 15 of PEFT."""
    model = adapted(name, case, init_weights=False)
    optimizer = optimizer_of(model, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    train_state = state(model)
    loss = model.train()(**batch).loss * torch.tensor(float("inf"))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    after = state(model)
    changed = [key for key in after if not torch.equal(after[key], train_state[key])]
    assert all(key.endswith("progress") for key in changed)
    told = rankwise.status(model)
    assert (told.step, told.steps_skipped, told.rules_run) == (1, 1, 0)


@ROWS
def test_loss_scale_does_not_change_the_step(name: str, case: Case, batch: Batch) -> None:
    ends = []
    for scale in (1.0, 2.0**10):
        model = adapted(name, case, init_weights=False)
        optimizer = optimizer_of(model, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        for _ in range(3):
            scaler.scale(model.train()(**batch).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for t in tensors_of(model) for p in t.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


@ROWS
def test_bad_gradient_moves_nothing_and_five_in_a_row_stop(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case, init_weights=False)
    optimizer = optimizer_of(model, weight_decay=0.1)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    for attempt in range(1, 6):
        model.train()(**batch).loss.backward()
        tensors_of(model)[1].get_parameter(next(iter(tensors_of(model)[1].slots))).grad[0] = float("nan")
        if attempt == 5:
            with pytest.raises(rankwise.errors.TrainingError, match="NaN or infinite in 5 steps in a row"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[key], t) for key, t in before.items() if not key.endswith("progress"))
    assert rankwise.status(model).steps_skipped == 5


@ROWS
def test_training_moves_every_tensor_and_lowers_the_loss(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    start = state(model)
    with torch.no_grad():
        first = model(**batch).loss
    train(model, optimizer_of(model), batch, 12)
    with torch.no_grad():
        assert model(**batch).loss < first
    trained = {f"{key}" for t in tensors_of(model) for key, slot in t.slots.items() if slot.trained}
    moved = {key.rsplit(".", 1)[1] for key, t in state(model).items() if not torch.equal(t, start[key])}
    assert trained <= moved


@ROWS
def test_closure_runs_the_rules_after_the_backward_pass(name: str, case: Case, batch: Batch) -> None:
    plain, closed = adapted(name, case), adapted(name, case)
    train(plain, optimizer_of(plain), batch, 4)
    optimizer = optimizer_of(closed)
    closed.train()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = closed(**batch).loss
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert same(state(closed), state(plain))


@ROWS
def test_lbfgs_and_split_parameters_are_refused(name: str, case: Case, batch: Batch) -> None:
    model = adapted(name, case)
    with pytest.raises(rankwise.errors.TrainingError, match="LBFGS"):
        optimizer_of(model, torch.optim.LBFGS).step(lambda: model(**batch).loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()(**batch).loss.backward()
    with pytest.raises(rankwise.errors.TrainingError, match="must be in one optimiser"):
        torch.optim.SGD(parameters[:5], lr=0.1).step()


@ROWS
def test_export_is_the_adapter(name: str, case: Case, batch: Batch, tmp_path: Any) -> None:
    model = adapted(name, case)
    train(model, optimizer_of(model), batch, 12)
    for layout in ("uniform", "compact"):
        report = rankwise.export_lora(model, tmp_path / layout, layout=layout)
        plain = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / layout)).eval()
        assert plain.peft_config["default"].peft_type.value == "LORA"
        torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
        assert report.relative_error <= 1e-6
        assert max(report.ranks.values()) <= case.exported_rank
        told = rankwise.status(model).exported_ranks
        assert report.ranks == {name: r for name, r in told.items() if r or layout == "uniform"}
