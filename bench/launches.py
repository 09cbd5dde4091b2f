"""What a training step launches, reads back and copies on an accelerator, exactly: `python bench/launches.py`.

Counted on the simulated device of `tests/device`, so that no GPU is needed and nothing depends on the machine. For
every method, PEFT's LoRA and PEFT's AdaLoRA, a tiny BERT and a tiny Llama, all linear layers adapted, AdamW fused:

- operations launched in the forward pass, the backward pass and the rules around the optimiser's move;
- reads, by which the host waits for the device, and copies from the host to the device, in the whole step;
- the same two in the first step of a run.

    python bench/launches.py --json bench/results/launches.json
    python bench/launches.py --only salora --where      # which functions the reads and copies come from
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from harness import write

sys.path.append(str(Path(__file__).parents[1] / "tests" / "device"))

import simulated
from launch_counts import LAYERS, MODELS, REFERENCE, WAYS, counts_of, places_of, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here too")
    parser.add_argument("--layers", nargs="+", type=int, default=LAYERS, metavar="N")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--where", action="store_true", help="say which functions read and copy")
    parser.add_argument("--first", action="store_true", help="with --where: in the first step of a run")
    given = parser.parse_args()
    reason = simulated.missing()
    if reason:
        raise SystemExit(f"Nothing was counted: {reason}.")
    ways = [REFERENCE, *(way for way in given.only if way != REFERENCE)]
    counts: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for model in given.models:
        counts[model] = {way: {str(n): counts_of(model, way, n) for n in given.layers} for way in ways}
        print(f"\n{model}\n\n{table(counts[model])}", flush=True)
        for way in given.only if given.where else ():
            for layers in given.layers:
                for place, times in places_of(model, way, layers, first=given.first).items():
                    print(f"{way}, {layers} layers: {times} × {place}")
    write(given.json, {"counts": counts})


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - began:.0f} s")
