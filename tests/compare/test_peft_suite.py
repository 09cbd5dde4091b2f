"""Results for PEFT's own comparison suite: every key that its table reads, and values that are those of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_results import made

from rankwise.base_models import open_tokenizer
from rankwise.compare.peft_suite import suite_record, write_suite
from rankwise.compare.plan import make_plan
from rankwise.compare.results import write_result
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import read_spec
from rankwise.errors import DataError
from tiny_comparison import WriteSpec

pytest_plugins = ["tiny_comparison"]

VERSIONS = dict.fromkeys(("peft", "transformers", "datasets", "torch"), "1.0")


def read_as_the_suite_does(record: dict[str, Any]) -> dict[str, Any]:
    """The columns of the suite's table for language tasks, each by the key that its processing.py reads."""
    run, train, meta = record["run_info"], record["train_info"], record["meta_info"]
    assert train["status"] == "success", "the suite leaves out everything else"
    last = train["metrics"][-1]
    return {
        "experiment_name": run["experiment_name"],
        "model_id": run["train_config"]["model_id"],
        "peft_type": run["peft_config"]["peft_type"] if run["peft_config"] else "full-finetuning",
        "peft_branch": run["peft_branch"],
        "total_time": run["total_time"],
        "created_at": run["created_at"],
        "memory": [train[f"accelerator_memory_{name}"] for name in ("reserved_avg", "max", "reserved_99th")],
        "train_time": train["train_time"],
        "file_size": train["file_size"],
        "num_trainable_params": train["num_trainable_params"],
        "train_loss": last["train loss"],
        "train_samples": last["train samples"],
        "test_accuracy": last["test accuracy"],
        "train_total_tokens": last["train total tokens"],
        "forgetting": last.get("forgetting"),
        "versions": [
            meta["package_info"][f"{name}-version"]
            for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
        ],
        "system_info": meta["system_info"],
    }


def test_the_suite_finds_every_column(tmp_path: Path) -> None:
    result = made(seed=3, forgetting=0.5, seconds=20.0, peak_memory=9, versions=VERSIONS)
    write_result(result, tmp_path / "results" / "lora--0.json")
    adapter = tmp_path / "adapters" / "lora--0"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 123)
    (file,) = write_suite(tmp_path, tmp_path / "suite")
    found = read_as_the_suite_does(json.loads(file.read_text()))
    assert found == {
        "experiment_name": "lora/lora--seed3",
        "model_id": "tiny-encoder",
        "peft_type": "LORA",
        "peft_branch": "",
        "total_time": 20.0,
        "created_at": "2026-01-01T00:00:00+00:00",
        "memory": [9, 9, 9],
        "train_time": 0.8,
        "file_size": 123,
        "num_trainable_params": 420,
        "train_loss": 1.0,
        "train_samples": 8,
        "test_accuracy": 0.8,
        "train_total_tokens": 64,
        "forgetting": 0.5,
        "versions": ["1.0", "1.0", "1.0", "1.0", ""],
        "system_info": {"machine": "2 cores"},
    }


def test_rates_that_a_search_did_not_take_are_left_out(tmp_path: Path) -> None:
    for rate, on_validation in ((1e-3, 0.5), (3e-3, 0.75), (1e-2, 0.6)):
        tried = made(learning_rate=rate, validation_score=on_validation, versions=VERSIONS)
        write_result(tried, tmp_path / "results" / f"lora--{rate}.json")
    other_seed = made(learning_rate=3e-3, seed=1, versions=VERSIONS)
    write_result(other_seed, tmp_path / "results" / "lora--seed1.json")
    written = write_suite(tmp_path, tmp_path / "suite")
    assert sorted(file.name for file in written) == ["lora--0.003.json", "lora--seed1.json"]


def test_full_fine_tuning_has_no_config() -> None:
    assert read_as_the_suite_does(suite_record(made("full", versions=VERSIONS), 0))["peft_type"] == "full-finetuning"


def test_an_accuracy_that_does_not_rank_will_do_and_none_is_refused() -> None:
    generated = made(metric="loss", score=2.0, extra_metrics={"exact_match": 0.25}, versions=VERSIONS)
    assert read_as_the_suite_does(suite_record(generated, 0))["test_accuracy"] == 0.25
    with pytest.raises(DataError, match="lora must be scored by accuracy or exact_match; found spearman"):
        suite_record(made(metric="spearman", extra_metrics={}), 0)


def test_tokens_are_counted_without_padding(write_spec: WriteSpec, tmp_path: Path) -> None:
    plan = make_plan(read_spec(write_spec(tmp_path, training={"steps": None, "epochs": 1.0})))
    (result,) = run_plan(plan, "a test")
    tokenizer = open_tokenizer(plan.spec.model)
    assert result.train_tokens == sum(len(ids) for ids in tokenizer(plan.splits.train["text"])["input_ids"])
