"""Language models in `train` and `compare`: what trains, what is scored, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from rankwise.base_models import open_tokenizer
from rankwise.compare.data import load_splits
from rankwise.compare.failures import FailedRunsError
from rankwise.compare.plan import Plan, make_plan
from rankwise.compare.results import Result
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec
from rankwise.compare.tasks.causal_lm import CausalLm, CausalLmData
from rankwise.errors import ArgumentError, DataError
from tiny_llama import successor

pytest_plugins = ["tiny_llama"]

TRAINING = {"steps": 50, "batch_size": 10, "learning_rate": 3e-2, "warmup": 0.0}

Run = Callable[..., tuple[Plan, list[Result]]]


def table(folder: Path, **changes: Any) -> dict[str, Any]:
    """A SPEC over the questions."""
    whole: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": "out",
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "prompt": "question",
            "response": "answer",
        },
        "task": {"type": "causal_lm", "max_length": 32, "target_modules": ["q_proj", "v_proj", "up_proj"]},
        "training": TRAINING,
        "budget": {"r": 4},
    }
    if "method" not in changes:
        whole["methods"] = ["lora"]
    for key, value in changes.items():
        whole[key] = whole.get(key, {}) | value if isinstance(value, dict) else value
    return whole


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path) -> Run:
    def made(**changes: Any) -> tuple[Plan, list[Result]]:
        plan = make_plan(parse_spec(table(tiny_llama, **changes), tmp_path).with_floor())
        return plan, run_plan(plan, "a test")

    return made


def by_hand(plan: Plan, folder: Path, split: str) -> float:
    """The loss per token of the responses by the exported adapter in stock PEFT, one example at a time."""
    tokenizer = open_tokenizer(plan.spec.model)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(plan.spec.model), str(folder)).eval()
    total, count = 0.0, 0
    for prompt, responses in zip(*(getattr(plan.splits, split)[key] for key in ("prompt", "responses")), strict=True):
        whole = [*prompt, {"role": "assistant", "content": responses[0]}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = torch.tensor([tokenizer.apply_chat_template(whole)["input_ids"]])
        with torch.no_grad():
            told = model(ids).logits[0].log_softmax(-1)
        total -= float(told[start - 1 : -1].gather(1, ids[0, start:, None]).sum())
        count += ids.shape[1] - start
    return total / count


def test_a_language_model_learns_and_is_scored_as_stock_peft_scores_its_export(run: Run) -> None:
    plan, results = run(methods=["lora", "adalora"])
    lora, adalora, floor = (next(r for r in results if r.method == name) for name in ("lora", "adalora", "pretrained"))
    assert (lora.metric, lora.lower_is_better) == ("loss", True)
    assert lora.score < 0.5 < 2 < floor.score
    assert adalora.score < floor.score
    assert lora.head_parameters == 0
    for result in (lora, adalora):
        assert result.export is not None
        for split, told in (("test", result.score), ("validation", result.validation_score)):
            assert by_hand(plan, plan.spec.output / result.export, split) == pytest.approx(told, rel=1e-5)
    assert [row.split("|")[1].strip() for row in (plan.spec.output / "table.md").read_text().splitlines()[2:5]] == [
        *sorted(("lora", "adalora"), key=lambda name: next(r.score for r in results if r.method == name)),
        "pretrained (floor)",
    ]


def test_the_loss_curve_is_that_of_a_plain_script(run: Run, tmp_path: Path) -> None:
    """SFTTrainer with stock PEFT's LoRA: the same start, the same batches, the same losses."""
    plan, results = run(methods=["peft.LoraConfig"])
    set_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(plan.spec.model), config)
    rows = {key: plan.splits.train[key] for key in ("prompt", "responses")}
    completions = [[{"role": "assistant", "content": texts[0]}] for texts in rows["responses"]]
    arguments = SFTConfig(
        str(tmp_path / "plain"),
        max_steps=50,
        per_device_train_batch_size=10,
        learning_rate=3e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        max_length=32,
        completion_only_loss=True,
        save_strategy="no",
        bf16=False,
        seed=0,
    )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"prompt": rows["prompt"], "completion": completions}),
        processing_class=open_tokenizer(plan.spec.model),
    )
    trainer.train()
    theirs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    ours = [loss for _, loss in next(r for r in results if r.method == "peft.LoraConfig").train_loss]
    assert len(ours) == 50
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_answers_are_generated_and_matched(run: Run) -> None:
    _, results = run(
        task={
            "template": "plain",
            "metrics": ["exact_match", "loss"],
            "pattern": "#### (\\S+)",
            "max_new_tokens": 6,
            "max_length": 128,
        },
        data={"prompt": "{question} "},
    )
    lora = next(r for r in results if r.method == "lora")
    assert (lora.metric, lora.lower_is_better) == ("exact_match", False)
    assert lora.score > 0.8
    assert lora.extra_metrics["loss"] < 0.5
    assert next(r for r in results if r.method == "pretrained").score < 0.3


def test_packing_accumulation_and_checkpointing_reach_the_trainer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SFTTrainer] = []
    train = SFTTrainer.train
    monkeypatch.setattr(SFTTrainer, "train", lambda self, *a, **k: (seen.append(self), train(self, *a, **k))[1])
    _, results = run(
        task={"packing": True},
        training={"accumulation": 5, "gradient_checkpointing": True, "precision": "bfloat16", "scheduler": "cosine"},
    )
    (trainer,) = seen
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (2, 5)
    assert (trainer.args.gradient_checkpointing, trainer.args.bf16) == (True, True)
    assert len(trainer.train_dataset) < 41, "several examples share a sequence"
    assert next(r for r in results if r.method == "lora").score < 1


@pytest.mark.parametrize(
    ("template", "beginning", "end"),
    [
        ("plain", "what is 1 + 1?", "what is 1 + 1?"),
        ("instruction", "Below is an instruction", "what is 1 + 1?\n\n### Response: Lets think step by step.\n"),
        ("code", "@@ Instruction\nHere is the given code", "'''\n\n@@ Response\n"),
    ],
)
def test_templates_stand_around_the_prompt(template: str, beginning: str, end: str) -> None:
    text = CausalLm(template=template).plain_prompt([{"role": "user", "content": "what is 1 + 1?"}])  # type: ignore[arg-type]
    assert text.startswith(beginning)
    assert text.endswith(end)
    assert text.count("what is 1 + 1?") == 1


def test_every_right_response_counts() -> None:
    task = CausalLm(metrics=("exact_match",), pattern=r"#### (\S+)")
    answers = ["no #### 1,024 then #### 1,000", "#### 3", "nothing", "#### 5"]
    references = [["#### 1000"], ["#### 2", "#### 3"], ["#### 4"], ["#### 6"]]
    assert task.generated_scores(answers, references) == {"exact_match": 0.5}


def test_bleu_and_rouge_against_the_nearest_reference() -> None:
    task = CausalLm(metrics=("bleu", "rouge_l"))
    right = "the blue spice is a coffee shop in the city centre"
    references = [[right, "something else that is as long as the other one was"], [right]]
    scores = task.generated_scores([right, right], references)
    assert scores == {"bleu": pytest.approx(1.0), "rouge_l": pytest.approx(1.0)}
    # "a b c d" against "a b c e": a common subsequence of 3 of 4 words, so that F1 is 3/4.
    assert task.generated_scores(["a b c d"], [["a b c e"]])["rouge_l"] == pytest.approx(0.75)


@pytest.mark.parametrize(("package", "key"), [("trl", "task.type"), ("sacrebleu", "task.metrics")])
def test_a_package_that_is_not_installed_is_named(package: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    told = f"`{key}` must come with {package} installed: rankwise's extra 'llm' brings it"
    with pytest.raises(ArgumentError, match=told):
        CausalLm(metrics=("bleu",), template="plain").check_packages()


def test_chats_are_read_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "after one"}, {"role": "assistant", "content": "two"}]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"chat": chat}) + "\n") * 12)
    data = CausalLmData(train=tmp_path / "train.jsonl", test=tmp_path / "test.jsonl", messages="chat")
    splits = load_splits(data, CausalLm())
    assert splits.test["prompt"][0] == chat[:1]
    assert splits.test["responses"][0] == ["two"]
    broken = [{"role": "user", "content": "after one"}, {"role": "user", "content": "two"}]
    (tmp_path / "test.jsonl").write_text(json.dumps({"chat": broken}) + "\n")
    with pytest.raises(DataError, match=r"test.jsonl has a chat in row 1 that is no list of .* ending with the assist"):
        load_splits(data, CausalLm())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"data": {"prompt": "qestion"}},
            DataError,
            r"train.jsonl has no column 'qestion', as `data.prompt` asks: .*qu",
        ),
        ({"data": {"prompt": "{qestion} {depth}"}}, DataError, r"has no column 'qestion', as `data.prompt` asks"),
        ({"data": {"messages": "chat"}}, ArgumentError, r"`data.messages` must be given alone, or `data.prompt` and"),
        ({"task": {"pattern": "#### ("}}, ArgumentError, r"`task.pattern` must be a regular expression with one group"),
        ({"task": {"pattern": "####"}}, ArgumentError, r"`task.pattern` must be a regular expression with one group"),
        ({"task": {"pattern": "=> (.*)"}}, ArgumentError, r"`task.pattern` must match a response of .*; found '=> "),
        (
            {"task": {"metrics": ["exact_match"]}},
            ArgumentError,
            r"`task.pattern` must be given, since `task.metrics` has",
        ),
        (
            {"task": {"metrics": ["accuracy"]}},
            ArgumentError,
            r"`task.metrics` must name metrics of the task \(the ne.*accuracy",
        ),
        (
            {"task": {"template": "alpaca"}},
            ArgumentError,
            r"`task.template` must be one of chat, plain, instruction, c",
        ),
        (
            {"training": {"accumulation": 3}},
            ArgumentError,
            r"`training.accumulation` must divide batch_size, 10; found 3",
        ),
        (
            {"methods": ["lora", "head"]},
            ArgumentError,
            r"`methods` must be methods for a task without a head, as causal",
        ),
        (
            {"methods": ["peft.PromptTuningConfig"]},
            ArgumentError,
            r"`methods` must be a config that adds no tokens, since .* token by token; found 'peft.PromptTuningConfig'",
        ),
    ],
)
def test_mistakes_are_told_before_training(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        make_plan(parse_spec(table(tiny_llama, **changes), tmp_path).with_floor())
    assert "\n" not in str(raised.value)


def test_a_model_without_a_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (tiny_llama / "model").iterdir():
        if file.name != "chat_template.jinja":
            (copy / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ArgumentError, match=r"`task.template` must be one of plain, .*, since the model has no chat"):
        make_plan(parse_spec(table(tiny_llama, model=str(copy)), tmp_path))


def test_the_loss_is_finite_and_per_token(run: Run) -> None:
    """A model that has learnt nothing gives about the logarithm of the vocabulary's size."""
    _, results = run(training={"steps": 1, "learning_rate": 1e-9})
    floor = next(r for r in results if r.method == "pretrained")
    lora = next(r for r in results if r.method == "lora")
    assert lora.score == pytest.approx(floor.score, abs=1e-4)
    assert 0.5 * math.log(20) < floor.score < 3 * math.log(20)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_example_without_room_for_its_response_is_refused_before_training(
    split: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL drops such examples without a word, and a score would be of the others."""
    monkeypatch.setattr(SFTTrainer, "train", lambda self, *_, **__: pytest.fail("it trained"))
    rows = successor(20)
    rows[0]["question"] = "after one " * 20
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = parse_spec(table(tiny_llama, data={split: str(tmp_path / "long.jsonl")}), tmp_path)
    with pytest.raises(FailedRunsError, match=r"`task.max_length` must leave room for a response.*1 of \d+ .*found 32"):
        run_plan(make_plan(spec), "a test")
