"""What language tasks share: prompts, templates, SFTTrainer with the loss on the response alone, and that loss.

A task that teaches responses reads each row as a prompt and the right responses to it.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from rankwise.compare.sections import File, rule
from rankwise.compare.tasks.base import Data, Examples, Splits, TextTask
from rankwise.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel, Trainer, TrainingArguments

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


class _Columns(string.Formatter):
    """Fills in columns by their whole names, which may have dots and brackets in them."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        """The value of a column."""
        return kwargs[field_name], field_name


def prompt_columns(prompt: str) -> tuple[str, ...]:
    """The columns that make a prompt: those that it names in braces, or the one that it is the name of.

    Raises:
        ValueError: a brace is left open, or holds more than a column's name.

    >>> prompt_columns("{depth}: {question}?"), prompt_columns("question")
    (('depth', 'question'), ('question',))
    """
    named = []
    for _, name, form, conversion in string.Formatter().parse(prompt):
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError("braces must hold the name of a column and nothing else")
        named.append(name)
    return tuple(dict.fromkeys(named)) or (prompt,)


def _well_formed(prompt: str) -> str:
    """A prompt whose braces are all closed."""
    prompt_columns(prompt)
    return prompt


Prompt = Annotated[
    str, Field(pattern=r"\S"), AfterValidator(_well_formed), rule("be a column, or a text with columns in braces")
]
"""A column, or a text with columns in braces, as "Question: {question}"."""


def texts_of(table: Table, key: str, prompt: str) -> list[str]:
    """The prompt of every row, its columns filled in.

    Args:
        table: the rows.
        key: the key of [data] that gives the prompt.
        prompt: a column, or a text with columns in braces.

    Raises:
        DataError: a column is missing, or a value is missing or is no text.
    """
    columns = {name: table.texts(key, name) for name in prompt_columns(prompt)}
    if list(columns) == [prompt]:
        return columns[prompt]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [_Columns().vformat(prompt, (), row) for row in rows]


def prompts_of(table: Table, prompt: str) -> list[list[dict[str, str]]]:
    """The prompt of every row as a chat of one message.

    Raises:
        DataError: a column is missing, or a value is missing or is no text.
    """
    return [[{"role": "user", "content": text}] for text in texts_of(table, "prompt", prompt)]


def responses_of(table: Table, key: str, column: str) -> list[list[str]]:
    """The right responses of every row: a text or a list of texts, at least one.

    Raises:
        DataError: the column is missing, or a value is no text or list of texts.
    """
    found: list[list[str]] = []
    for row, value in enumerate(table.values(key, column), start=1):
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise DataError(f"{table.source} has a {key} in row {row} that is no text or list of texts: {value!r:.80}")
        found.append(list(texts))
    return found


class ResponseData(Data):
    """What language tasks may name beside their examples."""

    general_text: File | None = None
    """A file with a column `text` that has nothing to do with the task: the loss on it, before and after training,
    tells what the model has forgotten."""


class ResponseTask(TextTask):
    """A language model learns responses to prompts, through TRL's SFTTrainer."""

    template: Annotated[
        Literal["chat", "plain", "instruction", "code"], rule(f"be one of chat, {', '.join(TEMPLATES)}")
    ] = "chat"
    """What stands around a prompt: the model's own chat template, nothing, or the prompts of SORSA's experiments."""
    packing: bool = False
    """Fill every training sequence up to max_length with several examples."""

    opens_as: ClassVar[str] = "CAUSAL_LM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"

    def general_text(self, data: Data) -> Path | None:
        """What the SPEC names, if anything."""
        assert isinstance(data, ResponseData)
        return data.general_text

    def packages(self) -> list[tuple[str, str, str]]:
        """TRL."""
        return [*super().packages(), ("task.type", self.type, "trl")]

    def check(self, examples: Mapping[str, Examples]) -> None:
        """Plain templates get plain prompts."""
        super().check(examples)
        for split in examples.values():
            longest = max(len(prompt) for prompt in split["prompt"])
            if self.template != "chat" and longest > 1:
                rule_told = f"be 'chat' for chats of several messages, as {split.source} holds"
                raise ArgumentError("task.template", rule_told, self.template)

    def check_model(self, model: PreTrainedModel, processor: Any) -> None:
        """Refuse the chat template of a model that has none.

        Raises:
            ArgumentError: the tokenizer has no chat template.
        """
        super().check_model(model, processor)
        if self.template == "chat" and not processor.chat_template:
            others = ", ".join(TEMPLATES)
            raise ArgumentError("task.template", f"be one of {others}, since the model has no chat template", "chat")

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

    @property
    def trainer_class(self) -> type[Trainer]:
        """TRL's SFTTrainer, which tokenises every split."""
        from trl import SFTTrainer

        return SFTTrainer

    def trainer_data(self, splits: Splits, processor: Any) -> dict[str, Any]:
        """Prompts and completions."""
        return {"train_dataset": self.dataset(splits.train), "eval_dataset": self.held_out(splits)}

    def held_out(self, splits: Splits) -> dict[str, Dataset]:
        """What the trainer tokenises beside the training data; the first is its development data."""
        return {"validation": self.dataset(splits.validation), "test": self.dataset(splits.test)}

    def check_trainer(self, trainer: Trainer, splits: Splits) -> None:
        """Refuse a `max_length` that leaves an example no token of its response: TRL drops such examples."""
        kept: dict[str, Any] = dict(trainer.eval_dataset)  # type: ignore[arg-type]
        given = {name: len(rows) for name, rows in self.held_out(splits).items()}
        if not self.packing:  # packed sequences are not examples any more
            kept["train"], given["train"] = trainer.train_dataset, len(splits.train)
        for name, count in given.items():
            lost = count - len(kept[name])
            if lost:
                rule_told = f"leave room for a response in every example of {name} ({lost} of {count} have none)"
                raise ArgumentError("task.max_length", rule_told, self.max_length)

    def dataset(self, examples: Examples) -> Dataset:
        """The split in TRL's form, with the first right response of each row."""
        return self.completions(examples["prompt"], [responses[0] for responses in examples["responses"]])

    def completions(self, prompts: list[list[dict[str, str]]], responses: list[str]) -> Dataset:
        """Prompts and completions in TRL's form, both chats or both texts."""
        from datasets import Dataset

        if self.template == "chat":
            chats: list[Any] = [[{"role": "assistant", "content": response}] for response in responses]
            return Dataset.from_dict({"prompt": prompts, "completion": chats})
        return Dataset.from_dict({"prompt": [self.plain_prompt(prompt) for prompt in prompts], "completion": responses})

    def plain_prompt(self, prompt: list[dict[str, str]]) -> str:
        """The template with the prompt in it."""
        return TEMPLATES[self.template].replace("{prompt}", prompt[-1]["content"])

    def tokens_of(self, prompt: list[dict[str, str]], tokenizer: Any) -> list[int]:
        """A prompt as the model saw it in training."""
        if self.template == "chat":
            return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return tokenizer(self.plain_prompt(prompt))["input_ids"]


def response_losses(trainer: Trainer, dataset: Any, ahead: int = 1) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of every response in nats, Σ over its tokens, and how many tokens they are.

    Args:
        trainer: whose model and collator are taken.
        dataset: tokenised examples; labels of −100 are no part of a response.
        ahead: how many tokens ahead the logits look. A decoder's say what the next token is; those of an encoder with
            a decoder stand where their label does.
    """
    import torch
    import torch.nn.functional as F

    model: Any = trainer.model
    model.eval()
    totals, counts = [], []
    for batch in trainer.get_eval_dataloader(dataset):
        labels = batch["labels"][:, ahead:]
        # A decoder behind an encoder reads the labels, moved by one, as its input; a decoder alone needs none.
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels" or not ahead}
        with torch.no_grad():
            logits = model(**inputs).logits
        told = logits[:, : logits.shape[1] - ahead].float()
        losses = F.cross_entropy(told.mT, labels, reduction="none", ignore_index=-100)
        of_examples = (losses.sum(1), (labels != -100).sum(1))
        total, count = trainer.accelerator.gather_for_metrics(of_examples)
        totals.append(total)
        counts.append(count)
    return torch.cat(totals).double(), torch.cat(counts)


def response_loss(trainer: Trainer, dataset: Any, ahead: int = 1) -> float:
    """The mean negative log-likelihood of a token of the responses, in nats: Σ over all tokens, over their number."""
    totals, counts = response_losses(trainer, dataset, ahead)
    return float(totals.sum() / counts.sum())
