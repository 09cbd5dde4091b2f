"""Time of a training step of every way as a ratio to PEFT's LoRA of the same rank: `python bench/step_time.py`.

All ways take turns, in a new order in every round, on one base model whose weights they share; `ways.py` says what
they do. Told are medians of a step's time over that of PEFT's LoRA, which runs again before every
third of them, and where 95 % of the medians of bootstrap resamples lie.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from harness import Ratio, beside, kernels_of, machine, options, ratio, write
from models import MODELS, Model
from ways import OURS, REFERENCE, ways


def limit(way: str, r: int) -> float:
    """What a way's ratio is aimed to be at most."""
    if way == "nblora":
        return 1.10 if r < 64 else 1.15
    if way == "alora" and r >= 64:
        return 1.10  # its tensors hold 2·r ranks
    return 0.90 if way == "lora" else 1.00


def measure(model: Model, name: str, r: int, repeats: int, only: list[str] | None) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = ways(model, r, device, only)
    pairs = beside(REFERENCE, {way: step for way, (_, step) in made.items()}, repeats)
    return [
        {"model": name, "r": r, "way": way, "ms": 1e3 * statistics.median(seconds for seconds, _ in found)}
        | ratio(found)._asdict()
        | {"kernels": kernels_of(made[way][1])}
        for way, found in pairs.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Ways by models and ranks."""
    columns = list(dict.fromkeys((row["model"], row["r"]) for row in rows))
    found = {(row["model"], row["r"], row["way"]): row for row in rows}
    lines = [["", *(f"{model}, r = {r}" for model, r in columns)]]
    for way in dict.fromkeys(row["way"] for row in rows):
        lines.append([way, *(cell(found[*column, way]) for column in columns)])
    lines.append([f"{REFERENCE}, ms", *(f"{found[*column, REFERENCE]['ms']:.0f}" for column in columns)])
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "| --- |" + " ---: |" * len(columns), *body])


def cell(row: dict[str, Any]) -> str:
    """The ratio, marked where it is above what is aimed at."""
    above = row["way"] in OURS and row["median"] > limit(row["way"], row["r"])
    return str(Ratio(*(row[key] for key in Ratio._fields))) + (" !" if above else "")


def main() -> None:
    parser = options(__doc__, repeats=12)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--only", nargs="+", default=[], help=f"ways, by name; {REFERENCE} is always among them")
    parser.add_argument("--batch", nargs=2, type=int, metavar=("SAMPLES", "TOKENS"), help="instead of the model's own")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    only = [REFERENCE, *given.only] if given.only else None
    models = {name: MODELS[name] for name in given.models}
    if given.batch:
        models = {name: m._replace(samples=given.batch[0], tokens=given.batch[1]) for name, m in models.items()}
    rows = [row for name, m in models.items() for r in given.ranks for row in measure(m, name, r, given.repeats, only)]
    print(table(rows))
    print("! above what is aimed at: 1.00; LoRA 0.90; NB-LoRA 1.10, at r = 64 1.15; ALoRA at r = 64 1.10")
    sizes = {name: [m.samples, m.tokens] for name, m in models.items()}
    write(given.json, {"repeats": given.repeats, "batches": sizes, "rows": rows})


if __name__ == "__main__":
    main()
