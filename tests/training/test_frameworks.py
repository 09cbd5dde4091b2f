"""Every method in every everyday loop, on tiny models of real architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import rankwise
from cases import CASES, Case
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.lookup import adapted_layers

ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))


def tiny_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    config = T5Config(
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        vocab_size=100,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


ARCHITECTURES: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (tiny_bert, "SEQ_CLS"),
    "llama": (tiny_llama, "CAUSAL_LM"),
    "gpt2": (tiny_gpt2, "CAUSAL_LM"),
    "t5": (tiny_t5, "SEQ_2_SEQ_LM"),
}


def config_of(name: str, case: Case, task: str) -> Any:
    return CONFIGS[name](**{"r": 4, "target_modules": "all-linear", "task_type": task} | case.alone)


def untold(name: str, case: Case, task: str) -> Any:
    """The config in a stock script: the trainer tells the rest."""
    return CONFIGS[name](**{"r": 4, "target_modules": "all-linear", "task_type": task} | case.fields)


def examples(task: str) -> Dataset:
    tokens = torch.randint(2, 100, (24, 8), generator=torch.Generator().manual_seed(2))
    labels = (tokens[:, 0] % 3).tolist() if task == "SEQ_CLS" else tokens.tolist()
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels})


@ROWS
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_trainer(name: str, case: Case, architecture: str, tmp_path: Path) -> None:
    make, task = ARCHITECTURES[architecture]
    model = get_peft_model(make(), untold(name, case, task))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model=model, args=arguments, train_dataset=examples(task)).train()
    told = rankwise.status(model)
    assert (told.step, told.rules_run, told.steps_skipped, told.total_step) == (12, 12, 0, 12)
    assert (told.last_penalty is not None) == (case.penalty is not None)
    assert rankwise.export_lora(model, tmp_path / "lora").relative_error <= 1e-6


@ROWS
@pytest.mark.parametrize("how", ["plain", "bfloat16", "checkpointing", "reentrant checkpointing", "loss scale"])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_bare_loop(name: str, case: Case, architecture: str, how: str) -> None:
    """Two micro-batches a step: rules run at every step, the loss falls, a penalty is there where there is one."""
    make, task = ARCHITECTURES[architecture]
    model = get_peft_model(make(), config_of(name, case, task)).train()
    if "checkpointing" in how:
        model.gradient_checkpointing_enable({"use_reentrant": how.startswith("reentrant")})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=how == "loss scale")
    rows = examples(task).with_format("torch")[:16]
    losses = []
    for _ in range(12):
        for part in range(2):
            piece = {key: rows[key].chunk(2)[part] for key in ("input_ids", "labels")}
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "bfloat16"):
                loss = model(**piece).loss / 2
            scaler.scale(loss).backward()
        losses.append(loss.item())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    told = rankwise.status(model)
    assert (told.step, told.rules_run, told.steps_skipped) == (12, 12, 0)
    assert losses[-1] < losses[0]
    assert (told.last_penalty is not None) == (case.penalty is not None)


def words() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "cat", "sat", "dog", "ran"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


@ROWS
def test_sft_trainer_keeps_the_penalty(name: str, case: Case, tmp_path: Path) -> None:
    """TRL's fused loss ignores `outputs.loss`; a penalty lives elsewhere and must survive.

    At the first step the task's gradient of A is exactly 0 (B is), so whatever moves A is the penalty.
    """
    config = untold(name, case, "CAUSAL_LM")
    arguments = SFTConfig(
        str(tmp_path), max_steps=12, learning_rate=5e-3, report_to="none", max_length=8, disable_tqdm=True, bf16=False
    )
    trainer = SFTTrainer(
        tiny_llama(),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": ["a cat sat", "a dog ran"] * 16}),
        processing_class=words(),
        peft_config=config,
    )
    trainer.train()
    told = rankwise.status(trainer.model)
    assert (told.step, told.rules_run, told.steps_skipped) == (12, 12, 0)
    assert (told.last_penalty is not None) == (case.penalty is not None)
    if name == "adalora":
        assert sum(told.ranks.values()) == 4 * len(told.ranks)


def test_sft_trainer_moves_a_by_the_penalty_alone_at_its_first_step(tmp_path: Path) -> None:
    moved = {}
    for name in ("lora", "nnm"):
        arguments = SFTConfig(
            str(tmp_path),
            max_steps=1,
            learning_rate=5e-3,
            report_to="none",
            max_length=8,
            disable_tqdm=True,
            bf16=False,
        )
        trainer = SFTTrainer(
            tiny_llama(),
            args=arguments,
            train_dataset=Dataset.from_dict({"text": ["a cat sat"] * 16}),
            processing_class=words(),
            peft_config=config_of(name, CASES[name], "CAUSAL_LM"),
        )
        before = {k: t.clone() for k, t in trainer.model.state_dict().items() if k.endswith("default.A")}
        trainer.train()
        moved[name] = any(not torch.equal(trainer.model.state_dict()[key], t) for key, t in before.items())
    assert moved == {"lora": False, "nnm": True}


def accelerate_run(name: str, case: Case, folder: Path, first: int, last: int) -> dict[str, torch.Tensor]:
    """Steps first … last − 1 of one run of twelve; a run that starts later loads what the earlier one saved."""
    torch.manual_seed(4)
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(tiny_bert().train(), config_of(name, case, "SEQ_CLS"))
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    tokens = torch.randint(0, 100, (12 * 16, 8), generator=torch.Generator().manual_seed(2))
    loader: Any = DataLoader(TensorDataset(tokens, tokens[:, 0] % 3), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if first:
        accelerator.load_state(str(folder))
    for i, (inputs, labels) in enumerate(loader):
        if first <= i < last:
            accelerator.backward(model(input_ids=inputs, labels=labels).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(folder))
    assert rankwise.status(accelerator.unwrap_model(model)).step == last
    return {key: t.clone() for key, t in model.state_dict().items() if "rankwise" in key}


@ROWS
def test_accelerate_saves_and_resumes_bit_identical(name: str, case: Case, tmp_path: Path) -> None:
    whole = accelerate_run(name, case, tmp_path / "whole", 0, 12)
    accelerate_run(name, case, tmp_path / "part", 0, 5)
    resumed = accelerate_run(name, case, tmp_path / "part", 5, 12)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], t) for key, t in resumed.items())


@pytest.mark.slow
@ROWS
def test_compiled_model_trains_the_same(name: str, case: Case, batch: dict[str, torch.Tensor]) -> None:
    """Same numbers to rounding, and no graph break in the adapted layers."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(4)
        config = config_of(name, case, "SEQ_CLS")
        if hasattr(config, "init_batch"):  # a compiled model does not show the gradients of its frozen weights
            config.init_batch = batch
        model = get_peft_model(tiny_bert().train(), config)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(4):
            run(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({key: t.clone() for key, t in model.state_dict().items() if "rankwise" in key})
    for key, t in ends[0].items():
        torch.testing.assert_close(ends[1][key], t, rtol=1e-3, atol=1e-4)
    layer = next(iter(adapted_layers(model).values()))
    torch._dynamo.reset()
    explained = torch._dynamo.explain(layer)(torch.randn(4, layer.in_features))
    assert explained.graph_break_count == 0, explained.break_reasons
