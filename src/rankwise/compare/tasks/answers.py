"""What tasks share that generate answers: their metrics, how answers are generated, and what they are worth."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.compare.sections import Count, as_tuple, broken_rule, distinct, known_names, rule
from rankwise.compare.tasks.base import Examples, Splits, TextTask
from rankwise.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import Trainer

GENERATED = ("exact_match", "bleu", "rouge_l")
"""Metrics of generated answers."""
PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}
"""What a metric needs to be installed."""


def _pattern(text: str) -> str:
    """A regular expression that has one group.

    Raises:
        ValueError: it has not, or is no regular expression.
    """
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise ValueError(text) from error
    if groups != 1:
        raise ValueError(text)
    return text


Pattern = Annotated[str, AfterValidator(_pattern), rule("be a regular expression with one group, the answer")]
Metric = Literal["loss", "exact_match", "bleu", "rouge_l"]
Metrics = Annotated[
    tuple[Metric, ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    AfterValidator(distinct),
    rule(f"be a list of different metrics among loss, {', '.join(GENERATED)}"),
    known_names(Metric, "metrics of the task"),
]


class AnswerTask(TextTask):
    """A model learns answers to prompts. Scores: the loss per token of the right answers, and generated answers.

    Its examples have the columns `prompt` and `responses`, the right answers of each row.
    """

    metrics: Metrics = ("loss",)
    """What is measured; the first one ranks. Everything but the loss generates answers."""
    pattern: Pattern | None = None
    """Finds the answer in a response, for exact_match: as "#### (\\\\S+)"."""
    max_new_tokens: Count = 128
    """The longest answer that is generated."""
    generate_for: Count | None = None
    """Generate answers for so many examples of a split, the first ones; left out, for all."""

    @model_validator(mode="after")
    def _pattern_for_matches(self) -> AnswerTask:
        if "exact_match" in self.metrics and self.pattern is None:
            broken_rule("be given, since `task.metrics` has exact_match", key="pattern", seen="nothing")
        return self

    def packages(self) -> list[tuple[str, str, str]]:
        """What the metrics need."""
        of_metrics = [("task.metrics", name, PACKAGES[name]) for name in self.metrics if name in PACKAGES]
        return [*super().packages(), *of_metrics]

    def check(self, examples: Mapping[str, Examples]) -> None:
        """The pattern finds an answer in what is trained on."""
        super().check(examples)
        train = examples["train"]
        if self.pattern is not None and not any(self.answer(responses[0]) for responses in train["responses"]):
            raise ArgumentError("task.pattern", f"match a response of {train.source}", self.pattern)

    def answer(self, response: str) -> str | None:
        """What the pattern finds last in a response, without spaces and thousands separators; None where nothing."""
        # A pattern such as (.*) also finds the empty text at the end, which is no answer.
        found = [text.strip() for text in re.findall(self.pattern or "", response) if text.strip()]
        return found[-1].replace(",", "") if found else None

    # --- scores -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, trainer: Trainer, split: str) -> float:
        """The loss per token of the right answers of a split, `validation` or `test`."""

    @abstractmethod
    def tokens_of(self, prompt: Any, tokenizer: Any) -> list[int]:
        """A prompt as the model saw it in training."""

    def answers_of(self, rows: Any, width: int) -> Any:
        """The tokens of the answers among the rows that a model generated for prompts of `width` tokens."""
        return rows

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """What the SPEC asks to measure on a split."""
        found: dict[str, float] = {}
        if "loss" in self.metrics:
            found["loss"] = self.loss(trainer, "validation" if examples is splits.validation else "test")
        if any(name in self.metrics for name in GENERATED):
            some = examples.take(range(min(len(examples), self.generate_for or len(examples))))
            found |= self.generated_scores(list(self.generated(trainer, some)), some["responses"])
        return {name: found[name] for name in self.metrics}

    def generated(self, trainer: Trainer, examples: Examples) -> Iterator[str]:
        """Greedy answers, prompt by prompt in the order of the split."""
        import torch

        model: Any = trainer.model
        tokenizer: Any = trainer.processing_class
        size = trainer.args.per_device_eval_batch_size
        model.eval()
        for start in range(0, len(examples), size):
            prompts = [self.tokens_of(prompt, tokenizer) for prompt in examples["prompt"][start : start + size]]
            # A decoder's answers begin where a row ends, so rows are filled up on the left.
            batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
            with torch.no_grad():
                rows = model.generate(
                    **batch,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            answers = self.answers_of(rows, batch["input_ids"].shape[1])
            yield from tokenizer.batch_decode(answers, skip_special_tokens=True)

    def generated_scores(self, answers: list[str], references: list[list[str]]) -> dict[str, float]:
        """The metrics of generated answers against the right ones, each between 0 and 1."""
        found: dict[str, float] = {}
        if "exact_match" in self.metrics:
            right = [
                self.answer(answer) is not None and self.answer(answer) in {self.answer(text) for text in texts}
                for answer, texts in zip(answers, references, strict=True)
            ]
            found["exact_match"] = sum(right) / len(right)
        if "bleu" in self.metrics:
            found["bleu"] = bleu(answers, references)
        if "rouge_l" in self.metrics:
            found["rouge_l"] = rouge_l(answers, references)
        return found


def bleu(answers: list[str], references: list[list[str]]) -> float:
    """BLEU over the whole split (sacrebleu), as a share."""
    from sacrebleu.metrics import BLEU

    # sacrebleu wants the first references of all answers, then the second ones; answers may have different numbers.
    most = max(len(texts) for texts in references)
    columns: Any = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return BLEU().corpus_score(answers, columns).score / 100


def rouge_l(answers: list[str], references: list[list[str]]) -> float:
    """ROUGE-L F1 (rouge-score) against the nearest reference, mean over the split."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        scorer.score_multi(texts, answer)["rougeL"].fmeasure for answer, texts in zip(answers, references, strict=True)
    ]
    return sum(best) / len(best)
