"""What tasks share whose model gives one prediction for each example, by a head on a pretrained model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankwise.compare.tasks.base import Examples, Splits, Task

if TYPE_CHECKING:
    import numpy as np
    from transformers import Trainer


class PredictionTask(Task):
    """One prediction for each example; what is right is in the column `label`."""

    @abstractmethod
    def target(self, value: Any, source: str, row: int) -> Any:
        """What is to be predicted, from the value of the label's column.

        Raises:
            DataError: naming the source and the row, counted from 1.
        """

    def targets(self, examples: Examples, splits: Splits) -> Sequence[int] | Sequence[float]:
        """What the model is trained to give: the numbers of labels, or the targets themselves."""
        return examples["label"]

    @abstractmethod
    def dataset(self, examples: Examples, splits: Splits, processor: Any) -> Any:
        """The split as the model reads it, with `targets` as its labels."""

    @abstractmethod
    def collator(self, processor: Any) -> Any:
        """What makes a batch of examples of `dataset`."""

    def trainer_data(self, splits: Splits, processor: Any) -> dict[str, Any]:
        """What is trained on, and the validation split."""
        return {
            "train_dataset": self.dataset(splits.train, splits, processor),
            "eval_dataset": self.dataset(splits.validation, splits, processor),
            "data_collator": self.collator(processor),
        }

    def predictions(self, trainer: Trainer, examples: Examples, splits: Splits) -> np.ndarray:
        """The model's outputs for a split, (examples, outputs)."""
        import numpy as np

        outputs = trainer.predict(self.dataset(examples, splits, trainer.processing_class)).predictions
        # A model that returns more than logits gives a tuple, whose first part they are.
        return np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs)
