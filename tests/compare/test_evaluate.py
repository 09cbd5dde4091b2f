"""Scoring a saved adapter: the scores of the run that made it, and one sentence for what does not fit."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from peft import LoraConfig, get_peft_model
from test_causal_lm import table

from rankwise.compare.evaluate import evaluate_adapter
from rankwise.compare.models import open_for
from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec, read_spec
from rankwise.errors import ArgumentError
from tiny_comparison import WriteSpec

pytest_plugins = ["tiny_comparison", "tiny_llama"]


def test_a_language_models_adapters_score_as_their_runs_did(tiny_llama: Path, tmp_path: Path) -> None:
    method = [{"name": "adalora"}, {"name": "peft.LoraConfig"}]
    plan = make_plan(parse_spec(table(tiny_llama, method=method, training={"steps": 10}), tmp_path))
    for result in run_plan(plan, "a test"):
        for adapter in (plan.spec.output / "adapters").glob(f"{result.method}--*"):
            scores = evaluate_adapter(adapter, plan.spec)
            assert scores["test"]["loss"] == pytest.approx(result.score, rel=1e-6)
            assert scores["validation"]["loss"] == pytest.approx(result.validation_score, rel=1e-6)


def test_an_adalora_of_stock_peft_scores_as_its_run_did(write_spec: WriteSpec, tmp_path: Path) -> None:
    plan = make_plan(read_spec(write_spec(tmp_path, method=[{"name": "peft.AdaLoraConfig", "tinit": 2, "tfinal": 4}])))
    (result,) = run_plan(plan, "a test")
    (adapter,) = (plan.spec.output / "adapters").iterdir()
    assert evaluate_adapter(adapter, plan.spec)["test"][result.metric] == pytest.approx(result.score, rel=1e-6)


def test_answers_that_have_no_room_are_not_dropped(tiny_llama: Path, tmp_path: Path) -> None:
    plan = make_plan(parse_spec(table(tiny_llama, method=[{"name": "lora"}], training={"steps": 1}), tmp_path))
    run_plan(plan, "a test")
    (adapter,) = (plan.spec.output / "adapters").iterdir()
    shorter = parse_spec(table(tiny_llama, method=[{"name": "lora"}], task={"max_length": 4}), tmp_path)
    with pytest.raises(ArgumentError, match=r"`task.max_length` must leave room for a response in every example"):
        evaluate_adapter(adapter, shorter)


def test_what_does_not_fit_is_one_sentence(write_spec: WriteSpec, tmp_path: Path) -> None:
    spec = read_spec(write_spec(tmp_path, methods=["lora"]))
    with pytest.raises(ArgumentError, match=r"`ADAPTER` must be a folder with adapter_config\.json"):
        evaluate_adapter(tmp_path, spec)
    plan = make_plan(spec)
    model = open_for(spec.task, spec.model, plan.splits)
    headless = get_peft_model(model, LoraConfig(target_modules=["query"]))
    headless.save_pretrained(tmp_path / "headless")
    with pytest.raises(ArgumentError, match=r"hold the head of a classification task \(classifier or score\)"):
        evaluate_adapter(tmp_path / "headless", spec)
    # A head for two labels on data with three.
    model.config.num_labels = 2
    two = type(model)(model.config)
    with_head = get_peft_model(two, LoraConfig(target_modules=["query"], task_type=peft.TaskType.SEQ_CLS))
    with_head.save_pretrained(tmp_path / "two")
    with pytest.raises(ArgumentError, match="fit the SPEC's model and labels"):
        evaluate_adapter(tmp_path / "two", spec)
