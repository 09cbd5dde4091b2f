"""DeepSpeed is refused in one sentence, at the latest by its first step, and never trained without rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_kill import Examples
from test_processes import adapted, batch
from transformers import Trainer, TrainingArguments

from cases import CASES
from processes import together
from rankwise.errors import TrainingError

NAMES = pytest.mark.parametrize("name", CASES)
REFUSAL = "ZeRO moves flat partitions of weights"


@NAMES
@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])  # of stages 1 and 2, of stage 3
def test_marked_partitions_are_refused_at_the_first_step(name: str, mark: str) -> None:
    """As ZeRO does it, without DeepSpeed: its optimiser holds copies, and marks what they are of."""
    model = adapted(name, seed=0).train()
    model(**batch(0)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().flatten() for p in trained]).requires_grad_()
    for p in trained:
        setattr(p, mark, flat)
    flat.grad = torch.zeros_like(flat)
    with pytest.raises(TrainingError, match=REFUSAL):
        torch.optim.AdamW([flat], lr=1e-3).step()


@NAMES
def test_a_trainer_told_of_deepspeed_is_refused_before_its_first_step(name: str, tmp_path: Path) -> None:
    model = adapted(name, seed=0)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer.args.deepspeed = {}  # TrainingArguments itself would want DeepSpeed installed
    with pytest.raises(TrainingError, match=REFUSAL):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def settings(stage: int) -> dict[str, Any]:
    adamw = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    return {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "optimizer": adamw}


def by_engine(rank: int, stage: int, said: Path) -> None:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=adapted("nnm", seed=0).train(), config=settings(stage))
    try:
        for step in range(3):
            engine.backward(engine(**batch(step)).loss)
            engine.step()
    except TrainingError as error:
        (said / f"{rank}").write_text(f"{step} {error}")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_of_zero_is_refused_at_its_first_step(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="not in an extra: it is built where it is installed")
    together(by_engine, stage, tmp_path)
    for rank in ("0", "1"):
        step, _, sentence = (tmp_path / rank).read_text().partition(" ")
        assert step == "0"
        assert REFUSAL in sentence


def test_a_trainer_that_runs_deepspeed_is_refused_before_its_first_step(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="not in an extra: it is built where it is installed")
    together(by_trainer, tmp_path, count=2)
    assert REFUSAL in (tmp_path / "said").read_text()


def by_trainer(rank: int, folder: Path) -> None:
    stage = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, deepspeed=stage, use_cpu=True, report_to="none"
    )
    try:
        Trainer(adapted("nnm", seed=0), arguments, train_dataset=Examples()).train()
    except TrainingError as error:
        if rank == 0:
            (folder / "said").write_text(str(error))
