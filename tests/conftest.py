"""Tiny models of real architectures, made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub; a slip fails at once instead of waiting

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from equations import (  # noqa: F401  hooks: pytest takes them from here
    pytest_runtest_call,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much where cores are shared


def pytest_addoption(parser: pytest.Parser) -> None:
    """The device of the tests in `tests/device`."""
    parser.addoption("--device", default="sim", help='of tests/device: "sim", which is simulated (default), or "cuda"')


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def tiny_bert(labels: int = 3) -> BertForSequenceClassification:
    """The same tiny BERT classifier at every call."""
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=100,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config).eval()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=100,
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """The same tiny GPT-2, whose linear layers are Conv1D, at every call."""
    torch.manual_seed(1)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=32)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """One batch for `tiny_bert`."""
    generator = torch.Generator().manual_seed(7)
    return {
        "input_ids": torch.randint(0, 100, (8, 12), generator=generator),
        "labels": torch.randint(0, 3, (8,), generator=generator),
    }
