"""Peak memory of a merge into a base model of 1.7 GB, against PEFT's merge_and_unload.

Run: python bench/into_base.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rankwise.export.into_base.merge import merge_into_base


def make(at: Path) -> None:
    """A Llama of 0.9 billion parameters in bfloat16, and a LoRA of all its linear layers."""
    torch.set_default_dtype(torch.bfloat16)
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000, tie_word_embeddings=True))
    model.save_pretrained(at / "base", max_shard_size="500MB")
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(str(at / "lora"))


def rankwise(at: Path) -> None:
    """The merge into the files."""
    merge_into_base([at / "lora"], at / "base", at / "rankwise")


def stock(at: Path) -> None:
    """The merge of a model in memory."""
    base = AutoModelForCausalLM.from_pretrained(at / "base")
    peft.PeftModel.from_pretrained(base, str(at / "lora")).merge_and_unload().save_pretrained(at / "peft")


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Each part in a process of its own, since a peak does not fall."""
    if len(sys.argv) > 1:
        part, at = sys.argv[1], Path(sys.argv[2])
        before, began = peak(), time.perf_counter()
        {"make": make, "rankwise": rankwise, "stock": stock}[part](at)
        print(f"{part:9} {peak() - before:6.0f} MiB above the start, {time.perf_counter() - began:.0f} s")
        return
    with tempfile.TemporaryDirectory() as at:
        for part in ("make", "rankwise", "stock"):
            subprocess.run([sys.executable, __file__, part, at], check=True)


if __name__ == "__main__":
    main()
