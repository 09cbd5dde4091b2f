"""A tiny UNet of diffusers', and what it computes at one step: for the tests here, and for those with servers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SHAPE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
"""One block with attention each way."""


def tiny_unet(**fields: Any) -> Any:
    """The same UNet at every call; fields are those of its config that differ."""
    from diffusers import UNet2DConditionModel  # not in every environment that computes with such a UNet

    torch.manual_seed(0)
    return UNet2DConditionModel(**SHAPE | fields).eval()


@torch.no_grad()
def denoised(unet: nn.Module, width: int = 32, **conditions: Any) -> Tensor:
    """The UNet's output at one step, under a text of this width."""
    draw = torch.Generator().manual_seed(3)
    sample, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, width, generator=draw)
    return unet(sample, 7, encoder_hidden_states=text, **conditions).sample
