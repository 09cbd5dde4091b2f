"""Adapters of models with other labels or more tokens than their base model's config says, which PEFT loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise
from tiny_models import MODELS, PIXELS, TOKENS, answers, bert, gpt2, llama, mixtral, roberta, saved_adapter, saved_base

TENSORS = "adapter_model.safetensors"
TO_SEQUENCES: Any = tf.AutoModelForSequenceClassification
TO_IMAGES: Any = tf.AutoModelForImageClassification
SEQUENCES: dict[str, Any] = {"task_type": "SEQ_CLS"}
TO_TOKENS: dict[str, Any] = {"task_type": "TOKEN_CLS", "target_modules": ["query", "value"]}
IMAGES: dict[str, Any] = {"modules_to_save": ["classifier"]}
HEADS: dict[str, tuple[Callable[[], Any], Any, Any, dict[str, Any]]] = {
    "llama": (llama, TO_SEQUENCES, TOKENS, SEQUENCES),
    "gpt2": (gpt2, TO_SEQUENCES, TOKENS, SEQUENCES),
    "bert": (bert, TO_SEQUENCES, TOKENS, SEQUENCES),
    "roberta": (roberta, TO_SEQUENCES, TOKENS, SEQUENCES),
    "labels of tokens": (roberta, tf.AutoModelForTokenClassification, TOKENS, TO_TOKENS),
    "mixtral": (mixtral, TO_SEQUENCES, TOKENS, SEQUENCES),
    "vit": (MODELS["vit"].make, TO_IMAGES, PIXELS, IMAGES),
    "dinov2": (MODELS["dinov2"].make, TO_IMAGES, PIXELS, IMAGES),
}


def wrapped(adapter: Path) -> None:
    """Put a wrapper's name into every key."""
    tensors = {f"_orig_mod.{key}": tensor for key, tensor in load_file(adapter / TENSORS).items()}
    save_file(tensors, adapter / TENSORS, {"format": "pt"})


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_with_labels_of_its_own(name: str, tmp_path: Path) -> None:
    make, cls, inputs, fields = HEADS[name]
    base = saved_base(tmp_path / "base", make)

    def opened() -> Any:
        torch.manual_seed(2)
        return cls.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)

    def answer() -> Tensor:
        return answers(PeftModel.from_pretrained(opened(), str(tmp_path / "mended")), inputs)

    adapter = saved_adapter(tmp_path / "lora", opened(), **{"target_modules": "all-linear"} | fields)
    wanted = answers(PeftModel.from_pretrained(opened(), str(adapter)), inputs)
    assert rankwise.check_export(adapter, "peft", base=base).problems == []

    wrapped(adapter)
    report = rankwise.fix_adapter(adapter, tmp_path / "mended", base=base)
    assert torch.equal(answer(), wanted)
    again = rankwise.fix_adapter(tmp_path / "mended", tmp_path / "again", base=base)
    assert (again.logits_error == 0) if inputs is TOKENS else again.not_compared
    assert report.changes


@pytest.mark.parametrize("fields", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}], ids=["trained", "adapted"])
def test_an_adapter_with_more_tokens(fields: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", llama)

    def grown() -> Any:
        model = tf.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(3)
        model.resize_token_embeddings(70)
        return model

    targets = ["q_proj"] if fields else ["q_proj", "embed_tokens"]
    adapter = saved_adapter(tmp_path / "lora", grown(), target_modules=targets, **fields)
    wanted = answers(PeftModel.from_pretrained(grown(), str(adapter)), TOKENS)
    [problem] = rankwise.check_export(adapter, "peft", base=base).problems
    assert problem.sentence == (
        "the base model has 64 tokens and the adapter 70: resize_token_embeddings(70) must be called before it is "
        "loaded"
    )
    wrapped(adapter)
    rankwise.fix_adapter(adapter, tmp_path / "mended", base=base)
    assert torch.equal(answers(PeftModel.from_pretrained(grown(), str(tmp_path / "mended")), TOKENS), wanted)


@pytest.mark.parametrize("name", ["roberta", "vit"])
def test_a_pooler_that_models_with_a_head_lack(name: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", MODELS[name].make)
    fields: dict[str, Any] = {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}
    adapter = saved_adapter(tmp_path / "lora", tf.AutoModel.from_pretrained(base), **fields)
    assert any("pooler" in key for key in load_file(adapter / TENSORS))
    assert rankwise.check_export(adapter, "peft", base=base).problems == []
    rankwise.fix_adapter(adapter, tmp_path / "mended", base=base)
    assert load_file(tmp_path / "mended" / TENSORS).keys() == load_file(adapter / TENSORS).keys()


def test_the_logits_of_an_export_with_labels_of_its_own(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", gpt2)
    model = TO_SEQUENCES.from_pretrained(base, num_labels=5)
    config = rankwise.SoraConfig(r=2, target_modules=["c_attn"], init_weights=False, **SEQUENCES)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "trained"))
    report = rankwise.export_lora(tmp_path / "trained", tmp_path / "lora", logits_of=base)
    assert report.logits_error is not None
    assert report.logits_error < 1e-5
