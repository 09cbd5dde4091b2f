"""A tiny pipeline of diffusers' with two components, and the files that a LoRA of it comes in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

DIFFUSERS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
RANKS = {"unet": 4, "text_encoder": 2}
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
Updates = dict[str, tuple[Tensor, Tensor]]
"""A and B by module, its component's name in front."""
Scale = Callable[[str], float]


class Answers(NamedTuple):
    """What the components of a pipeline compute."""

    image: Tensor
    text: Tensor

    def distance(self, others: Answers) -> float:
        return max(float((one - other).abs().max()) for one, other in zip(self, others, strict=True))


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


def tiny_text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def components() -> dict[str, nn.Module]:
    return {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}


@torch.no_grad()
def answers(found: dict[str, nn.Module]) -> Answers:
    draw = torch.Generator().manual_seed(3)
    sample, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 32, generator=draw)
    image = found["unet"](sample, 7, encoder_hidden_states=text).sample
    return Answers(image, found["text_encoder"](torch.arange(8)[None]).last_hidden_state)


def pipeline() -> Any:
    others = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**components(), scheduler=DDIMScheduler(), requires_safety_checker=False, **others)


def loaded(folder: Path) -> Answers:
    """What diffusers computes with a file."""
    found = pipeline()
    found.load_lora_weights(folder)
    return answers({name: getattr(found, name) for name in TARGETS})


def fused(folder: Path) -> dict[str, nn.Module]:
    """The components after diffusers has added a file's updates to their weights."""
    found = pipeline()
    found.load_lora_weights(folder)
    found.fuse_lora()
    found.unload_lora_weights()
    return {name: getattr(found, name) for name in TARGETS}


@torch.no_grad()
def added(updates: Updates, scale: Scale) -> Answers:
    """What the pipeline computes with scale·B·A added to its weights."""
    found = components()
    for name, (A, B) in updates.items():
        component, _, own = name.partition(".")
        weight = found[component].get_submodule(own).weight
        weight += scale(name) * (B.flatten(1) @ A.flatten(1)).view_as(weight)
    return answers(found)


def updates(seed: int = 0) -> Updates:
    """Of all layers of both components that kohya's scripts adapt."""
    found: Updates = {}
    for component, model in components().items():
        torch.manual_seed(seed + len(component))
        model.add_adapter(LoraConfig(r=RANKS[component], target_modules=TARGETS[component], init_lora_weights=False))
        tensors = get_peft_model_state_dict(model)
        names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
        for name in names:
            found[f"{component}.{name}"] = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    return found


def in_diffusers_names(given: Updates) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_A.weight": A for name, (A, _) in given.items()}
    return tensors | {f"{name}.lora_B.weight": B for name, (_, B) in given.items()}


def in_kohyas_names(given: Updates, alpha: Scale | None = None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in given.items():
        component, _, own = name.partition(".")
        start = KOHYA[component] + own.replace(".", "_")
        tensors |= {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B}
        if alpha is not None:
            tensors[f"{start}.alpha"] = torch.tensor(float(alpha(name)))
    return tensors


def headers(alphas: dict[str, float]) -> dict[str, Any]:
    """The configs of components as diffusers writes them into the header."""
    found: dict[str, Any] = {}
    for component, alpha in alphas.items():
        config = LoraConfig(r=RANKS[component], lora_alpha=alpha, target_modules=TARGETS[component]).to_dict()  # type: ignore[arg-type]
        found |= {f"{component}.{key}": value for key, value in config.items()}
    return found


def write(
    folder: Path, tensors: dict[str, Tensor], header: dict[str, Any] | None = None, name: str = DIFFUSERS
) -> Path:
    """A file of a pipeline's LoRA in a folder of its own."""
    folder.mkdir(parents=True)
    told = {} if header is None else {METADATA: json.dumps(header, default=sorted)}
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name, {"format": "pt"} | told)
    return folder


def two_scales(name: str) -> float:
    """α/r of the tests: 2 in the UNet, 3 in the text encoder."""
    return 2.0 if name.startswith("unet") else 3.0


def two_alphas(name: str) -> float:
    return 8.0 if name.startswith("unet") else 6.0


TWO_HEADERS = {"unet": 8.0, "text_encoder": 6.0}
