"""What classifying and scoring whole texts share: one text or two, one prediction for them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.compare.sections import Text
from rankwise.compare.tasks.base import Data, Examples, Splits, Task

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import Trainer

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


class SequenceTask(Task):
    """One prediction for a whole text, by a head on a pretrained model."""

    opens_as: ClassVar[str] = "SEQ_CLS"
    peft_type: ClassVar[str | None] = "SEQ_CLS"
    head_modules: ClassVar[tuple[str, ...]] = ("classifier", "score")

    @abstractmethod
    def target(self, value: Any, source: str, row: int) -> Any:
        """What is to be predicted, from the value of the label's column.

        Raises:
            DataError: naming the source and the row, counted from 1.
        """

    def read(self, table: Table, data: Data) -> Examples:
        """Texts and targets."""
        assert isinstance(data, TextData)
        columns: dict[str, list[Any]] = {"text": table.texts("text", data.text)}
        if data.pair is not None:
            columns["pair"] = table.texts("pair", data.pair)
        values = table.values("label", data.label)
        columns["label"] = [self.target(value, table.source, row) for row, value in enumerate(values, start=1)]
        return Examples(table.source, columns)

    def targets(self, examples: Examples, splits: Splits) -> list[int] | list[float]:
        """What the model is trained to give: the numbers of labels, or the targets themselves."""
        return examples["label"]

    def tokens(self, examples: Examples, splits: Splits, tokenizer: Any) -> Dataset:
        """The split as the model reads it."""
        from datasets import Dataset

        texts = [examples[key] for key in ("text", "pair") if key in examples.columns]
        tokens = tokenizer(*texts, truncation=True, max_length=self.max_length)
        return Dataset.from_dict({**tokens, "labels": self.targets(examples, splits)})

    def trainer_data(self, splits: Splits, tokenizer: Any) -> dict[str, Any]:
        """Tokenised splits, padded batch by batch."""
        from transformers import DataCollatorWithPadding

        return {
            "train_dataset": self.tokens(splits.train, splits, tokenizer),
            "eval_dataset": self.tokens(splits.validation, splits, tokenizer),
            "data_collator": DataCollatorWithPadding(tokenizer),
        }

    def predictions(self, trainer: Trainer, examples: Examples, splits: Splits) -> np.ndarray:
        """The model's outputs for a split, (examples, outputs)."""
        import numpy as np

        outputs = trainer.predict(self.tokens(examples, splits, trainer.processing_class)).predictions  # type: ignore[arg-type]
        # A model that returns more than logits gives a tuple, whose first part they are.
        return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
