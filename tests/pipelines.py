"""Tiny pipelines of diffusers', a Stable Diffusion and an SDXL, and the files that a LoRA of one comes in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tiny_unet import denoised, tiny_unet

DIFFUSERS, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
Tensors = dict[str, Tensor]
Updates = dict[str, tuple[Tensor, Tensor]]
"""A and B by module, its component's name in front."""
Scale = Callable[[str], float]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANKS = {"unet": 4, "text_encoder": 2, "text_encoder_2": 3}


class Answers(NamedTuple):
    """What the components of a pipeline compute."""

    image: Tensor
    texts: Tensor

    def distance(self, others: Answers) -> float:
        return max(float((one - other).abs().max()) for one, other in zip(self, others, strict=True))


def tiny_text_encoder(cls: Any = CLIPTextModel, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return cls(config).eval()


class TinyPipeline:
    """A pipeline, and what it computes with a LoRA."""

    targets: dict[str, list[str]]
    """The modules of each component that a LoRA adapts."""

    def components(self) -> dict[str, Any]:
        """The components that a LoRA adapts, the same at every call."""
        raise NotImplementedError

    def pipeline(self) -> Any:
        """Them in diffusers' pipeline, without what they do not need."""
        raise NotImplementedError

    def image(self, unet: nn.Module) -> Tensor:
        return denoised(unet)

    @torch.no_grad()
    def answers(self, found: dict[str, Any]) -> Answers:
        texts = [found[name](torch.arange(8)[None]).last_hidden_state for name in self.targets if name != "unet"]
        return Answers(self.image(found["unet"]), torch.stack(texts))

    def loaded(self, folder: Path) -> Answers:
        """What diffusers computes with a file."""
        found = self.pipeline()
        found.load_lora_weights(folder)
        return self.answers({name: getattr(found, name) for name in self.targets})

    def fused(self, folder: Path) -> dict[str, Any]:
        """The components after diffusers has added a file's updates to their weights."""
        found = self.pipeline()
        found.load_lora_weights(folder)
        found.fuse_lora()
        found.unload_lora_weights()
        return {name: getattr(found, name) for name in self.targets}

    @torch.no_grad()
    def added(self, updates: Updates, scale: Scale) -> Answers:
        """What the pipeline computes with scale·B·A added to its weights."""
        found = self.components()
        for name, (A, B) in updates.items():
            component, _, own = name.partition(".")
            weight = found[component].get_submodule(own).weight
            weight += scale(name) * (B.flatten(1) @ A.flatten(1)).view_as(weight)
        return self.answers(found)

    def updates(self, seed: int = 0) -> Updates:
        """Of all layers that kohya's scripts adapt."""
        found: Updates = {}
        for component, model in self.components().items():
            torch.manual_seed(seed + len(component))
            config = LoraConfig(r=RANKS[component], target_modules=self.targets[component], init_lora_weights=False)
            model.add_adapter(config)
            tensors = get_peft_model_state_dict(model)
            names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
            for name in names:
                found[f"{component}.{name}"] = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        return found

    def save(self, folder: Path) -> Path:
        """The pipeline's folder, as far as a LoRA concerns it."""
        for name, model in self.components().items():
            model.save_pretrained(folder / name)
        (folder / "model_index.json").write_text("{}")
        return folder


class StableDiffusion(TinyPipeline):
    targets = {  # noqa: RUF012
        "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
        "text_encoder": TEXT_TARGETS,
    }

    def components(self) -> dict[str, Any]:
        return {"unet": tiny_unet(), "text_encoder": tiny_text_encoder()}

    def pipeline(self) -> Any:
        others: Any = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
        found: Any = self.components() | {"scheduler": DDIMScheduler()}
        return StableDiffusionPipeline(**found, requires_safety_checker=False, **others)


class StableDiffusionXL(TinyPipeline):
    """Two layers in each block and two text encoders, as in the real one."""

    targets = {  # noqa: RUF012
        "unet": [
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_in", "conv_out"),
            *("time_embedding.linear_1", "time_embedding.linear_2"),
            *("add_embedding.linear_1", "add_embedding.linear_2"),
        ],
        "text_encoder": TEXT_TARGETS,
        "text_encoder_2": TEXT_TARGETS,
    }

    def components(self) -> dict[str, Any]:
        unet = tiny_unet(
            layers_per_block=2,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
        )
        second = tiny_text_encoder(CLIPTextModelWithProjection, seed=2)
        return {"unet": unet, "text_encoder": tiny_text_encoder(), "text_encoder_2": second}

    def pipeline(self) -> Any:
        others: Any = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor"))
        found: Any = self.components() | {"scheduler": DDIMScheduler()}
        return StableDiffusionXLPipeline(**found, add_watermarker=False, **others)

    def image(self, unet: nn.Module) -> Tensor:
        draw = torch.Generator().manual_seed(5)
        conditions = {"text_embeds": torch.randn(2, 32, generator=draw), "time_ids": torch.arange(12.0).view(2, 6)}
        return denoised(unet, 64, added_cond_kwargs=conditions)


SD, SDXL = StableDiffusion(), StableDiffusionXL()


# --- files ------------------------------------------------------------------------------------------------------------


def in_diffusers_names(given: Updates) -> Tensors:
    tensors = {f"{name}.lora_A.weight": A for name, (A, _) in given.items()}
    return tensors | {f"{name}.lora_B.weight": B for name, (_, B) in given.items()}


KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
KOHYA_XL = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_text_model_",
    "text_encoder_2": "lora_te2_",
}


def in_kohyas_names(given: Updates, alpha: Scale | None = None) -> Tensors:
    """As kohya's scripts write the LoRA of a Stable Diffusion: with diffusers' names of the UNet's blocks."""
    return _as_kohya(given, alpha, lambda component, own: KOHYA[component] + own.replace(".", "_"))


def in_kohyas_names_with_alphas(given: Updates) -> Tensors:
    return in_kohyas_names(given, two_alphas)


def in_kohyas_names_of_sdxl(given: Updates, alpha: Scale | None = None) -> Tensors:
    """As kohya's scripts write the LoRA of an SDXL: with the names that Stability AI gave the UNet's blocks."""
    return _as_kohya(
        given,
        alpha,
        lambda component, own: (
            KOHYA_XL[component] + (in_stabilitys_names(own) if component == "unet" else own).replace(".", "_")
        ),
    )


def _as_kohya(given: Updates, alpha: Scale | None, name_of: Callable[[str, str], str]) -> Tensors:
    tensors: Tensors = {}
    for name, (A, B) in given.items():
        component, _, own = name.partition(".")
        start = name_of(component, own)
        tensors |= {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B}
        if alpha is not None:
            tensors[f"{start}.alpha"] = torch.tensor(float(alpha(name)))
    return tensors


RENAMED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
IN_RESNETS = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def in_stabilitys_names(name: str) -> str:
    """The name of a module of an SDXL's UNet of two levels as kohya's scripts number them, `make_unet_conversion_map`.

    A level down is two resnets, each perhaps with attention, and a downsampler; a level up is three and an upsampler.
    """
    if name in RENAMED:
        return RENAMED[name]
    for theirs, ours in IN_RESNETS.items():
        if ".resnets." in name:
            name = name.replace(f".{theirs}", f".{ours}")
    down = re.fullmatch(r"down_blocks\.(\d)\.(resnets|attentions|downsamplers)\.(\d)\.(.*)", name)
    if down:
        level, kind, number, rest = int(down[1]), down[2], int(down[3]), down[4]
        if kind == "downsamplers":
            return f"input_blocks.{3 * (level + 1)}.0.op"
        return f"input_blocks.{3 * level + number + 1}.{int(kind == 'attentions')}.{rest}"
    up = re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)\.(.*)", name)
    if up:
        level, kind, number, rest = int(up[1]), up[2], int(up[3]), up[4]
        if kind == "upsamplers":
            return f"output_blocks.{3 * level + 2}.2.{rest}"
        return f"output_blocks.{3 * level + number}.{int(kind == 'attentions')}.{rest}"
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    assert middle is not None, name
    number = 1 if middle[1] == "attentions" else 2 * int(middle[2])
    return f"middle_block.{number}.{middle[3]}"


def headers(alphas: dict[str, float]) -> dict[str, Any]:
    """The configs of components as diffusers writes them into the header."""
    found: dict[str, Any] = {}
    for component, alpha in alphas.items():
        config = LoraConfig(r=RANKS[component], lora_alpha=alpha, target_modules=SD.targets[component]).to_dict()  # type: ignore[arg-type]
        found |= {f"{component}.{key}": value for key, value in config.items()}
    return found


def write(folder: Path, tensors: Tensors, header: dict[str, Any] | None = None, name: str = DIFFUSERS) -> Path:
    """A file of a pipeline's LoRA in a folder of its own."""
    folder.mkdir(parents=True)
    told = {} if header is None else {METADATA: json.dumps(header, default=sorted)}
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / name, {"format": "pt"} | told)
    return folder


def one(name: str) -> float:
    return 1.0


def two_scales(name: str) -> float:
    """α/r of the tests: 2 in the UNet, 3 in the text encoders."""
    return 2.0 if name.startswith("unet") else 3.0


def two_alphas(name: str) -> float:
    return two_scales(name) * RANKS[name.partition(".")[0]]


TWO_HEADERS = {"unet": 8.0, "text_encoder": 6.0}
BOTH = headers(TWO_HEADERS)
