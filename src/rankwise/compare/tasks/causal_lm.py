"""Teaching a language model to answer: prompts and responses, or chats, with the loss on the response alone.

TRL's SFTTrainer does the training. Scores are the loss per token of the response on text that was held out and, where
the SPEC asks for them, what greedily generated answers are worth.
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rankwise.compare.sections import Count, Text, as_tuple, broken_rule, rule
from rankwise.compare.tasks.base import Data, DataSection, Examples, Splits, Task
from rankwise.errors import ArgumentError, DataError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import nn
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from rankwise.compare.tables import Table

TEMPLATES = {
    "plain": "{prompt}",
    # Cao 2024 (SORSA), listing 1: GSM8K and MATH.
    "instruction": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Response: Lets think step by step.\n"
    ),
    # Cao 2024 (SORSA), listing 2: HumanEval.
    "code": (
        "@@ Instruction\nHere is the given code to do completion:\n```python\n{prompt}\n```\n\n"
        "Please continue to complete the function with python programming language. You are not allowed to modify the "
        "given code and do the completion only.\n\nPlease return all completed codes in one code block.\n"
        "This code block should be in the following format:\n'''python\n# Your codes here\n'''\n\n@@ Response\n"
    ),
}
"""What is written around a prompt, by the name in the SPEC; "chat" is the model's own template."""
GENERATED = ("exact_match", "bleu", "rouge_l")
"""Metrics of generated answers."""
PACKAGES = {"bleu": "sacrebleu", "rouge_l": "rouge_score"}
"""What a metric needs besides TRL."""


class CausalLmData(Data):
    """Prompts and responses, or whole chats."""

    prompt: Text | None = None
    """The column of the prompt; or a text with columns in braces, as "Question: {question}"."""
    response: Text | None = None
    """The column of the response. A list in it holds several right ones: the first trains, all are compared with."""
    messages: Text | None = None
    """The column of chats, lists of {role, content} whose last message is the response; instead of the two others."""

    column_keys: ClassVar[tuple[str, ...]] = ("prompt", "response", "messages")

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
        named = {f"prompt {{{name}}}": name for name in self.prompt_columns}
        return named | {"response": str(self.response)}

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that make the prompt."""
        named = tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(str(self.prompt)) if name))
        return named or (str(self.prompt),)

    def prompt_of(self, row: Mapping[str, str]) -> str:
        """The prompt of one row, its columns filled in."""
        whole = str(self.prompt)
        return row[whole] if whole in row else whole.format_map(row)


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


class CausalLm(Task):
    """A language model learns responses. Scores: loss per token of the response, and generated answers."""

    type: Literal["causal_lm"] = "causal_lm"
    template: Annotated[
        Literal["chat", "plain", "instruction", "code"], rule(f"be one of chat, {', '.join(TEMPLATES)}")
    ] = "chat"
    """What stands around a prompt: the model's own chat template, nothing, or the prompts of SORSA's experiments."""
    packing: bool = False
    """Fill every training sequence up to max_length with several examples."""
    scores: Metrics = ("loss",)
    """What is measured; the first one ranks. Everything but the loss generates answers."""
    pattern: Pattern | None = None
    """Finds the answer in a response, for exact_match: as "#### (\\\\S+)"."""
    max_new_tokens: Count = 128
    """The longest answer that is generated."""
    generate_for: Count | None = None
    """Generate answers for so many examples of a split, the first ones; left out, for all."""

    data_section: ClassVar[DataSection] = CausalLmData
    opens_as: ClassVar[str] = "CAUSAL_LM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"

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
            columns = {name: table.texts("prompt", name) for name in data.prompt_columns}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            prompts = [[{"role": "user", "content": data.prompt_of(row)}] for row in rows]
            responses = _responses(table.values("response", str(data.response)), table.source)
        return Examples(table.source, {"prompt": prompts, "responses": responses})

    def check(self, examples: Mapping[str, Examples]) -> None:
        """The pattern finds an answer in what is trained on, and plain templates get plain prompts."""
        train = examples["train"]
        if self.pattern is not None and not any(self.answer(responses[0]) for responses in train["responses"]):
            raise ArgumentError("task.pattern", f"match a response of {train.source}", self.pattern)
        for split in examples.values():
            longest = max(len(prompt) for prompt in split["prompt"])
            if self.template != "chat" and longest > 1:
                rule_told = f"be 'chat' for chats of several messages, as {split.source} holds"
                raise ArgumentError("task.template", rule_told, self.template)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse the chat template of a model that has none, and what needs a package that is not installed.

        Raises:
            ArgumentError: the tokenizer has no chat template, or a package is missing.
        """
        needed = [("task.type", self.type, "trl")]
        needed += [("task.scores", name, PACKAGES[name]) for name in self.scores if name in PACKAGES]
        for key, value, package in needed:
            if importlib.util.find_spec(package) is None:
                raise ArgumentError(key, f'come with {package} installed (pip install "rankwise[llm]")', value)
        if self.template == "chat" and not tokenizer.chat_template:
            others = ", ".join(TEMPLATES)
            raise ArgumentError("task.template", f"be one of {others}, since the model has no chat template", "chat")

    def answer(self, response: str) -> str | None:
        """What the pattern finds last in a response, without spaces and thousands separators; None where nothing."""
        found = re.findall(self.pattern or "", response)
        return found[-1].strip().replace(",", "") if found else None

    # --- training -----------------------------------------------------------------------------------------------------

    def arguments(self, common: dict[str, Any]) -> TrainingArguments:
        """SFTTrainer's arguments: the loss on the response alone."""
        from trl import SFTConfig

        return SFTConfig(
            **common,
            max_length=self.max_length,
            packing=self.packing,
            eval_packing=False,  # held-out responses are scored one by one
            completion_only_loss=True,
        )

    def trainer(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        splits: Splits,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer | None,
        callbacks: list[TrainerCallback],
    ) -> Trainer:
        """TRL's SFTTrainer, which tokenises all three splits; validation comes first, as development data."""
        from trl import SFTTrainer

        return SFTTrainer(
            model=model,  # type: ignore[arg-type]
            args=arguments,  # type: ignore[arg-type]
            optimizers=(optimizer, None),  # type: ignore[arg-type]
            train_dataset=self.dataset(splits.train),
            eval_dataset={"validation": self.dataset(splits.validation), "test": self.dataset(splits.test)},
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def dataset(self, examples: Examples) -> Dataset:
        """The split in TRL's form: a prompt and a completion, both chats or both texts."""
        from datasets import Dataset

        responses = [responses[0] for responses in examples["responses"]]
        if self.template == "chat":
            completions: list[Any] = [[{"role": "assistant", "content": response}] for response in responses]
            return Dataset.from_dict({"prompt": examples["prompt"], "completion": completions})
        prompts = [self.plain_prompt(prompt) for prompt in examples["prompt"]]
        return Dataset.from_dict({"prompt": prompts, "completion": responses})

    def plain_prompt(self, prompt: list[dict[str, str]]) -> str:
        """The template with the prompt in it."""
        return TEMPLATES[self.template].replace("{prompt}", prompt[-1]["content"])

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
            prompts = [self._tokens_of(prompt, tokenizer) for prompt in examples["prompt"][start : start + size]]
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

    def _tokens_of(self, prompt: list[dict[str, str]], tokenizer: Any) -> list[int]:
        """A prompt as the model saw it in training."""
        if self.template == "chat":
            return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return tokenizer(self.plain_prompt(prompt))["input_ids"]

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


def response_loss(trainer: Trainer, dataset: Any) -> float:
    """The mean negative log-likelihood of a token of the responses, in nats: Σ over all tokens, over their number."""
    import torch
    import torch.nn.functional as F

    model: Any = trainer.model
    model.eval()
    totals, counts = [], []
    for batch in trainer.get_eval_dataloader(dataset):
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        # The logits at one token say what the next one is.
        losses = F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:], reduction="none", ignore_index=-100)
        told = (losses.sum(1), (labels[:, 1:] != -100).sum(1))
        total, count = trainer.accelerator.gather_for_metrics(told)
        totals.append(total)
        counts.append(count)
    return float(torch.cat(totals).double().sum() / torch.cat(counts).sum())


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
