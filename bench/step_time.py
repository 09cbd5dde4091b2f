"""Time of a training step of every method against PEFT's LoRA of the same rank: `python bench/step_time.py`."""

from __future__ import annotations

import statistics

import torch
from harness import in_turns, machine, options, ratio, write
from models import MODELS
from ways import REFERENCE, ways


def main() -> None:
    parser = options(__doc__, repeats=20)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--only", nargs="+", help="ways, by name; PEFT LoRA is always among them")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    rows = []
    for name in given.models:
        for r in given.ranks:
            only = given.only and [REFERENCE, *given.only]
            made = ways(MODELS[name], r, device, only)
            times = in_turns({way: step for way, (_, step) in made.items()}, given.repeats)
            for way, taken in times.items():
                found = ratio(taken, times[REFERENCE])
                rows.append({"model": name, "r": r, "way": way, "ms": 1e3 * statistics.median(taken), "ratio": found})
                print(
                    f"{name:<10} r={r:<4}{way:<22}{1e3 * statistics.median(taken):>9.1f} ms {found!s:>18}", flush=True
                )
    write(given.json, {"repeats": given.repeats, "rows": rows})


if __name__ == "__main__":
    main()
