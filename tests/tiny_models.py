"""Tiny models of many architectures with an input each, and a merge of an adapter into one compared with stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor

from rankwise.export.into_base.merge import merge_into_base

IDS = torch.arange(3, 15)[None]
TEXT: Any = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
VISION: Any = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
IMAGE, IMAGE_TOKEN = 63, torch.full((1, 4), 63)
"""The id of image tokens, and an image of four."""


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


PIXELS = {"pixel_values": noise(1, 3, 16, 16)}
TOKENS = {"input_ids": IDS}
TWO_SIDES = {"input_ids": IDS, "decoder_input_ids": IDS}
TOKENS_AND_PIXELS = {"input_ids": torch.cat([IMAGE_TOKEN, IDS], 1)} | PIXELS
PATCHES = {
    "input_ids": torch.cat([torch.tensor([[61]]), IMAGE_TOKEN, torch.tensor([[60]]), IDS], 1),
    "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0] + [0] * IDS.shape[1]]),
    "pixel_values": noise(16, 96),
    "image_grid_thw": torch.tensor([[1, 4, 4]]),
}


def llama(**fields: Any) -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT | {"pad_token_id": 0} | fields))


def gpt2() -> Any:
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, initializer_range=0.2))


def bert(**fields: Any) -> Any:
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT | fields))


def bert_and_gpt2() -> Any:
    """Linear layers and Conv1D side by side."""
    shape: Any = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "initializer_range": 0.2}
    decoder = tf.GPT2Config(add_cross_attention=True, is_decoder=True, **shape)
    both = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**TEXT), decoder)
    return tf.EncoderDecoderModel(config=both)


def roberta() -> Any:
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT, pad_token_id=1))


def t5() -> Any:
    shape: Any = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    return tf.T5ForConditionalGeneration(tf.T5Config(**shape, decoder_start_token_id=0))


def vit() -> Any:
    return tf.ViTForImageClassification(tf.ViTConfig(**VISION))


def dinov2() -> Any:
    return tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION, mlp_ratio=2))


def llava() -> Any:
    vision = tf.CLIPVisionConfig(**VISION)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE)
    )


def gemma3() -> Any:
    text = tf.Gemma3TextConfig(**TEXT, num_key_value_heads=1, head_dim=16, sliding_window=8)
    vision = tf.SiglipVisionConfig(**VISION | {"patch_size": 4})
    ids: Any = {"image_token_index": IMAGE, "boi_token_index": 62, "eoi_token_index": 61}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    )


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = TEXT | {"num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 8}
    ids: Any = {"image_token_id": IMAGE, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def mixtral() -> Any:
    experts: Any = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, **experts))


def whisper() -> Any:
    sides = {f"{side}_{part}": n for side in ("encoder", "decoder") for part, n in SIDE.items()}
    shape: Any = {"d_model": 32, "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 10}
    ids: Any = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(**shape, **sides, **ids, max_target_positions=20, init_std=0.2)
    return tf.WhisperForConditionalGeneration(config)


SIDE = {"layers": 2, "attention_heads": 2, "ffn_dim": 48}


@dataclass
class Tiny:
    """A model, an input of its, and an adapter for it."""

    make: Callable[[], Any]
    inputs: Mapping[str, Tensor]
    targets: Any = "all-linear"
    fields: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "llama": Tiny(llama, TOKENS),
    "gpt2": Tiny(gpt2, TOKENS),
    "bert": Tiny(bert, TOKENS, fields={"task_type": "SEQ_CLS"}),
    "bert and gpt2": Tiny(bert_and_gpt2, TWO_SIDES, ["query", "value", "c_attn", "c_proj"]),
    "roberta": Tiny(roberta, TOKENS, fields={"task_type": "SEQ_CLS"}),
    "t5": Tiny(t5, TWO_SIDES, fields={"task_type": "SEQ_2_SEQ_LM"}),
    "vit": Tiny(vit, PIXELS),
    "dinov2": Tiny(dinov2, PIXELS),
    "llava": Tiny(llava, TOKENS_AND_PIXELS),
    "gemma3": Tiny(gemma3, TOKENS_AND_PIXELS),
    "qwen2.5-vl": Tiny(qwen2_5_vl, PATCHES),
    "mixtral": Tiny(
        mixtral, TOKENS, ["q_proj", "v_proj"], {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
    "mixtral, expert by expert": Tiny(mixtral, TOKENS, ["q_proj", "w1", "w2", "w3"]),
    "whisper": Tiny(whisper, {"input_features": noise(1, 8, 20), "decoder_input_ids": IDS}),
}


def saved_base(folder: Path, make: Callable[[], Any], **options: Any) -> Path:
    """A base model's folder."""
    torch.manual_seed(1)
    make().save_pretrained(folder, **options)
    return folder


def saved_adapter(folder: Path, model: Any, seed: int = 0, **fields: Any) -> Path:
    """A LoRA of a model, every tensor that it trains drawn at random."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | fields)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def answers(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model computes: logits, or the last hidden states of one without a head."""
    output = model.eval()(**inputs)
    return output["logits"] if "logits" in output else output[0]


def opened(folder: Path, cls: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model in float32, whatever its files hold, and the keys that do not match: each kind that there is."""
    torch.manual_seed(2)
    model, found = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    return model, {kind: set(keys) for kind, keys in found.items() if keys and kind.endswith("keys")}


def check_merged(base: Path, adapter: Path, cls: Any, inputs: Mapping[str, Tensor], **options: Any) -> Path:
    """Merge an adapter into its base model, and compare what stock PEFT computes with it with the merged model alone.

    Args:
        base: its folder.
        adapter: the adapter's.
        cls: the class that loads both.
        inputs: of the model.
        options: for loading the base model as it was when the adapter was trained.
    """
    out = merge_into_base([adapter], base, adapter.parent / "out")
    bare, lacking = opened(base, cls, **options)
    bare_answer = answers(bare, inputs)
    wanted = answers(PeftModel.from_pretrained(bare, str(adapter)), inputs)
    merged, lacking_merged = opened(out, cls)
    found = answers(merged, inputs)
    assert off(found, wanted) <= 1e-5
    assert off(bare_answer, wanted) > 1e-2, "the adapter has no effect"
    for kind, keys in lacking_merged.items():
        assert keys <= lacking.get(kind, set())
    return out


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def told(folder: Path) -> dict[str, Any]:
    """A model's config as it lies in its file."""
    return json.loads((folder / "config.json").read_text())
