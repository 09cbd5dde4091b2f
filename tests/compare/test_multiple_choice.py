"""Multiple choice by likelihood: the right option is learnt, and likelihoods are those of stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from rankwise.base_models import open_tokenizer
from rankwise.compare.data import load_splits
from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec
from rankwise.compare.tasks.multiple_choice import MultipleChoice, MultipleChoiceData
from rankwise.errors import DataError

pytest_plugins = ["tiny_llama"]


def table(folder: Path, **task: Any) -> dict[str, Any]:
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return {
        "model": str(folder / "model"),
        "output": "out",
        "data": files | {"prompt": "question", "choices": "choices", "answer": "right"},
        "task": {"type": "multiple_choice", "max_length": 32, "target_modules": ["q_proj", "v_proj", "up_proj"]} | task,
        "training": {"steps": 50, "batch_size": 10, "learning_rate": 3e-2, "warmup": 0.0},
        "budget": {"r": 4},
        "methods": ["lora"],
    }


def chosen_by_hand(model: Any, tokenizer: Any, prompt: list[dict[str, str]], options: list[str], by: str) -> int:
    """The place of the most likely option, by one forward pass each."""
    likelihoods = []
    for option in options:
        whole = [*prompt, {"role": "assistant", "content": option}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = torch.tensor([tokenizer.apply_chat_template(whole)["input_ids"]])
        with torch.no_grad():
            told = model(ids).logits[0].log_softmax(-1)
        sum_of_logs = float(told[start - 1 : -1].gather(1, ids[0, start:, None]).sum())
        length = {"tokens": ids.shape[1] - start, "characters": len(option), "nothing": 1}[by]
        likelihoods.append(sum_of_logs / length)
    return likelihoods.index(max(likelihoods))


@pytest.mark.parametrize("normalise", ["tokens", "characters", "nothing"])
def test_the_right_option_is_learnt_and_chosen_as_stock_peft_would(
    normalise: str, tiny_llama: Path, tmp_path: Path
) -> None:
    plan = make_plan(parse_spec(table(tiny_llama, normalise=normalise), tmp_path).with_floor())
    results = {result.method: result for result in run_plan(plan, "a test")}
    assert results["lora"].metric == "accuracy"
    assert results["lora"].score > 0.9 > results["pretrained"].score
    assert results["lora"].extra_metrics["loss"] < results["pretrained"].extra_metrics["loss"]
    tokenizer, test = open_tokenizer(plan.spec.model), plan.splits.test
    bare = LlamaForCausalLM.from_pretrained(plan.spec.model).eval()
    for method in ("pretrained", "lora"):
        export = results[method].export
        model = bare if export is None else PeftModel.from_pretrained(bare, str(plan.spec.output / export)).eval()
        chosen = [
            chosen_by_hand(model, tokenizer, prompt, options, normalise)
            for prompt, options in zip(test["prompt"], test["choices"], strict=True)
        ]
        right = sum(place == answer for place, answer in zip(chosen, test["answer"], strict=True))
        assert results[method].score == pytest.approx(right / len(test))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            '{"question": "a", "choices": ["one"], "right": 0}',
            r"test.jsonl has choices in row 1 that are no list",
        ),
        (
            '{"question": "a", "choices": "one", "right": 0}',
            r"has choices in row 1 that are no list",
        ),
        (
            '{"question": "a", "choices": ["one", "two"], "right": 2}',
            r"has an answer in row 1 that is none of 0",
        ),
        (
            '{"question": "a", "choices": ["one", "two"], "right": "B"}',
            r"has an answer in row 1 that is none of",
        ),
    ],
)
def test_rows_that_make_no_question(row: str, message: str, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(row + "\n")
    files = {"train": tiny_llama / "train.jsonl", "test": tmp_path / "test.jsonl"}
    data = MultipleChoiceData(**files, prompt="question", choices="choices", answer="right")
    with pytest.raises(DataError, match=message):
        load_splits(data, MultipleChoice())
