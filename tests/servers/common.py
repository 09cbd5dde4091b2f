"""What the programs of this folder share: where things lie, the prompts, and how answers are handed over."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))

from tiny_unet import denoised as denoised
from tiny_unet import tiny_unet as tiny_unet

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "servers"
WORK = CACHE / "work"
LAYOUTS = ("uniform", "compact")
PROMPTS = [[(7 * i + 11 * k) % 500 + 4 for i in range(length)] for k, length in enumerate((5, 9, 17, 30))]


def adapter(base: str, name: str) -> Path:
    """The folder of one adapter, `name` being layout/method."""
    return WORK / "adapters" / base / name


@torch.no_grad()
def next_token(model: nn.Module) -> Tensor:
    """Log-probabilities of the next token, (prompts, vocabulary)."""
    return torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]).log_softmax(-1)


@torch.no_grad()
def greedy(model: nn.Module) -> Tensor:
    """Twenty tokens after each prompt, as numbers: any difference is a large one."""
    asked = [torch.tensor([ids]) for ids in received("smollm2-prompts")["all"]]
    return torch.cat(
        [model.generate(input_ids=x, do_sample=False, min_new_tokens=20, max_new_tokens=20)[:, -20:] for x in asked]
    )


def hand_over(who: str, answers: dict[str, Any]) -> None:
    """Leave the answers by adapter, nested lists of numbers, or a sentence where there are none."""
    (WORK / f"{who}.json").write_text(json.dumps(answers), encoding="utf-8")


def received(who: str) -> dict[str, Any]:
    """What `hand_over` left."""
    file = WORK / f"{who}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
