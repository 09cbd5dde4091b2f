"""Adapters of a multimodal model's language model, or of the model without its head, merged into the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from rankwise.export.into_base.merge import merge_into_base
from tiny_models import (
    PATCHES,
    TEXT,
    TOKENS,
    TOKENS_AND_PIXELS,
    answers,
    check_merged,
    llava,
    off,
    opened,
    qwen2_5_vl,
    saved_adapter,
    saved_base,
    told,
)


def qwen3_5(**fields: Any) -> Any:
    text: dict[str, Any] = TEXT | {"num_key_value_heads": 1, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    return tf.Qwen3_5ForConditionalGeneration(
        tf.Qwen3_5Config(text_config=text | fields, vision_config=vision, **fields)
    )


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["updates", "head", "embeddings"],
)
def test_an_adapter_of_the_language_model(fields: dict[str, Any], task: str | None, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", qwen3_5)
    cls = tf.Qwen3_5ForCausalLM
    model, lacking = opened(base, tf.AutoModelForCausalLM)
    assert type(model) is cls
    assert not lacking.get("missing_keys")
    adapter = saved_adapter(tmp_path / "lora", model, task_type=task, **fields)
    out = check_merged(base, adapter, cls, TOKENS)
    # It is still the whole model, and says so.
    assert told(out) == told(base)
    whole, lacking = opened(out, tf.Qwen3_5ForConditionalGeneration)
    assert not lacking
    wanted = answers(PeftModel.from_pretrained(opened(base, cls)[0], str(adapter)), TOKENS)
    assert off(answers(whole, TOKENS), wanted) <= 1e-5


def test_a_head_of_a_tied_language_model_is_untied_in_its_part_of_the_config(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", lambda: qwen3_5(tie_word_embeddings=True))
    model = opened(base, tf.AutoModelForCausalLM)[0]
    adapter = saved_adapter(tmp_path / "lora", model, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    out = check_merged(base, adapter, tf.Qwen3_5ForCausalLM, TOKENS)
    assert told(out)["text_config"]["tie_word_embeddings"] is False
    wanted = answers(PeftModel.from_pretrained(opened(base, tf.Qwen3_5ForCausalLM)[0], str(adapter)), TOKENS)
    whole = opened(out, tf.Qwen3_5ForConditionalGeneration)[0]
    assert off(answers(whole, TOKENS), wanted) <= 1e-5


def test_a_vocabulary_that_has_grown_in_the_language_model(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", qwen3_5)
    model = opened(base, tf.AutoModelForCausalLM)[0]
    model.resize_token_embeddings(70)
    fields: Any = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = saved_adapter(tmp_path / "lora", model, task_type="CAUSAL_LM", **fields)
    inputs = {"input_ids": torch.tensor([[3, 69, 5, 64]])}
    wanted = answers(model, inputs)
    out = merge_into_base([adapter], base, tmp_path / "out")
    assert told(out)["text_config"]["vocab_size"] == 70
    assert off(answers(opened(out, tf.Qwen3_5ForCausalLM)[0], inputs), wanted) <= 1e-5


WITHOUT_HEAD: dict[str, tuple[Callable[[], Any], Any]] = {
    "LLaVA": (llava, TOKENS_AND_PIXELS),
    "Qwen2.5-VL": (qwen2_5_vl, PATCHES),
}


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("name", list(WITHOUT_HEAD))
def test_an_adapter_of_the_model_without_its_head(name: str, task: str | None, tmp_path: Path) -> None:
    make, inputs = WITHOUT_HEAD[name]
    base = saved_base(tmp_path / "base", make)
    model = opened(base, tf.AutoModel)[0]
    adapter = saved_adapter(tmp_path / "lora", model, target_modules=["q_proj"], task_type=task)
    out = check_merged(base, adapter, tf.AutoModel, inputs)
    assert told(out) == told(base)
