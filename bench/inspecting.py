"""What looking at an adapter costs: `python bench/inspecting.py [--shape 7b | minilm] [--json FILE]`.

`7b` writes a synthetic plain LoRA of a 7B model's shape (32 layers of 7 modules, d = 4096, r = 64, bfloat16), `minilm`
one of MiniLM-L6 (every linear layer, r = 8), and runs `rankwise inspect` on it as a user would: a process of its own,
from the start of Python to the written page. What is told: seconds, and the most memory that the process held.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import write
from safetensors.torch import save_file

SHAPES = {
    "7b": {"layers": 32, "r": 64, "modules": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), (4096, 4096))},
    "minilm": {
        "layers": 6,
        "r": 8,
        "modules": dict.fromkeys(("query", "key", "value", "dense"), (384, 384))
        | {"intermediate": (1536, 384), "output": (384, 1536)},
    },
}


def write_adapter(folder: Path, shape: str) -> None:
    """A plain LoRA with falling spectra, as PEFT would have saved it."""
    generator = torch.Generator().manual_seed(0)
    told = SHAPES[shape]
    r = told["r"]
    falling = torch.linspace(1, 0.05, r)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(told["layers"]):
        for module, (out, into) in told["modules"].items():
            name = f"base_model.model.model.layers.{layer}.{module}_proj"
            B = torch.randn(out, r, generator=generator) * falling / out**0.5
            A = torch.randn(r, into, generator=generator) / into**0.5
            tensors[f"{name}.lora_B.weight"] = B.bfloat16().contiguous()
            tensors[f"{name}.lora_A.weight"] = A.bfloat16().contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = [f"{module}_proj" for module in told["modules"]]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measured(shape: str) -> dict[str, float]:
    """Seconds and the most gigabytes of an inspection."""
    with tempfile.TemporaryDirectory() as place:
        adapter = Path(place) / "adapter"
        write_adapter(adapter, shape)
        command = [sys.executable, "-m", "rankwise.cli.main", "inspect", str(adapter)]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        if not (Path(place) / "adapter-inspected" / "index.html").is_file():
            raise SystemExit("no page was written")
    # Of the largest child so far; there is one.
    kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": seconds, "gigabytes": kilobytes / 2**20}


def main() -> None:
    """Measure one shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b")
    parser.add_argument("--json", type=Path, help="write the result here")
    given = parser.parse_args()
    found = measured(given.shape)
    print(f"{given.shape}: {found['seconds']:.1f} s, {found['gigabytes']:.2f} GB at most")
    write(given.json, {"shape": given.shape, **found})


if __name__ == "__main__":
    main()
