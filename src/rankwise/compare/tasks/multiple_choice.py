"""Choosing between answers: a language model takes the one that it finds most likely, an encoder asks a head.

A language model is trained on the right answer as a response to the question, with the loss on the answer alone, and
scored by the likelihood of every answer: Σ log p(token | question, tokens before it), as it is or divided by the
answer's length. The end of an answer counts as a token of it. What an encoder does is in `choice_by_head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rankwise.compare.sections import Text, as_tuple, distinct, known_names, rule
from rankwise.compare.tasks.base import Data, DataSection, Examples, Splits
from rankwise.compare.tasks.responses import (
    Prompt,
    ResponseData,
    ResponseTask,
    prompt_columns,
    prompts_of,
    response_loss,
    response_losses,
)
from rankwise.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

    from rankwise.compare.tables import Table

Metric = Literal["accuracy", "loss"]
Metrics = Annotated[
    tuple[Metric, ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    AfterValidator(distinct),
    rule("be a list of different metrics among accuracy, loss"),
    known_names(Metric, "metrics of the task"),
]


class MultipleChoiceData(ResponseData):
    """A question, its possible answers and the right one."""

    prompt: Prompt
    """The column of the question; or a text with columns in braces, as "Question: {question}"."""
    choices: Text
    """The column of the answers to choose from, a list of two texts or more."""
    answer: Text
    """The column of the right answer's place in the list, counted from 0."""

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read."""
        named = {f"prompt {{{name}}}": name for name in prompt_columns(self.prompt)}
        return named | {"choices": self.choices, "answer": self.answer}


class MultipleChoice(ResponseTask):
    """A model chooses an answer, by its likelihood or by a head. Scores: accuracy, and the loss of the right answers.

    This class is the choice by likelihood; `for_model` gives the other one.
    """

    type: Literal["multiple_choice"] = "multiple_choice"
    metrics: Metrics = ("accuracy", "loss")
    """What is measured; the first one ranks: the share of right choices, and the loss of the right answers."""
    by: Annotated[Literal["likelihood", "head"], rule("be likelihood or head")] | None = None
    """How the model chooses: by the likelihood of the answers, or by a multiple-choice head. Left out, a model that
    has such a head in transformers (BERT and its kin) takes it."""
    normalise: Annotated[Literal["tokens", "characters", "nothing"], rule("be one of tokens, characters, nothing")] = (
        "tokens"
    )
    """What an answer's log-likelihood is divided by, since a long one is less likely whatever it says."""

    data_section: ClassVar[DataSection] = MultipleChoiceData

    @property
    def title(self) -> str:
        """How the model chooses, which makes scores what they are."""
        divided = "" if self.normalise == "nothing" else f" per {self.normalise.removesuffix('s')}"
        return f"{self.type} by likelihood{divided}"

    def for_model(self, model: str) -> MultipleChoice:
        """The choice by likelihood or by a head, as the SPEC or else the model says."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

        from rankwise.base_models import model_type
        from rankwise.compare.tasks.choice_by_head import ChoiceByHead

        by = self.by
        if by is None:
            has_head = model_type(model, argument="model") in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES
            by = "head" if has_head else "likelihood"
        if by == "likelihood":
            return self.model_copy(update={"by": by})
        for key in ("normalise", "template", "packing"):
            if key in self.model_fields_set:
                rule_told = 'be left out where a head chooses (`task.by` is "head", or left out for an encoder)'
                raise ArgumentError(f"task.{key}", rule_told, getattr(self, key))
        given: dict[str, Any] = {key: getattr(self, key) for key in self.model_fields_set}
        return ChoiceByHead.model_validate(given | {"by": by})

    def read(self, table: Table, data: Data) -> Examples:
        """Questions, their answers, and the right one as the response to learn."""
        assert isinstance(data, MultipleChoiceData)
        choices = table.values("choices", data.choices)
        answers = table.values("answer", data.answer)
        for row, (texts, place) in enumerate(zip(choices, answers, strict=True), start=1):
            _check_row(texts, place, table.source, row)
        return Examples(
            table.source,
            {
                "prompt": prompts_of(table, data.prompt),
                "choices": choices,
                "answer": answers,
                "responses": [[texts[place]] for texts, place in zip(choices, answers, strict=True)],
            },
        )

    def check(self, examples: Mapping[str, Examples]) -> None:
        """Plain templates get plain prompts, which these always are."""

    def held_out(self, splits: Splits) -> dict[str, Dataset]:
        """The right answers, for the loss, and every answer, to choose from."""
        parts = {"validation": splits.validation, "test": splits.test}
        every = {f"{name} choices": self.every_choice(examples) for name, examples in parts.items()}
        return super().held_out(splits) | every

    def every_choice(self, examples: Examples) -> Dataset:
        """Each question with each of its answers, row by row."""
        pairs = zip(examples["prompt"], examples["choices"], strict=True)
        rows = [(prompt, text) for prompt, texts in pairs for text in texts]
        return self.completions([prompt for prompt, _ in rows], [text for _, text in rows])

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """The share of questions whose most likely answer is right, and the loss per token of the right answers."""
        split = "validation" if examples is splits.validation else "test"
        held_out: Any = trainer.eval_dataset
        losses, tokens = response_losses(trainer, held_out[f"{split} choices"])
        texts = [text for choices in examples["choices"] for text in choices]
        lengths = {
            "tokens": tokens.tolist(),
            "characters": [len(text) for text in texts],
            "nothing": [1] * len(texts),
        }[self.normalise]
        likelihoods = iter([-loss / length for loss, length in zip(losses.tolist(), lengths, strict=True)])
        right = 0
        for choices, answer in zip(examples["choices"], examples["answer"], strict=True):
            of_question = [next(likelihoods) for _ in choices]
            right += of_question.index(max(of_question)) == answer
        found = {"accuracy": right / len(examples)}
        if "loss" in self.metrics:
            found["loss"] = response_loss(trainer, held_out[split])
        return {name: found[name] for name in self.metrics}


def _check_row(texts: Any, place: Any, source: str, row: int) -> None:
    whole = isinstance(texts, list) and len(texts) > 1 and all(isinstance(text, str) and text for text in texts)
    if not whole:
        raise DataError(f"{source} has choices in row {row} that are no list of two texts or more: {texts!r:.80}")
    if type(place) is not int or not 0 <= place < len(texts):
        raise DataError(f"{source} has an answer in row {row} that is none of 0 to {len(texts) - 1}: {place!r}")
