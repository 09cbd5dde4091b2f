"""EVA's start (Paischer et al. 2024): A from the inputs that each layer gets, and ranks where these vary most.

PEFT computes it, in a function that its users call between making the adapter and making the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, initialize_lora_eva_weights
from torch import Tensor

from rankwise.compare.candidates.base import Batches

EVA = "eva"
"""The value of `init_lora_weights` that asks for this start."""


def start_from_batches(model: PeftModel, batches: Batches) -> None:
    """Give every layer its A and its rank, from the inputs that it gets for the training examples.

    Random numbers go on as if nothing had been drawn here.

    Args:
        model: with a LoRA in it whose config asks for EVA.
        batches: of training examples; PEFT goes through them, again if need be, until the directions have settled.
    """
    with torch.random.fork_rng():
        initialize_lora_eva_weights(
            model,
            _Inputs(batches),
            prepare_model_inputs_fn=_real_tokens,
            prepare_layer_inputs_fn=_rows,
            show_progress_bar=False,
        )


class _Inputs:
    """Batches without labels that are not tokens: the loss is of no use here, and PEFT takes labels for a mask."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches:
            of_tokens = _labels_are_tokens(batch)
            yield {name: value for name, value in batch.items() if name != "labels" or of_tokens}


def _labels_are_tokens(batch: dict[str, Any]) -> bool:
    """Whether there is one label for each token, as language models are trained; it says which tokens count."""
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    return tokens is not None and labels is not None and tokens.shape == labels.shape


def _real_tokens(batch: dict[str, Any], config: Any) -> Tensor | None:
    """Which tokens are neither padding nor, in a language model, part of the prompt; None for images.

    Options of one question are texts of their own, as the model sees them.
    """
    if "input_ids" not in batch:
        return None
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    if config.eva_config.use_label_mask and "labels" in batch:
        mask = mask & (batch["labels"] != config.eva_config.label_mask_value)
    return mask.flatten(0, -2)


def _rows(layer_input: Any, mask: Tensor | None, name: str) -> Tensor:
    """The vectors that a layer gets, in rows: those of real tokens or, where it sees something else, all of them.

    Something else: a pooled text, a patch of an image, or a token of a decoder beside the encoder's mask. PEFT wants
    them contiguous, which the first token of each text, as BERT's pooler gets it, is not.
    """
    vectors = layer_input if isinstance(layer_input, Tensor) else layer_input[0]
    if mask is not None and vectors.shape[:-1] == mask.shape:
        return vectors[mask]
    return vectors.flatten(0, -2).contiguous()
