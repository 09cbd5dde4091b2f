"""What stock PEFT answers, in a process that cannot import rankwise."""

from __future__ import annotations

import sys
from collections.abc import Callable

sys.modules["rankwise"] = None  # type: ignore[assignment]

import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from common import WORK, adapter, denoised, hand_over, next_token


KINDS: dict[str, tuple[type, Callable[[nn.Module], Tensor]]] = {
    "llama": (LlamaForCausalLM, next_token),
    "unet": (UNet2DConditionModel, denoised),
}


@torch.no_grad()
def main(base: str, names: list[str]) -> None:
    """The answers of one base, alone and with each adapter."""
    kind, answer = KINDS[base]
    answers = {"base": answer(kind.from_pretrained(WORK / base).eval()).tolist()}
    for name in names:
        model = PeftModel.from_pretrained(kind.from_pretrained(WORK / base), str(adapter(base, name))).eval()
        answers[name] = answer(model).tolist()
    hand_over(base, answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
