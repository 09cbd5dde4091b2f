"""Trainer, SFT, DPO and GRPO with gradient accumulation, where micro-batches without any gradient are ordinary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from test_frameworks import words
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import rankwise
from cases import CASES
from conftest import tiny_llama
from rankwise.adapters.configs import CONFIGS
from small import FINAL

STEPS = 12
TOKENS = torch.arange(3, 8)[None]
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "learning_rate": 5e-3,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


class Recorder(TrainerCallback):
    """Looks at the adapter after every optimiser step of the trainer."""

    def __init__(self) -> None:
        self.model: Any = None
        self.steps: list[int] = []
        self.final: int | None = None
        self.kept: dict[str, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        told = rankwise.status(self.model)
        self.steps.append(told.step)
        assert told.step == state.global_step
        if self.final is None and told.final_ranks_due is None:
            self.final, self.kept = state.global_step, told.ranks
        if self.final is not None and told.method in FINAL:
            assert told.ranks == self.kept, "ranks that are final changed"


def config_of(name: str) -> Any:
    """As in a stock script, except for ALoRA's development batch, which preference data does not give."""
    fields = dict(CASES[name].fields)
    if name == "alora":
        fields |= CASES[name].told | {"score_batch": {"input_ids": TOKENS, "labels": TOKENS}}
    return CONFIGS[name](r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)


def by_trainer(name: str, folder: Path, accumulation: int, recorder: Recorder) -> Any:
    """Two of three examples have no label."""
    tokens = torch.randint(3, 100, (48, 8), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[torch.arange(48) % 3 != 0] = -100
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    arguments = TrainingArguments(str(folder), gradient_accumulation_steps=accumulation, seed=1, **COMMON)
    return Trainer(get_peft_model(tiny_llama(), config_of(name)), arguments, train_dataset=rows, callbacks=[recorder])


def by_sft(name: str, folder: Path, accumulation: int, recorder: Recorder) -> Any:
    """Data that was tokenised before: two of three prompts fill the whole length, and no completion is left of them."""
    tokens = torch.randint(3, 8, (48, 6), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    labels[:, :4] = -100
    labels[torch.arange(48) % 3 != 0] = -100
    rows = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    arguments = SFTConfig(
        str(folder),
        gradient_accumulation_steps=accumulation,
        dataset_kwargs={"skip_prepare_dataset": True},
        bf16=False,
        seed=1,
        **COMMON,
    )
    return SFTTrainer(
        tiny_llama(),
        args=arguments,
        train_dataset=rows,
        processing_class=words(),
        peft_config=config_of(name),
        callbacks=[recorder],
    )


def by_dpo(name: str, folder: Path, accumulation: int, recorder: Recorder) -> Any:
    """Of two of three pairs both answers are the same."""
    rejected = [" dog ran" if i % 3 == 0 else " sat" for i in range(48)]
    rows = Dataset.from_dict({"prompt": ["a cat"] * 48, "chosen": [" sat"] * 48, "rejected": rejected})
    arguments = DPOConfig(str(folder), gradient_accumulation_steps=accumulation, bf16=False, seed=1, **COMMON)
    return DPOTrainer(
        tiny_llama(),
        args=arguments,
        train_dataset=rows,
        processing_class=words(),
        peft_config=config_of(name),
        callbacks=[recorder],
    )


def by_grpo(name: str, folder: Path, accumulation: int, recorder: Recorder) -> Any:
    """Groups of two completions, whose rewards are equal where their lengths are."""
    arguments = GRPOConfig(
        str(folder),
        gradient_accumulation_steps=accumulation,
        num_generations=2,
        max_completion_length=3,
        bf16=False,
        seed=1,
        **COMMON | {"per_device_train_batch_size": 2},
    )
    return GRPOTrainer(
        tiny_llama(),
        reward_funcs=lambda completions, **_: [float(len(c) > 8) for c in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"] * 24}),
        processing_class=words(),
        peft_config=config_of(name),
        callbacks=[recorder],
    )


TRAINERS: dict[str, Callable[..., Any]] = {"Trainer": by_trainer, "SFT": by_sft, "DPO": by_dpo, "GRPO": by_grpo}


def cells() -> list[Any]:
    """Every trainer, method and accumulation; what takes long, or shows the same again, is slow."""
    found = []
    for how in TRAINERS:
        for name in CASES:
            for accumulation in (1, 4, 16):
                slow = accumulation != 4 or (how == "GRPO" and name != "adalora")
                marks = [pytest.mark.slow] if slow else []
                found.append(pytest.param(how, name, accumulation, marks=marks, id=f"{how}-{name}-{accumulation}"))
    return found


@pytest.mark.parametrize(("how", "name", "accumulation"), cells())
def test_the_counter_is_the_trainers_and_the_schedule_ends_where_it_says(
    how: str, name: str, accumulation: int, tmp_path: Path
) -> None:
    recorder = Recorder()
    trainer = TRAINERS[how](name, tmp_path, accumulation, recorder)
    recorder.model = trainer.model
    trainer.train()
    told = rankwise.status(trainer.model)
    bad = told.steps_skipped  # without accumulation, a batch that has no label at all has a loss of NaN
    assert bad == 0 or (how == "Trainer" and accumulation == 1)
    assert (told.step, told.rules_run + bad, told.total_step) == (STEPS, STEPS, STEPS)
    assert recorder.steps == list(range(1, STEPS + 1))
    if name in FINAL:
        assert recorder.final is not None
        assert recorder.final == FINAL[name] or bad
