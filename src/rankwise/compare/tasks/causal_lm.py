"""Teaching a language model to answer: prompts and responses, or chats, with the loss on the response alone.

TRL's SFTTrainer does the training. Scores are the loss per token of the response on text that was held out and, where
the SPEC asks for them, what greedily generated answers are worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rankwise.compare.sections import Text, broken_rule
from rankwise.compare.tasks.answers import AnswerTask, Metrics
from rankwise.compare.tasks.base import Data, DataSection, Examples
from rankwise.compare.tasks.responses import (
    Prompt,
    ResponseData,
    ResponseTask,
    prompt_columns,
    prompts_of,
    response_loss,
    responses_of,
)
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import Trainer

    from rankwise.compare.tables import Table


class CausalLmData(ResponseData):
    """Prompts and responses, or whole chats."""

    prompt: Prompt | None = Field(default=None, examples=["question"])
    """The column of the prompt; or a text with columns in braces, as "Question: {question}"."""
    response: Text | None = Field(default=None, examples=["answer"])
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


class CausalLm(ResponseTask, AnswerTask):
    """A language model learns responses. Scores: loss per token of the response, and generated answers."""

    type: Literal["causal_lm"] = "causal_lm"
    metrics: Metrics = ("loss",)  # again, since of two parents pydantic takes the first one's field
    """What is measured; the first one ranks. Everything but the loss generates answers."""

    data_section: ClassVar[DataSection] = CausalLmData

    def read(self, table: Table, data: Data) -> Examples:
        """Prompts as chats or texts, and the right responses to each."""
        assert isinstance(data, CausalLmData)
        if data.messages is not None:
            prompts, responses = _of_chats(table.values("messages", data.messages), table.source)
        else:
            prompts = prompts_of(table, str(data.prompt))
            responses = responses_of(table, "response", str(data.response))
        return Examples(table.source, {"prompt": prompts, "responses": responses})

    def loss(self, trainer: Trainer, split: str) -> float:
        """The loss per token of the responses."""
        return response_loss(trainer, trainer.eval_dataset[split])  # type: ignore[index]

    def answers_of(self, rows: Any, width: int) -> Any:
        """What stands behind the prompts."""
        return rows[:, width:]


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
