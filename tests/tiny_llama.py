"""A tiny Llama with a chat template, and questions for the next number, all made on the spot.

A plugin for the test files that name it in `pytest_plugins`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SPECIAL = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>"]
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% if m['role'] == 'assistant' %}<end>{% endif %}"
CHAT += "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def successor(count: int) -> list[dict[str, Any]]:
    """Questions for the next number, whose answers end in #### and a word."""
    return [
        {
            "question": f"after {WORDS[i % 9]}",
            "answer": f"it is #### {WORDS[i % 9 + 1]}",
            "depth": "next",
            "choices": [WORDS[(i % 9 + 6) % 10], WORDS[i % 9 + 1], f"it is {WORDS[i % 9]}"],
            "right": 1,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and a chat template (model), and the questions (train and test .jsonl)."""
    folder = tmp_path_factory.mktemp("llama")
    words = [*SPECIAL, "after", "it", "is", "####", "next", *WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", chat_template=CHAT
    )
    fast.save_pretrained(folder / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in successor(45)))
    return folder
