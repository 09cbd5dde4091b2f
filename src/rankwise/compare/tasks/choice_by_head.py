"""Choosing between answers by a head: an encoder reads each answer with the question, and the head gives it a number.

The answer with the largest number is chosen; training takes the softmax over the answers of a question.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rankwise.compare.tasks.base import Data, Examples, Splits, TextTask
from rankwise.compare.tasks.multiple_choice import MultipleChoice
from rankwise.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, Trainer, TrainingArguments


class ChoiceByHead(MultipleChoice):
    """An encoder chooses an answer by its multiple-choice head."""

    opens_as: ClassVar[str] = "MULTIPLE_CHOICE"
    peft_type: ClassVar[str | None] = None
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)

    @property
    def title(self) -> str:
        """How the model chooses."""
        return f"{self.type} by head"

    def general_text(self, data: Data) -> Path | None:
        """Refuse it: an encoder with a head gives no likelihood of text.

        Raises:
            ArgumentError: the SPEC names general text.
        """
        file = super().general_text(data)
        if file is not None:
            told = "be left out where a head chooses: it is for language models"
            raise ArgumentError("data.general_text", told, str(file))
        return None

    def packages(self) -> list[tuple[str, str, str]]:
        """Nothing beside rankwise."""
        return []

    def check_model(self, model: PreTrainedModel, processor: Any) -> None:
        """Refuse a model without a head; a chat template is not needed."""
        TextTask.check_model(self, model, processor)

    def check(self, examples: Mapping[str, Examples]) -> None:
        """Every question has as many answers as the others: a batch of them is one tensor."""
        train = examples["train"]
        count = len(train["choices"][0])
        for split in examples.values():
            for row, texts in enumerate(split["choices"], start=1):
                if len(texts) != count:
                    raise DataError(
                        f"{split.source} has {len(texts)} choices in row {row} where the first row of {train.source} "
                        f"has {count}: a head needs the same number in every row"
                    )

    def arguments(self, common: dict[str, Any]) -> TrainingArguments:
        """The Trainer's arguments."""
        from transformers import TrainingArguments

        return TrainingArguments(**common)

    @property
    def trainer_class(self) -> type[Trainer]:
        """transformers' Trainer."""
        from transformers import Trainer

        return Trainer

    def trainer_data(self, splits: Splits, processor: Any) -> dict[str, Any]:
        """Questions with each of their answers, padded batch by batch."""
        from transformers import DataCollatorForMultipleChoice

        return {
            "train_dataset": self.pairs(splits.train, processor),
            "eval_dataset": self.pairs(splits.validation, processor),
            "data_collator": DataCollatorForMultipleChoice(processor),
        }

    def pairs(self, examples: Examples, tokenizer: Any) -> Dataset:
        """The question with each of its answers as two texts, row by row, and the place of the right one."""
        from datasets import Dataset

        rows: list[dict[str, Any]] = []
        for prompt, texts, answer in zip(examples["prompt"], examples["choices"], examples["answer"], strict=True):
            question = prompt[-1]["content"]
            tokens = tokenizer([question] * len(texts), texts, truncation=True, max_length=self.max_length)
            rows.append({**tokens, "labels": answer})
        return Dataset.from_list(rows)

    def check_trainer(self, trainer: Trainer, splits: Splits) -> None:
        """Nothing is lost: what is longer than `max_length` is cut."""

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """The share of questions whose chosen answer is right, and the mean of −log softmax at the right ones."""
        import numpy as np
        from scipy.special import log_softmax

        outputs: Any = trainer.predict(self.pairs(examples, trainer.processing_class)).predictions  # type: ignore[arg-type]
        logits = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
        answers = np.asarray(examples["answer"])
        of_right = log_softmax(logits, axis=-1)[np.arange(len(answers)), answers]
        found = {"accuracy": float((logits.argmax(-1) == answers).mean()), "loss": float(-of_right.mean())}
        return {name: found[name] for name in self.metrics}
