"""A process killed at any step, or while it saves, and resumed with the stock Trainer ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import rankwise
from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.compare.checkpoints import newest_complete
from rankwise.errors import TrainingError

STEPS, EVERY, KILLS = 60, 7, 4
POINTS = [
    pytest.param(name, step, marks=[pytest.mark.slow] if k else [])
    for i, name in enumerate(CASES)
    for k, step in enumerate(random.Random(i).sample(range(EVERY, STEPS), KILLS))
]
FORK = multiprocessing.get_context("fork")


class Examples(torch.utils.data.Dataset):
    """Forty-eight examples whose label shows in their tokens."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(0, 30, (10,), generator=generator) + 30 * (i % 3)
        return {"input_ids": tokens, "labels": torch.tensor(i % 3)}


class KillAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(name: str, folder: Path, kill: int | None = None, adapter: str = "default") -> Trainer:
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].fields
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), CONFIGS[name](**fields), adapter_name=adapter)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        weight_decay=0.1,
        save_steps=EVERY,
        logging_steps=20,
        report_to="none",
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=Examples(), callbacks=[KillAt(kill)])


def run(name: str, folder: Path, kill: int | None, resume: bool | str) -> None:
    """What the child process does: train, and leave the final adapter."""
    torch.set_num_threads(1)
    training = trainer(name, folder, kill)
    training.train(resume_from_checkpoint=resume or None)
    training.model.save_pretrained(str(folder / "final"))


def child(*arguments: Any, target: Any = run) -> int | None:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The uninterrupted run's final adapter, per method."""
    made: dict[str, dict[str, torch.Tensor]] = {}

    def of(name: str) -> dict[str, torch.Tensor]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            assert child(name, folder, None, False) == 0
            made[name] = final(folder)
        return made[name]

    return of


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("name", "step"), POINTS)
def test_killed_at_a_random_step(name: str, step: int, whole: Any, tmp_path: Path) -> None:
    assert child(name, tmp_path, step, False) == -signal.SIGKILL
    assert not (tmp_path / "final").exists()
    assert child(name, tmp_path, None, True) == 0
    assert same(final(tmp_path), whole(name))


def run_and_die_while_saving(name: str, folder: Path) -> None:
    """Killed between the adapter and the trainer's state of the second checkpoint."""
    saved = TrainerState.save_to_json
    count = [0]

    def save(self: TrainerState, path: str) -> None:
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        saved(self, path)

    TrainerState.save_to_json = save  # type: ignore[method-assign]  in a process of its own
    run(name, folder, None, False)


@pytest.mark.parametrize("name", list(CASES))
def test_killed_while_saving(name: str, whole: Any, tmp_path: Path) -> None:
    assert child(name, tmp_path, target=run_and_die_while_saving) == -signal.SIGKILL
    complete = newest_complete(tmp_path)
    assert complete == tmp_path / f"checkpoint-{EVERY}"
    assert (tmp_path / f"checkpoint-{2 * EVERY}").is_dir()
    with pytest.raises(FileNotFoundError):
        trainer(name, tmp_path).train(resume_from_checkpoint=True)  # the stock search takes the broken one, loudly
    assert child(name, tmp_path, None, str(complete)) == 0
    assert same(final(tmp_path), whole(name))


@pytest.mark.parametrize(
    "name",
    [name if name in ("adalora", "sora", "deep") else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_checkpoint_of_another_adapter(name: str, tmp_path: Path) -> None:
    """`default` resumes into any name; another name into `default` would silently start afresh, so it is refused."""
    trainer(name, tmp_path / "default", None).train()
    ends = []
    for adapter in ("default", "other"):
        resumed = trainer(name, tmp_path / "default", None, adapter)
        resumed.train(resume_from_checkpoint=str(tmp_path / "default" / "checkpoint-56"))
        assert rankwise.status(resumed.model, adapter).step == STEPS
        ends.append({key.replace(f".{adapter}.", "."): t for key, t in resumed.model.state_dict().items()})
    assert same(*ends)
    trainer(name, tmp_path / "named", None, "other").train()
    with pytest.raises(TrainingError, match="did not hold adapter 'default', which is still at step 0"):
        trainer(name, tmp_path / "named").train(resume_from_checkpoint=str(tmp_path / "named" / "checkpoint-56"))


def test_newest_complete_skips_what_is_broken(tmp_path: Path) -> None:
    assert newest_complete(tmp_path) is None
    trainer("lora", tmp_path).train()
    last, before = tmp_path / f"checkpoint-{STEPS}", tmp_path / "checkpoint-56"
    assert newest_complete(tmp_path) == last
    (last / "trainer_state.json").write_text('{"global_step": 6')
    assert newest_complete(tmp_path) == before
    tensors = before / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-49"
    (tmp_path / "checkpoint-49" / "optimizer.pt").unlink()
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-42"
    assert json.loads((tmp_path / "checkpoint-42" / "trainer_state.json").read_text())["global_step"] == 42
