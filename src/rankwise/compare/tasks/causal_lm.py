"""Teaching a language model to answer: prompts and responses, or chats, with the loss on the response alone.

TRL's SFTTrainer does the training. Scores are the loss per token of the response on text that was held out and, where
the SPEC asks for them, what greedily generated answers are worth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.compare.sections import Count, Text, as_tuple, broken_rule, rule
from rankwise.compare.tasks.base import Data, DataSection, Examples, Splits
from rankwise.compare.tasks.responses import ResponseTask, prompt_columns, prompts_of, response_loss
from rankwise.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from transformers import Trainer

    from rankwise.compare.tables import Table

GENERATED = ("exact_match", "bleu", "rouge_l")
"""Metrics of generated answers."""
PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}
"""What a metric needs besides TRL."""


class CausalLmData(Data):
    """Prompts and responses, or whole chats."""

    prompt: Text | None = Field(None, examples=["question"])
    """The column of the prompt; or a text with columns in braces, as "Question: {question}"."""
    response: Text | None = Field(None, examples=["answer"])
    """The column of the response. A list in it holds several right ones: the first trains, all are compared with."""
    messages: Text | None = None
    """The column of chats, lists of {role, content} whose last message is the response; instead of the two others."""

    @model_validator(mode="after")
    def _one_form(self) -> CausalLmData:
        if self.messages is not None and (self.prompt or self.response):
            broken_rule("be given alone, or `data.prompt` and `data.response` in its place", key="messages")
        if self.messages is None:
            for key in ("prompt", "response"):
                if getattr(self, key) is None:
                    broken_rule("be among the keys of [data], or `data.messages` in its place", key=key, seen="nothing")
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read: those that the prompt names in braces, the response's, or the chats'."""
        if self.messages is not None:
            return {"messages": self.messages}
        named = {f"prompt {{{name}}}": name for name in prompt_columns(str(self.prompt))}
        return named | {"response": str(self.response)}


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
Metrics = Annotated[
    tuple[Literal["loss", "exact_match", "bleu", "rouge_l"], ...],
    Field(min_length=1),
    BeforeValidator(as_tuple),
    rule(f"be a list of metrics among loss, {', '.join(GENERATED)}"),
]


class CausalLm(ResponseTask):
    """A language model learns responses. Scores: loss per token of the response, and generated answers."""

    type: Literal["causal_lm"] = "causal_lm"
    scores: Metrics = ("loss",)
    """What is measured; the first one ranks. Everything but the loss generates answers."""
    pattern: Pattern | None = None
    """Finds the answer in a response, for exact_match: as "#### (\\\\S+)"."""
    max_new_tokens: Count = 128
    """The longest answer that is generated."""
    generate_for: Count | None = None
    """Generate answers for so many examples of a split, the first ones; left out, for all."""

    data_section: ClassVar[DataSection] = CausalLmData

    @model_validator(mode="after")
    def _pattern_for_matches(self) -> CausalLm:
        if "exact_match" in self.scores and self.pattern is None:
            broken_rule("be given, since `task.scores` has exact_match", key="pattern", seen="nothing")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the SPEC asks to measure."""
        return self.scores

    @property
    def lower_is_better(self) -> bool:
        """The loss is the better the lower it is."""
        return self.scores[0] == "loss"

    # --- data ---------------------------------------------------------------------------------------------------------

    def read(self, table: Table, data: Data) -> Examples:
        """Prompts as chats or texts, and the right responses to each."""
        assert isinstance(data, CausalLmData)
        if data.messages is not None:
            prompts, responses = _of_chats(table.values("messages", data.messages), table.source)
        else:
            prompts = prompts_of(table, str(data.prompt))
            responses = _responses(table.values("response", str(data.response)), table.source)
        return Examples(table.source, {"prompt": prompts, "responses": responses})

    def packages(self) -> list[tuple[str, str, str]]:
        """What has to be installed: TRL, and what the metrics need."""
        return super().packages() + [("task.scores", name, PACKAGES[name]) for name in self.scores if name in PACKAGES]

    def check(self, examples: Mapping[str, Examples]) -> None:
        """The pattern finds an answer in what is trained on."""
        super().check(examples)
        train = examples["train"]
        if self.pattern is not None and not any(self.answer(responses[0]) for responses in train["responses"]):
            raise ArgumentError("task.pattern", f"match a response of {train.source}", self.pattern)

    def answer(self, response: str) -> str | None:
        """What the pattern finds last in a response, without spaces and thousands separators; None where nothing."""
        found = re.findall(self.pattern or "", response)
        return found[-1].strip().replace(",", "") if found else None

    # --- scores -------------------------------------------------------------------------------------------------------

    def score(self, trainer: Trainer, examples: Examples, splits: Splits) -> dict[str, float]:
        """What the SPEC asks to measure on a split."""
        found: dict[str, float] = {}
        if "loss" in self.scores:
            split = "validation" if examples is splits.validation else "test"
            found["loss"] = response_loss(trainer, trainer.eval_dataset[split])  # type: ignore[index]
        if any(name in self.scores for name in GENERATED):
            some = examples.take(range(min(len(examples), self.generate_for or len(examples))))
            found |= self.generated_scores(list(self.generated(trainer, some)), some["responses"])
        return {name: found[name] for name in self.scores}

    def generated(self, trainer: Trainer, examples: Examples) -> Iterator[str]:
        """Greedy answers, prompt by prompt in the order of the split."""
        import torch

        model: Any = trainer.model
        tokenizer: Any = trainer.processing_class
        size = trainer.args.per_device_eval_batch_size
        model.eval()
        for start in range(0, len(examples), size):
            prompts = [self.tokens_of(prompt, tokenizer) for prompt in examples["prompt"][start : start + size]]
            # Answers begin where a row ends, so rows are filled up on the left.
            batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
            with torch.no_grad():
                rows = model.generate(
                    **batch,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                )
            answers = rows[:, batch["input_ids"].shape[1] :]
            yield from tokenizer.batch_decode(answers, skip_special_tokens=True)

    def generated_scores(self, answers: list[str], references: list[list[str]]) -> dict[str, float]:
        """The metrics of generated answers against the right ones, each between 0 and 1."""
        found: dict[str, float] = {}
        if "exact_match" in self.scores:
            right = [
                self.answer(answer) is not None and self.answer(answer) in {self.answer(text) for text in texts}
                for answer, texts in zip(answers, references, strict=True)
            ]
            found["exact_match"] = sum(right) / len(right)
        if "bleu" in self.scores:
            found["bleu"] = bleu(answers, references)
        if "rouge_l" in self.scores:
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


def _of_chats(chats: list[Any], source: str) -> tuple[list[list[dict[str, str]]], list[list[str]]]:
    """What comes before the last message of each chat, and that message."""
    prompts: list[list[dict[str, str]]] = []
    responses: list[list[str]] = []
    for row, chat in enumerate(chats, start=1):
        whole = isinstance(chat, list) and len(chat) > 1
        told = whole and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in chat
        )
        if not told or chat[-1]["role"] != "assistant":
            raise DataError(
                f"{source} has a chat in row {row} that is no list of {{role, content}} ending with the assistant's: "
                f"{chat!r:.80}"
            )
        prompts.append([{"role": turn["role"], "content": turn["content"]} for turn in chat[:-1]])
        responses.append([chat[-1]["content"]])
    return prompts, responses


def _responses(values: list[Any], source: str) -> list[list[str]]:
    """The right responses of every row, at least one."""
    found: list[list[str]] = []
    for row, value in enumerate(values, start=1):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{source} has a response in row {row} that is no text or list of texts: {value!r:.80}")
        found.append(list(texts))
    return found
