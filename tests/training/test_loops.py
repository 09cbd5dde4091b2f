"""The config class is the only line to swap: Trainer and a bare loop need no other, or say what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import rankwise
from conftest import tiny_bert
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


def test_a_stock_trainer_script_prunes_adalora_to_its_target(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
    assert set(rankwise.ranks(model).values()) == {6}
    trainer(model, tmp_path).train()
    ranks = rankwise.ranks(model)
    assert sum(ranks.values()) == 4 * len(ranks)
    told = rankwise.status(model)
    assert (told.step, told.total_step, told.total_step_source, told.final_ranks_due) == (20, 20, "trainer", None)
    for name, factors in rankwise.factors(model).items():
        assert int((factors.s != 0).sum()) <= ranks[name]


def test_a_bare_loop_prunes_adalora_when_told_total_step() -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, total_step=20, **TARGETS))
    bare_loop(model, 20)
    assert sum(rankwise.ranks(model).values()) == 4 * len(rankwise.ranks(model))
    assert rankwise.status(model).total_step_source == "config"


def test_a_bare_loop_that_was_not_told_fails_at_its_first_step() -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
    with pytest.raises(TrainingError, match=r"needs total_step.*AdaLoraConfig\(total_step=1000, …\)"):
        bare_loop(model, 1)


def test_a_schedule_that_cannot_fit_fails_before_the_first_step(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, tinit=15, tfinal=5, **TARGETS))
    with pytest.raises(ArgumentError, match=r"`tinit \+ tfinal` must be less than total_step \(20\)"):
        trainer(model, tmp_path).train()
    assert rankwise.status(model).step == 0


def test_a_finished_schedule_stays_finished(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
    trainer(model, tmp_path).train()
    ranks = rankwise.ranks(model)
    with pytest.warns(UserWarning, match="now says 7 steps in all .* the schedule keeps 20"):
        trainer(model, tmp_path, max_steps=7).train()
    assert rankwise.ranks(model) == ranks
    assert rankwise.status(model).step == 27


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


def test_stock_resume_is_bit_identical(tmp_path: Path) -> None:
    ends = []
    for stop in (None, 8):
        model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
        folder = tmp_path / str(stop)
        options = {"save_strategy": "steps", "save_steps": 4}

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, stop: Any = stop, **_: Any) -> None:
                control.should_training_stop = state.global_step == stop

        torch.manual_seed(5)
        trainer(model, folder, Stop(), **options).train()
        if stop:
            model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, **TARGETS))
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


def test_penalties_stay_out_of_the_reported_loss(tmp_path: Path, batch: dict[str, torch.Tensor]) -> None:
    model = get_peft_model(tiny_bert(), rankwise.NnmLoraConfig(r=4, **TARGETS)).train()
    torch.testing.assert_close(model(**batch).loss, tiny_bert().train()(**batch).loss)


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


def test_a_second_adapter_loaded_for_training_continues_its_own_schedule(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.AdaLoraConfig(r=4, total_step=20, **TARGETS))
    bare_loop(model, 8)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path), "late", is_trainable=True)
    bare_loop(loaded, 12)
    told = rankwise.status(loaded, "late")
    assert told.step == 20
    assert sum(told.ranks.values()) == 4 * len(told.ranks)
