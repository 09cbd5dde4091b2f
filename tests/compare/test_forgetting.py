"""What a language model forgets: its loss on general text, as transformers itself computes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_causal_lm import table
from transformers import LlamaForCausalLM

from rankwise.base_models import open_tokenizer
from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec
from rankwise.errors import DataError

pytest_plugins = ["tiny_llama"]

TEXTS = ["it is one two three", "ten nine", "four four four four after it"] * 4


def mean_loss(model: torch.nn.Module, model_folder: str) -> float:
    """transformers' own loss, text by text, weighed by the tokens that each predicts."""
    tokenizer = open_tokenizer(model_folder)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        predicted = ids.shape[1] - 1
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * predicted
        count += predicted
    return total / count


def test_forgetting_is_the_loss_after_training_less_that_before(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    spec = table(tiny_llama, data={"general_text": "general.jsonl"}, methods=["lora", "pretrained"])
    plan = make_plan(parse_spec(spec, tmp_path))
    lora, pretrained = run_plan(plan, "a test")
    base = LlamaForCausalLM.from_pretrained(plan.spec.model).eval()
    before = mean_loss(base, plan.spec.model)
    trained = PeftModel.from_pretrained(base, str(plan.spec.output / str(lora.export))).eval()
    assert lora.forgetting == pytest.approx(mean_loss(trained, plan.spec.model) - before, rel=1e-5)
    assert lora.forgetting is not None
    assert abs(lora.forgetting) > 0.1
    assert pretrained.forgetting == 0.0
    assert "| forgetting |" in (plan.spec.output / "table.md").read_text()


def test_other_text_makes_other_runs_and_a_missing_column_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    digests = []
    spec = table(tiny_llama, data={"general_text": "general.jsonl"})
    for text in TEXTS[:2]:
        (tmp_path / "general.jsonl").write_text(json.dumps({"text": text}) + "\n")
        digests.append(make_plan(parse_spec(spec, tmp_path)).data_digest)
    assert digests[0] != digests[1]
    (tmp_path / "general.jsonl").write_text(json.dumps({"words": "one"}) + "\n")
    with pytest.raises(DataError, match=r"general.jsonl has no column 'text', as `data.general_text` asks"):
        make_plan(parse_spec(spec, tmp_path))
