"""Multiple choice by likelihood: the right option is learnt, and likelihoods are those of stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BertForMultipleChoice, LlamaForCausalLM

from rankwise.base_models import open_tokenizer
from rankwise.compare.data import load_splits
from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec
from rankwise.compare.tasks.multiple_choice import MultipleChoice, MultipleChoiceData
from rankwise.errors import ArgumentError, DataError
from tiny_comparison import FILLERS, WORDS, write_rows

pytest_plugins = ["tiny_comparison", "tiny_llama"]


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


# --- by a head -------------------------------------------------------------------------------------------------------


def head_table(tiny: Path, folder: Path, **task: Any) -> dict[str, Any]:
    """A SPEC over questions for the tiny BERT: which of three words is food."""
    for name, count in (("train", 60), ("test", 30)):
        rows = []
        for i in range(count):
            right = (i // 2) % 3
            words = [WORDS["colour"][i % 2], WORDS["music"][i % 2]]
            words.insert(right, WORDS["food"][i % 2])
            rows.append({"topic": FILLERS[i % 2], "words": words, "right": right})
        write_rows(folder / f"{name}.jsonl", rows)
    return {
        "model": str(tiny / "model"),
        "output": "out",
        "data": {"train": "train.jsonl", "test": "test.jsonl"}
        | {"prompt": "{topic}", "choices": "words", "answer": "right"},
        "task": {"type": "multiple_choice", "max_length": 16} | task,
        "training": {"steps": 20, "batch_size": 12, "learning_rate": 2e-2, "head_learning_rate": 2e-2, "warmup": 0.0},
        "budget": {"r": 4},
        "methods": ["lora", "adalora"],
    }


def test_an_encoder_chooses_by_its_head(tiny: Path, tmp_path: Path) -> None:
    """The floor is the head alone, and scores are those of the export in stock PEFT."""
    plan = make_plan(parse_spec(head_table(tiny, tmp_path), tmp_path).with_floor())
    results = {result.method: result for result in run_plan(plan, "a test")}
    assert set(results) == {"lora", "adalora", "head"}
    assert {result.task for result in results.values()} == {"multiple_choice by head"}
    assert {result.head_parameters for result in results.values()} == {32 + 1}
    assert results["lora"].score > 0.8
    tokenizer, test = open_tokenizer(plan.spec.model), plan.splits.test
    for method in ("lora", "adalora"):
        export = results[method].export
        assert export is not None
        base = BertForMultipleChoice.from_pretrained(plan.spec.model)
        model = PeftModel.from_pretrained(base, str(plan.spec.output / export)).eval()
        losses, right = [], 0
        for prompt, words, answer in zip(test["prompt"], test["choices"], test["answer"], strict=True):
            tokens = tokenizer([prompt[0]["content"]] * 3, words, padding=True, return_tensors="pt")
            with torch.no_grad():
                told = model(**{name: t[None] for name, t in tokens.items()}).logits[0].log_softmax(-1)
            losses.append(-float(told[answer]))
            right += int(told.argmax()) == answer
        assert results[method].score == pytest.approx(right / len(test))
        assert results[method].extra_metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_who_chooses_follows_the_model_or_the_spec(tiny: Path, tiny_llama: Path) -> None:
    bert, llama = str(tiny / "model"), str(tiny_llama / "model")
    assert MultipleChoice().for_model(bert).title == "multiple_choice by head"
    assert MultipleChoice(by="likelihood").for_model(bert).opens_as == "CAUSAL_LM"
    assert MultipleChoice().for_model(llama).title == "multiple_choice by likelihood per token"
    assert MultipleChoice(normalise="nothing").for_model(llama).title == "multiple_choice by likelihood"
    assert MultipleChoice().for_model(bert).for_model(bert).title == "multiple_choice by head"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"normalise": "tokens"}, r"^`task.normalise` must be left out where a head chooses .*; found 'tokens'$"),
        ({"packing": True}, r"^`task.packing` must be left out where a head chooses"),
        ({"by": "heads"}, r"^`task.by` must be likelihood or head; found 'heads'$"),
        ({"metrics": ["f1"]}, r"^`task.metrics` must name metrics of the task"),
    ],
)
def test_what_a_head_does_not_know(task: dict[str, Any], message: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_plan(parse_spec(head_table(tiny, tmp_path, **task), tmp_path))


def test_a_head_forgets_no_text(tiny: Path, tmp_path: Path) -> None:
    spec = head_table(tiny, tmp_path)
    spec["data"]["general_text"] = "text.jsonl"
    with pytest.raises(ArgumentError, match=r"^`data.general_text` must be left out where a head chooses"):
        make_plan(parse_spec(spec, tmp_path))


def test_a_model_without_a_multiple_choice_head(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^`model` must be .* that can be trained for multiple_choice; found"):
        make_plan(parse_spec(table(tiny_llama, by="head"), tmp_path))


def test_a_head_needs_the_same_number_of_choices(tiny: Path, tmp_path: Path) -> None:
    spec = head_table(tiny, tmp_path)
    write_rows(tmp_path / "test.jsonl", [{"topic": "low", "words": ["red", "milk"], "right": 0}])
    with pytest.raises(DataError, match=r"test.jsonl has 2 choices in row 1 where the first row of .* has 3: a head"):
        make_plan(parse_spec(spec, tmp_path))
