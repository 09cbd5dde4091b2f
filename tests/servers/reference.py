"""What stock PEFT answers, in a process that cannot import rankwise."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from common import WORK, adapter, denoised, greedy, hand_over, next_token
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

KINDS: dict[str, tuple[type, Callable[[nn.Module], Tensor]]] = {
    "llama": (LlamaForCausalLM, next_token),
    "smollm2": (LlamaForCausalLM, greedy),
    "unet": (UNet2DConditionModel, denoised),
}


@torch.no_grad()
def main(base: str, names: list[str]) -> None:
    """The answers of one base, alone and with each adapter."""
    assert "rankwise" not in sys.modules
    sys.modules["rankwise"] = None  # type: ignore[assignment]
    kind, answer = KINDS[base]
    answers = {"base": answer(kind.from_pretrained(WORK / base).eval()).tolist()}
    for name in names:
        model = PeftModel.from_pretrained(kind.from_pretrained(WORK / base), str(adapter(base, name))).eval()
        answers[name] = answer(model).tolist()
    hand_over(base, answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
