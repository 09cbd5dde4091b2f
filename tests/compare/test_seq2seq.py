"""An encoder and a decoder in `train` and `compare`: what trains, what is scored, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from rankwise.compare.plan import Plan, make_plan
from rankwise.compare.results import Result
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec
from rankwise.compare.tasks.seq2seq import Seq2Seq
from rankwise.errors import ArgumentError, DataError

NUMBERS = ["one", "two", "three", "four", "five", "six"]
ZAHLEN = ["eins", "zwei", "drei", "vier", "fünf", "sechs"]
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
MODULES = ["q", "v", "wi", "wo", "q_proj", "v_proj", "fc1", "fc2"]

Run = Callable[..., tuple[Plan, list[Result]]]


def rows(count: int) -> list[dict[str, Any]]:
    """Two numbers in English and in German, where the second one of the German ones comes first."""
    found = []
    for i in range(count):
        first, second = i % 6, (i // 6 + i) % 6
        english = f"{NUMBERS[first]} and {NUMBERS[second]}"
        german = f"{ZAHLEN[second]} und {ZAHLEN[first]}"
        found.append({"english": english, "german": german, "both": [german, "nichts"], "to": "german"})
    return found


def small(kind: str, words: int) -> Any:
    """A T5 or a BART with random weights."""
    ids: Any = {"pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        shape: Any = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        shape |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
        return T5ForConditionalGeneration(T5Config(vocab_size=words, **shape, **ids))
    sides: Any = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in SIDE.items()}
    ids = ids | {"bos_token_id": 3, "decoder_start_token_id": 1, "forced_eos_token_id": 1}
    config = BartConfig(vocab_size=words, d_model=32, max_position_embeddings=32, init_std=0.2, **sides, **ids)
    return BartForConditionalGeneration(config)


SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}


@pytest.fixture(scope="session", params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer (model), and translations (train and test .jsonl)."""
    place = tmp_path_factory.mktemp(request.param)
    words = [*SPECIAL, "translate", "to", ":", "german", "and", "und", "nichts", *NUMBERS, *ZAHLEN]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=32
    )
    fast.save_pretrained(place / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small(request.param, len(words)).save_pretrained(place / "model")
    for name in ("train", "test"):
        lines = [json.dumps(row) + "\n" for row in rows(40)]
        (place / f"{name}.jsonl").write_text("".join(lines))
    return place


def table(folder: Path, **changes: Any) -> dict[str, Any]:
    """A SPEC over the translations."""
    whole: dict[str, Any] = {
        "model": str(folder / "model"),
        "output": "out",
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "input": "translate to {to} : {english}",
            "target": "german",
        },
        "task": {"type": "seq2seq", "max_length": 16, "max_target_length": 8},
        "training": {"steps": 40, "batch_size": 12, "learning_rate": 3e-2, "warmup": 0.0},
        "budget": {"r": 4},
        "methods": ["lora"],
    }
    for key, value in changes.items():
        whole[key] = whole.get(key, {}) | value if isinstance(value, dict) else value
    return whole


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    def made(**changes: Any) -> tuple[Plan, list[Result]]:
        plan = make_plan(parse_spec(table(folder, **changes), tmp_path).with_floor())
        return plan, run_plan(plan, "a test")

    return made


def by_hand(plan: Plan, model: Any) -> tuple[float, list[str]]:
    """The loss per token of the test targets and the greedy answers, one example at a time."""
    tokenizer = AutoTokenizer.from_pretrained(plan.spec.model)
    total, count, answers = 0.0, 0, []
    for row in rows(40):
        source = tokenizer(f"translate to german : {row['english']}", return_tensors="pt")["input_ids"]
        target = tokenizer(row["german"], return_tensors="pt")["input_ids"]
        start = torch.full((1, 1), model.config.decoder_start_token_id)
        decoded = start
        with torch.no_grad():
            logits = model(input_ids=source, decoder_input_ids=torch.cat([start, target[:, :-1]], 1)).logits[0]
            while decoded.shape[1] <= 8 and int(decoded[0, -1]) != (-1 if decoded.shape[1] == 1 else 1):
                told = model(input_ids=source, decoder_input_ids=decoded).logits[0, -1]
                decoded = torch.cat([decoded, told.argmax().view(1, 1)], 1)
        total -= float(logits.log_softmax(-1).gather(1, target[0, :, None]).sum())
        count += target.shape[1]
        answers.append(tokenizer.decode(decoded[0], skip_special_tokens=True))
    return total / count, answers


def test_translations_are_learnt_and_scored_as_stock_peft_scores_them(run: Run) -> None:
    plan, results = run(
        methods=["lora", "adalora"],
        task={"metrics": ["loss", "exact_match", "rouge_l"], "pattern": "^(.+)$", "max_new_tokens": 8},
    )
    lora, adalora, floor = (next(r for r in results if r.method == name) for name in ("lora", "adalora", "pretrained"))
    assert (lora.metric, lora.lower_is_better, lora.task) == ("loss", True, "seq2seq")
    assert lora.score < 1.5 < 2 < floor.score
    assert adalora.score < floor.score
    for result in (floor, lora):
        model: Any = class_of(plan).from_pretrained(plan.spec.model)
        if result.export is not None:
            model = PeftModel.from_pretrained(model, str(plan.spec.output / result.export))
        loss, answers = by_hand(plan, model.eval())
        assert loss == pytest.approx(result.score, rel=1e-4)
        right = sum(answer == row["german"] for answer, row in zip(answers, rows(40), strict=True))
        assert result.extra_metrics["exact_match"] == pytest.approx(right / 40)
    assert lora.extra_metrics["exact_match"] > floor.extra_metrics["exact_match"]
    assert lora.extra_metrics["rouge_l"] > floor.extra_metrics["rouge_l"]


def class_of(plan: Plan) -> Any:
    """The class of the model."""
    kind = json.loads((Path(plan.spec.model) / "config.json").read_text())["model_type"]
    return T5ForConditionalGeneration if kind == "t5" else BartForConditionalGeneration


def test_the_loss_curve_is_that_of_a_plain_script(run: Run, tmp_path: Path) -> None:
    """Seq2SeqTrainer with stock PEFT's LoRA: the same start, the same batches, the same losses."""
    plan, results = run(methods=["peft.LoraConfig"], training={"steps": 10}, task={"target_modules": MODULES})
    set_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=MODULES, task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(class_of(plan).from_pretrained(plan.spec.model), config)
    tokenizer = AutoTokenizer.from_pretrained(plan.spec.model)
    train = plan.splits.train
    tokens = tokenizer(train["prompt"])
    targets = tokenizer([texts[0] for texts in train["responses"]])["input_ids"]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path / "plain"),
        max_steps=10,
        per_device_train_batch_size=12,
        learning_rate=3e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        seed=0,
    )
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({**tokens, "labels": targets}),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    theirs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    ours = [loss for _, loss in next(r for r in results if r.method == "peft.LoraConfig").train_loss]
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"data": {"input": "{englsh}"}},
            DataError,
            r"train.jsonl has no column 'englsh', as `data.input` asks: .*engl",
        ),
        ({"data": {"target": "german2"}}, DataError, r"train.jsonl has no column 'german2', as `data.target` asks"),
        ({"data": {"input": "to {to"}}, ArgumentError, r"`data.input` must be a column, or a text with columns in br"),
        ({"data": {"target": "to"}, "task": {"pattern": "(x)"}}, ArgumentError, r"`task.pattern` must match a respon"),
        ({"task": {"max_length": 33}}, ArgumentError, r"`task.max_length` must be at most the model's positions, 32"),
        ({"task": {"max_target_length": 33}}, ArgumentError, r"`task.max_target_length` must be at most the model's"),
        ({"task": {"metrics": ["rouge"]}}, ArgumentError, r"`task.metrics` must name metrics of the task .*rouge_l"),
        ({"task": {"packing": True}}, ArgumentError, r"`task.packing` must be a known key"),
        ({"methods": ["head"]}, ArgumentError, r"`methods` must be methods for a task without a head, as seq2seq is"),
    ],
)
def test_mistakes_are_told_before_training(
    changes: dict[str, Any], error: type[Exception], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        make_plan(parse_spec(table(folder, **changes), tmp_path).with_floor())
    assert "\n" not in str(raised.value)


def test_a_model_without_a_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in (folder / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ArgumentError, match=r"`model` must be .* that can be trained for seq2seq; found '.*model'$"):
        make_plan(parse_spec(table(folder, model=str(copy)), tmp_path))


def test_several_right_targets_are_all_compared_with() -> None:
    task = Seq2Seq(metrics=("exact_match",), pattern="(.*)")
    assert task.generated_scores(["b", "c"], [["a", "b"], ["a"]]) == {"exact_match": 0.5}
