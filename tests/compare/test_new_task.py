"""The seam: a kind of task is one class and one row of the registry, and everything else finds it there."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from transformers import Trainer

from rankwise.cli.spec import starting_spec
from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.sections import Text
from rankwise.compare.spec import parse_spec, schema
from rankwise.compare.tables import Table
from rankwise.compare.tasks import TASKS, Data, Examples, Splits, Task
from rankwise.compare.tasks.base import DataSection
from tiny_comparison import WriteSpec

pytest_plugins = ["tiny_comparison"]

TAGS = ["outside", "colour", "food", "music"]


class TagData(Data):
    """Texts, and the one tag that marks their words."""

    text: Text
    """The column of the text."""
    tag: Text
    """The column of the tag."""

    @property
    def columns(self) -> dict[str, str]:
        return {"text": self.text, "tag": self.tag}


class Tagging(Task):
    """A tag for every word: a kind of task that the package does not know."""

    type: Literal["tagging"] = "tagging"
    metrics: tuple[str, ...] = ("accuracy",)
    """What is measured."""

    data_section: ClassVar[DataSection] = TagData
    opens_as: ClassVar[str] = "TOKEN_CLS"
    # PEFT has a name for the task, under which "all-linear" would adapt the head that it also trains in full.
    peft_type: ClassVar[str | None] = None
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    def read(self, table: Table, data: Data) -> Examples:
        assert isinstance(data, TagData)
        columns = {"text": table.texts("text", data.text), "tag": table.texts("tag", data.tag)}
        return Examples(table.source, columns)

    def config_changes(self, splits: Splits) -> dict[str, Any]:
        return {"num_labels": len(TAGS)}

    def rows(self, examples: Examples, tokenizer: Any) -> list[dict[str, Any]]:
        """Every word has the tag of its text, but for those that say nothing."""
        found = []
        for text, tag in zip(examples["text"], examples["tag"], strict=True):
            words = text.split()
            tags = [0 if word in ("some", "more") else TAGS.index(tag) for word in words]
            found.append({"input_ids": tokenizer.convert_tokens_to_ids(words), "labels": tags})
        return found

    def trainer_data(self, splits: Splits, processor: Any) -> dict[str, Any]:
        return {
            "train_dataset": self.rows(splits.train, processor),
            "eval_dataset": self.rows(splits.validation, processor),
        }

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        told: Any = trainer.predict(self.rows(examples, trainer.processing_class))  # type: ignore[arg-type]
        return {"accuracy": float((told.predictions.argmax(-1) == told.label_ids).mean())}


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "tagging", Tagging)


def test_a_new_kind_of_task_runs_through_a_comparison(write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(
        tmp_path,
        methods=["lora", "adalora"],
        data={"label": None, "tag": "intent", "samples": 30},
        task={"type": "tagging", "max_length": None},
        training={"steps": 6, "evaluations": 2},
    )
    table = tomllib.loads(path.read_text())
    plan = make_plan(parse_spec(table, tmp_path).with_floor())
    results = {result.method: result for result in run_plan(plan, "a test")}
    assert set(results) == {"lora", "adalora", "head"}
    for result in results.values():
        assert (result.task, result.metric, result.extra_metrics) == ("tagging", "accuracy", {})
        assert result.head_parameters == 32 * 4 + 4
        assert [step for step, _ in result.validation_curve] == [3, 6]
    assert results["lora"].score > 0.5
    assert "tagging" in (plan.spec.output / "report.html").read_text()


def test_its_keys_are_printed_and_in_the_schema(tmp_path: Path) -> None:
    spec = parse_spec(tomllib.loads(starting_spec("tagging")), tmp_path)
    assert isinstance(spec.task, Tagging)
    assert "TagData" in json.dumps(schema())
