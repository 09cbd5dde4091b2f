"""diffusers: each adapter through `load_lora_weights` of a pipeline that holds nothing but the UNet."""

from __future__ import annotations

import sys

import torch
from common import WORK, adapter, denoised, hand_over
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


@torch.no_grad()
def main(names: list[str]) -> None:
    """Answers of the UNet with each adapter."""
    answers = {}
    for name in names:
        unet = UNet2DConditionModel.from_pretrained(WORK / "unet").eval()
        others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        pipeline = StableDiffusionPipeline(
            unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False, **others
        )
        pipeline.load_lora_weights(adapter("unet-diffusers", name))
        answers[name] = denoised(pipeline.unet).tolist()
    hand_over("diffusers", answers)


if __name__ == "__main__":
    main(sys.argv[1:])
