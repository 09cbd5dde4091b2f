"""Texts into texts by an encoder and a decoder: translation, summaries, answers (T5, BART and their kin).

transformers' Seq2SeqTrainer does the training. Scores are the loss per token of held-out targets and, where the SPEC
asks for them, what greedily generated texts are worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rankwise.compare.sections import Text
from rankwise.compare.tasks.answers import AnswerTask
from rankwise.compare.tasks.base import Data, DataSection, Examples, Length, Splits
from rankwise.compare.tasks.responses import Prompt, prompt_columns, response_loss, responses_of, texts_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    from rankwise.compare.tables import Table


class Seq2SeqData(Data):
    """Texts, and what each is to become."""

    input: Prompt
    """The column of the text to read; or a text with columns in braces, as "translate to German: {english}"."""
    target: Text
    """The column of the text to write. A list in it holds several right ones: the first trains, all are compared
    with."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read."""
        named = {f"input {{{name}}}": name for name in prompt_columns(self.input)}
        return named | {"target": self.target}


class Seq2Seq(AnswerTask):
    """An encoder reads a text, a decoder writes another. Scores: loss per token of the target, and generated texts."""

    type: Literal["seq2seq"] = "seq2seq"
    max_target_length: Length = 128
    """Tokens of a target; what is longer is cut, in training and where the loss is measured."""

    data_section: ClassVar[DataSection] = Seq2SeqData
    opens_as: ClassVar[str] = "SEQ_2_SEQ_LM"
    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    example_model: ClassVar[str] = "path/to/an/encoder-decoder/model"

    def lengths(self) -> dict[str, int]:
        """Tokens of the input and of the target."""
        return super().lengths() | {"max_target_length": self.max_target_length}

    def read(self, table: Table, data: Data) -> Examples:
        """Texts to read, and the right texts to write."""
        assert isinstance(data, Seq2SeqData)
        inputs = texts_of(table, "input", data.input)
        return Examples(table.source, {"prompt": inputs, "responses": responses_of(table, "target", data.target)})

    def arguments(self, common: dict[str, Any]) -> TrainingArguments:
        """Seq2SeqTrainer's arguments."""
        from transformers import Seq2SeqTrainingArguments

        return Seq2SeqTrainingArguments(**common)

    @property
    def trainer_class(self) -> type[Trainer]:
        """Seq2SeqTrainer."""
        from transformers import Seq2SeqTrainer

        return Seq2SeqTrainer

    def trainer_data(self, splits: Splits, processor: Any) -> dict[str, Any]:
        """Tokenised splits, inputs and targets padded batch by batch."""
        from transformers import DataCollatorForSeq2Seq

        held_out = {"validation": splits.validation, "test": splits.test}
        return {
            "train_dataset": self.dataset(splits.train, processor),
            "eval_dataset": {name: self.dataset(examples, processor) for name, examples in held_out.items()},
            "data_collator": DataCollatorForSeq2Seq(processor),
        }

    def dataset(self, examples: Examples, tokenizer: Any) -> Dataset:
        """The split as the model reads it, with the first right target of each row."""
        from datasets import Dataset

        inputs = tokenizer(examples["prompt"], truncation=True, max_length=self.max_length)
        first = [texts[0] for texts in examples["responses"]]
        targets = tokenizer(text_target=first, truncation=True, max_length=self.max_target_length)
        return Dataset.from_dict({**inputs, "labels": targets["input_ids"]})

    def tokens_of(self, prompt: str, tokenizer: Any) -> list[int]:
        """A text as the encoder reads it."""
        return tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]

    def loss(self, trainer: Trainer, split: str) -> float:
        """The loss per token of the targets."""
        return response_loss(trainer, trainer.eval_dataset[split], ahead=0)  # type: ignore[index]
