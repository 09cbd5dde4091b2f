"""The config class is the only line to swap: Trainer and a bare loop need no other, or say what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankwise
from cases import CASES, Case
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers
from rankwise.errors import ArgumentError, TrainingError

TARGETS = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}


class Examples(torch.utils.data.Dataset):
    """Forty examples whose label shows in their tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.labels = torch.randint(0, 3, (40,), generator=generator)
        self.tokens = torch.randint(0, 30, (40, 10), generator=generator) + 30 * self.labels[:, None]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def trainer(model: Any, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    defaults = {"max_steps": 20, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "report_to": "none"}
    quiet = {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 5}
    arguments = TrainingArguments(output_dir=str(folder), **defaults | quiet | options)
    return Trainer(model=model, args=arguments, train_dataset=Examples(), callbacks=list(callbacks))


def bare_loop(model: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    examples = Examples()
    for _ in range(steps):
        model(input_ids=examples.tokens, labels=examples.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


SCHEDULED = pytest.mark.parametrize("name", ["adalora", "salora", "alora"])
ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))


def score(model: Any) -> float:
    """A score that any rank may change."""
    examples = Examples()
    return -float(model(input_ids=examples.tokens, labels=examples.labels).loss)


TOLD: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 20},
    "salora": {"total_step": 20},
    "alora": {"rounds": 3, "warmup_steps": 4, "recovery_steps": 3, "score_batch": score},
}
"""What a bare loop of twenty steps says."""


def adapted(name: str, **fields: Any) -> Any:
    return get_peft_model(tiny_bert(), CONFIGS[name](r=4, **fields, **TARGETS))


def check_budget(name: str, model: Any) -> None:
    """AdaLoRA ends at a mean of 4 ranks, ALoRA keeps the 4 it has, SaLoRA half the parameters to within a rank."""
    ranks = rankwise.ranks(model)
    if name == "salora":
        layers = adapted_layers(model)
        costs = {module: layer.in_features + layer.out_features for module, layer in layers.items()}
        kept, budget = sum(ranks[module] * cost for module, cost in costs.items()), 2 * sum(costs.values())
        assert budget - max(costs.values()) < kept <= budget
    else:
        assert sum(ranks.values()) == 4 * len(ranks)
    for module, factors in rankwise.factors(model).items():
        assert factors.kept().r <= ranks[module]


@SCHEDULED
def test_a_stock_trainer_script_meets_the_budget(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    assert set(rankwise.ranks(model).values()) == {6 if name == "adalora" else 4}
    trainer(model, tmp_path).train()
    check_budget(name, model)
    told = rankwise.status(model)
    assert (told.step, told.total_step, told.total_step_source, told.final_ranks_due) == (20, 20, "trainer", None)
    assert len(set(told.ranks.values())) > 1, "no rank moved"


@SCHEDULED
def test_a_bare_loop_that_is_told_meets_the_budget(name: str) -> None:
    model = adapted(name, **TOLD[name])
    bare_loop(model, 20)
    check_budget(name, model)
    assert rankwise.status(model).final_ranks_due is None
    assert rankwise.status(model).total_step_source == ("config" if "total_step" in TOLD[name] else None)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("adalora", {}, r"needs total_step.*AdaLoraConfig\(total_step=1000, …\)"),
        ("salora", {}, r"needs total_step.*SaloraConfig\(total_step=1000, …\)"),
        ("alora", {}, r"needs rounds.*AloraConfig\(rounds=4, warmup_steps=200, recovery_steps=50, …\)"),
        ("alora", TOLD["alora"] | {"score_batch": None}, r"needs score_batch.*AloraConfig\(score_batch=batch, …\)"),
    ],
)
def test_a_bare_loop_that_was_not_told_fails_at_its_first_step(
    name: str, fields: dict[str, Any], sentence: str
) -> None:
    model = adapted(name, **fields)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(TrainingError, match=sentence):
        bare_loop(model, 1)
    assert all(torch.equal(model.state_dict()[key], t) for key, t in before.items())


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("adalora", {"tinit": 15, "tfinal": 5}, r"`tinit \+ tfinal` must be less than total_step \(20\)"),
        ("salora", {"tinit": 15, "tfinal": 5}, r"`tinit \+ tfinal` must be less than total_step \(20\)"),
        ("alora", {"rounds": 4, "warmup_steps": 10, "recovery_steps": 3}, r"`rounds` must .* the run \(20 steps\)"),
    ],
)
def test_a_schedule_that_cannot_fit_fails_before_the_first_step(
    name: str, fields: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    model = adapted(name, **fields)
    with pytest.raises(ArgumentError, match=sentence):
        trainer(model, tmp_path).train()
    assert rankwise.status(model).step == 0


@SCHEDULED
def test_a_finished_schedule_stays_finished(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    trainer(model, tmp_path).train()
    ranks = rankwise.ranks(model)
    with pytest.warns(UserWarning, match="now says 7 steps in all .* the schedule keeps 20"):
        trainer(model, tmp_path, max_steps=7).train()
    assert rankwise.ranks(model) == ranks
    assert rankwise.status(model).step == 27


@pytest.mark.parametrize("name", ["salora", "alora"])
def test_finalize_ends_a_schedule_for_good(name: str) -> None:
    model = adapted(name, **TOLD[name])
    bare_loop(model, 5)
    assert rankwise.status(model).final_ranks_due == {"salora": 14, "alora": 10}[name]
    rankwise.finalize(model)
    check_budget(name, model)
    ranks = rankwise.ranks(model)
    bare_loop(model, 15)
    assert rankwise.ranks(model) == ranks
    assert rankwise.status(model).final_ranks_due is None


def test_a_run_that_ends_early_is_finalized_by_hand(tmp_path: Path) -> None:
    class StopAtSix(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= 6

    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
    trainer(model, tmp_path, StopAtSix()).train()
    assert rankwise.status(model).final_ranks_due == 14
    told = r"final at step 14, at a mean of 4, and training stopped at 6: their mean is 4.54; call rankwise\.finalize"
    with pytest.warns(UserWarning, match=told):
        rankwise.export_lora(model, tmp_path / "early")
    with pytest.warns(UserWarning, match=told):
        model.save_pretrained(str(tmp_path / "saved"))
    rankwise.finalize(model)
    assert sum(rankwise.ranks(model).values()) == 4 * len(rankwise.ranks(model))
    assert rankwise.status(model).final_ranks_due is None
    rankwise.export_lora(model, tmp_path / "finalized")
    ranks = rankwise.ranks(model)
    trainer(model, tmp_path).train()
    assert rankwise.ranks(model) == ranks, "what was finalized stays so"
    for name, factors in rankwise.factors(model).items():
        assert int((factors.s != 0).sum()) <= ranks[name]


@ROWS
def test_stock_resume_is_bit_identical(name: str, case: Case, tmp_path: Path) -> None:
    ends = []
    for stop in (None, 8):
        model = adapted(name, **case.fields)
        folder = tmp_path / str(stop)
        options = {"save_strategy": "steps", "save_steps": 4}

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, stop: Any = stop, **_: Any) -> None:
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(5)
        trainer(model, folder, Stop(), **options).train()
        if stop:
            model = adapted(name, **case.fields)
            trainer(model, folder, **options).train(resume_from_checkpoint=True)
        ends.append({name: t for name, t in model.state_dict().items() if "rankwise" in name})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_metrics_reach_the_trainers_reporters(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
    trainer(model, tmp_path, Reporter()).train()
    ranks = [logs["rankwise/mean_rank"] for logs in seen if "rankwise/mean_rank" in logs]
    assert ranks[0] > ranks[-1] == 4.0
    told = [logs for logs in seen if "loss" in logs]
    names = {"mean_rank", "sparsity", "steps_skipped", "penalty", "budget"}
    assert all({f"rankwise/{name}" for name in names} <= logs.keys() for logs in told)
    assert told[-1]["rankwise/budget"] == 4 * len(rankwise.ranks(model))
    assert told[-1]["rankwise/sparsity"] == pytest.approx(1 / 3)


@ROWS
def test_every_method_reports_its_ranks(name: str, case: Case, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    model = adapted(name, **case.fields)
    trainer(model, tmp_path, Reporter()).train()
    told = [logs for logs in seen if "loss" in logs]
    assert told
    for logs in told:
        assert {"rankwise/mean_rank", "rankwise/sparsity", "rankwise/steps_skipped"} <= logs.keys()
        assert ("rankwise/penalty" in logs) == (case.penalty is not None)
    ranks = rankwise.ranks(model)
    assert told[-1]["rankwise/mean_rank"] == pytest.approx(sum(ranks.values()) / len(ranks))


@ROWS
def test_penalties_stay_out_of_the_reported_loss(name: str, case: Case, batch: dict[str, torch.Tensor]) -> None:
    model = adapted(name, **case.alone).train()
    torch.testing.assert_close(model(**batch).loss, tiny_bert().train()(**batch).loss, rtol=1e-5, atol=1e-6)


def test_an_exception_inside_the_step_gives_held_gates_back() -> None:
    """Gates are shown to the optimiser as zeros when it decays weights; a step that raises must not lose them."""
    model = get_peft_model(tiny_bert(), rankwise.SoraConfig(r=4, **TARGETS))
    gates = {name: t.clone() for name, t in model.state_dict().items() if name.endswith(".g")}

    class Breaks(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> None:
            if self.broken:
                raise RuntimeError("out of memory")
            super().step(closure)

    optimizer = Breaks([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.1)
    examples = Examples()
    model(input_ids=examples.tokens, labels=examples.labels).loss.backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.broken = False
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in gates.items())


def test_other_optimisers_are_left_alone() -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
    other = torch.nn.Linear(3, 3)
    other(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert rankwise.status(model).step == 0


def test_a_dropped_model_is_freed() -> None:
    import gc
    import weakref

    from rankwise.adapters.roster import living_rosters

    gc.collect()
    before = len(living_rosters())
    model = get_peft_model(tiny_bert(), rankwise.LoraConfig(r=4, **TARGETS))
    bare_loop(model, 1)
    gone = weakref.ref(model.get_base_model().bert.pooler.dense)
    assert len(living_rosters()) == before + 1
    del model
    gc.collect()
    assert gone() is None
    assert len(living_rosters()) == before


@pytest.mark.parametrize("name", ["adalora", "salora"])
def test_a_second_adapter_loaded_for_training_continues_its_own_schedule(name: str, tmp_path: Path) -> None:
    model = adapted(name, **TOLD[name])
    bare_loop(model, 8)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path), "late", is_trainable=True)
    bare_loop(loaded, 12)
    told = rankwise.status(loaded, "late")
    assert told.step == 20
    assert told.final_ranks_due is None
