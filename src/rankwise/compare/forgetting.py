"""What a language model forgets: its loss on general text, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rankwise.compare.tables import read_table

TEXT = "text"
"""The column of general text."""
TOGETHER = 8
"""Texts of one forward pass."""


def read_general_text(file: Path) -> list[str]:
    """The texts of a table, in its column `text`.

    Raises:
        DataError: the table cannot be read, or has no such column, or a value is no text.
    """
    return read_table(file, [TEXT]).texts("general_text", TEXT)


@torch.no_grad()
def loss_on_text(model: PreTrainedModel | nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int) -> float:
    """The mean of −log p(token | the tokens before it) over all tokens of all texts, in nats.

    Args:
        model: a causal language model; its mode (training or not) is left as it is found.
        tokenizer: the model's.
        texts: at least one, each of two tokens or more.
        max_length: tokens of a text that are read; the rest is cut.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(texts), TOGETHER):
        some = list(texts[start : start + TOGETHER])
        batch = tokenizer(
            some, truncation=True, max_length=max_length, padding=True, padding_side="right", return_tensors="pt"
        ).to(device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        # Position t predicts token t + 1; padding predicts nothing.
        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        total += cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    model.train(was_training)
    return total / count
