"""TRL's DPO and GRPO: the reference is the policy as it was, and merging for generation leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_frameworks import ROWS, config_of, untold, words
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

import rankwise
from cases import CASES, Case
from conftest import tiny_llama

PAIRS = Dataset.from_dict({"prompt": ["a cat"] * 16, "chosen": [" sat"] * 16, "rejected": [" dog ran"] * 16})
COMMON: dict[str, Any] = {"learning_rate": 5e-3, "report_to": "none", "disable_tqdm": True, "bf16": False}
TOKENS = torch.arange(3, 8)[None]


def trained(name: str, case: Case) -> PeftModel:
    """A policy of some steps, whose update is not its start's."""
    model = get_peft_model(tiny_llama(), config_of(name, case, "CAUSAL_LM")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(12):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def scored(name: str, case: Case) -> Any:
    """As in a stock script; ALoRA needs a batch of its own, since pairs and prompts have no labels."""
    config = untold(name, case, "CAUSAL_LM")
    if name == "alora":
        config.score_batch = {"input_ids": TOKENS, "labels": TOKENS}
    return config


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def dpo(model: Any, folder: Path, **more: Any) -> DPOTrainer:
    arguments = DPOConfig(str(folder), max_steps=12, per_device_train_batch_size=4, **COMMON)
    return DPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=words(), **more)


@ROWS
def test_dpo_from_the_base_model(name: str, case: Case, tmp_path: Path) -> None:
    """Without a reference adapter the base model is the reference, which is what every start computes."""
    trainer = dpo(tiny_llama(), tmp_path, peft_config=scored(name, case))
    trainer.train()
    told = rankwise.status(trainer.model)
    assert (told.step, told.rules_run, told.steps_skipped) == (12, 12, 0)
    assert trainer.state.log_history[0]["loss"] < 0.6932


@ROWS
def test_dpo_from_a_trained_adapter(name: str, case: Case, tmp_path: Path) -> None:
    """The reference is the trained policy, and stays it while the policy moves on."""
    policy = trained(name, case)
    before = logits(policy)
    assert not torch.allclose(before, logits(tiny_llama()), atol=1e-3)
    trainer = dpo(policy, tmp_path)
    policy.set_adapter("ref")
    torch.testing.assert_close(logits(policy), before, rtol=1e-5, atol=1e-5)
    policy.set_adapter("default")
    trainer.train()
    policy.set_adapter("ref")
    torch.testing.assert_close(logits(policy), before, rtol=1e-5, atol=1e-5)
    assert rankwise.status(policy, "default").step == 24
    assert rankwise.status(policy, "ref").step == 0


@pytest.mark.slow
@ROWS
def test_grpo(name: str, case: Case, tmp_path: Path) -> None:
    arguments = GRPOConfig(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        beta=0.1,
        **COMMON,
    )
    trainer = GRPOTrainer(
        tiny_llama(),
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a cat", "a dog"] * 8}),
        processing_class=words(),
        peft_config=scored(name, case),
    )
    trainer.train()
    told = rankwise.status(trainer.model)
    assert (told.step, told.rules_run) == (12, 12)


@ROWS
def test_merging_for_generation_leaves_nothing_behind(name: str, case: Case) -> None:
    """What trainers with a generation engine do before every round of sampling."""
    model = trained(name, case)
    before, weights = logits(model), {key: t.clone() for key, t in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    after = model.state_dict()
    assert weights.keys() == after.keys()
    assert all(torch.equal(after[key], t) for key, t in weights.items())


def test_data_that_cannot_be_scored_is_an_error_at_the_first_step(tmp_path: Path) -> None:
    trainer = dpo(tiny_llama(), tmp_path, peft_config=untold("alora", CASES["alora"], "CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"`score_batch` must give a model output with \.loss"):
        trainer.train()
    assert trainer.state.global_step == 0
