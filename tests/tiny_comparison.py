"""A tiny BERT with a tokenizer, text data it can learn, and SPEC files that point to them, all made on the spot.

A plugin for the test files that name it in `pytest_plugins`; a second conftest.py would hide the first from imports.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils import logging

WORDS = {
    "colour": ["red", "green"],
    "food": ["bread", "milk"],
    "music": ["song", "drum"],
}
FILLERS = ["some", "more"]
SCORES = {"low": -1.0, "middle": 0.0, "high": 1.0}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

WriteSpec = Callable[..., Path]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count: int, seed: int) -> list[dict[str, object]]:
    """`count` rows, the labels in turn: three words, two of the label and one that says nothing."""
    draw = random.Random(seed)
    rows: list[dict[str, object]] = []
    for i in range(count):
        label = list(WORDS)[i % len(WORDS)]
        words = [*draw.choices(WORDS[label], k=2), draw.choice(FILLERS)]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "intent": label})
    return rows


def pairs(count: int, seed: int) -> list[dict[str, object]]:
    """`count` rows whose score is told by the second text alone."""
    draw = random.Random(seed)
    words = [list(SCORES)[i % len(SCORES)] for i in range(count)]
    return [{"text": draw.choice(FILLERS), "other_text": word, "score": SCORES[word]} for word in words]


def write_model(folder: Path) -> None:
    """A BERT of two layers with random weights, saved as its pretrained kind is: without a classifier's head."""
    folder.mkdir()
    vocabulary = folder / "vocab.txt"
    words = [word for group in WORDS.values() for word in group]
    vocabulary.write_text("\n".join([*SPECIAL, *words, *FILLERS, *SCORES]) + "\n")
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,  # so that random features tell words apart
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def toml(table: dict[str, Any]) -> str:
    """A SPEC's table as TOML, whose simple values are written as JSON's."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not _is_section(value)]
    for key, value in table.items():
        if _is_section(value):
            for section in value if isinstance(value, list) else [value]:
                lines.append(f"[[{key}]]" if isinstance(value, list) else f"[{key}]")
                lines += [f"{name} = {_value(item)}" for name, item in section.items()]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    """A value inside a section; a table inside it becomes an inline table."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_value(item)}" for name, item in value.items()) + " }"
    return json.dumps(value)


def _is_section(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(item, dict) for item in value))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model (model) and its data: train and test, and pairs-train and pairs-test (.jsonl)."""
    folder = tmp_path_factory.mktemp("tiny")
    bars_were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    write_model(folder / "model")
    if bars_were_on:
        logging.enable_progress_bar()
    write_rows(folder / "train.jsonl", texts(60, seed=0))
    write_rows(folder / "test.jsonl", texts(30, seed=1))
    write_rows(folder / "pairs-train.jsonl", pairs(60, seed=0))
    write_rows(folder / "pairs-test.jsonl", pairs(30, seed=1))
    return folder


@pytest.fixture(scope="session")
def write_spec(tiny: Path) -> WriteSpec:
    """Writes folder/spec.toml, whose output is folder/out: plain LoRA for 12 steps on the tiny model and its data.

    Keyword arguments replace keys of the SPEC, or keys in one of its sections; None leaves a key out.
    """

    def write(folder: Path, **changes: Any) -> Path:
        data = {"train": str(tiny / "train.jsonl"), "test": str(tiny / "test.jsonl"), "text": "text", "label": "intent"}
        table: dict[str, Any] = {
            "model": str(tiny / "model"),
            "output": "out",
            "methods": None if "method" in changes else ["lora"],
            "data": data,
            "task": {"max_length": 16},
            "training": {
                "steps": 12,
                "batch_size": 12,
                "learning_rate": 2e-2,
                "head_learning_rate": 2e-2,
                "warmup": 0.0,
            },
            "budget": {"r": 4},
        }
        for key, value in changes.items():
            table[key] = table.get(key, {}) | value if isinstance(value, dict) else value
        for section in [table, *(value for value in table.values() if isinstance(value, dict))]:
            for key in [key for key, value in section.items() if value is None]:
                del section[key]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "spec.toml"
        path.write_text(toml(table))
        return path

    return write
