"""Trainer on two processes: the run of one process, also after a kill, and files written once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from cases import CASES
from conftest import tiny_bert
from processes import together
from rankwise.adapters.configs import CONFIGS
from rankwise.compare.checkpoints import newest_complete

STEPS, EVERY = 16, 5
QUICK = ("adalora", "alora", "deep")
"""Of each way in which processes could disagree one: a schedule, scores, a start from data. The others are slow."""
NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
FIELDS: dict[str, dict[str, Any]] = {
    "alora": {
        "rounds": 2,
        "warmup_steps": 6,
        "recovery_steps": 5,
        "prune_per_round": 4,
        "target_modules": ["query", "value"],
    },
    "adalora": {"tinit": 2, "tfinal": 4, "deltaT": 2},
}


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 30, (10,), generator=torch.Generator().manual_seed(i)) + 30 * (i % 3)
        return {"input_ids": tokens, "labels": torch.tensor(i % 3)}


class KillOne(TrainerCallback):
    """The second process dies after a step; the first waits for it in its next exchange, as in life."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def only_the_first_writes(*_: Any, **__: Any) -> None:
    raise AssertionError("the second process saves")


def run(rank: int, name: str, folder: Path, kill: int | None, world: int, optim: str = "sgd") -> None:
    torch.manual_seed(rank)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].fields
    model = get_peft_model(tiny_bert(), CONFIGS[name](**fields | FIELDS.get(name, {})))
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8 // world,
        per_device_eval_batch_size=8,
        learning_rate=5e-2 if optim == "sgd" else 1e-2,
        optim=optim,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        save_steps=EVERY,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_timeout=20,
        average_tokens_across_devices=False,  # it would double the loss of a classifier, which is a mean already
    )
    trainer = Trainer(model, arguments, train_dataset=Examples(), eval_dataset=Examples(), callbacks=[KillOne(kill)])
    assert trainer.args.world_size == world
    if rank:
        model.save_pretrained = only_the_first_writes
    newest = newest_complete(folder, world)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    save_file(get_peft_model_state_dict(model), folder / f"final-{rank}.safetensors")


def finals(folder: Path, count: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"final-{rank}.safetensors") for rank in range(count)]


@NAMES
def test_two_processes_end_as_one_does(name: str, tmp_path: Path) -> None:
    """By SGD, in which a rounding stays one."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert together(run, name, one, None, 1, count=1) == [0]
    assert together(run, name, two, None, 2) == [0, 0]
    (alone,), (first, second) = finals(one, 1), finals(two, 2)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@NAMES
def test_two_processes_go_on_after_a_kill(name: str, tmp_path: Path) -> None:
    """By AdamW, whose moments a checkpoint holds; with an allocation and a round due after it."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert together(run, name, whole, None, 2, "adamw_torch") == [0, 0]
    codes = together(run, name, killed, 12, 2, "adamw_torch")
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert newest_complete(killed, 2) == killed / "checkpoint-10"
    assert together(run, name, killed, None, 2, "adamw_torch") == [0, 0]
    for again, never_killed in zip(finals(killed, 2), finals(whole, 2), strict=True):
        assert all(torch.equal(again[key], never_killed[key]) for key in never_killed)
    (killed / "checkpoint-16" / "rng_state_1.pth").unlink()  # as a process killed on its own leaves it
    assert newest_complete(killed, 2) == killed / "checkpoint-15"
    (killed / "checkpoint-15" / "rng_state_0.pth").write_bytes(b"torn")
    assert newest_complete(killed, 2) == killed / "checkpoint-10"
