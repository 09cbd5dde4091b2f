"""Kinds of adapters that a base model's weights can hold: what is written computes what stock PEFT computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from cases import CASES
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.into_base.merge import merge_into_base
from tiny_models import (
    MODELS,
    PIXELS,
    TOKENS,
    TOKENS_AND_PIXELS,
    TWO_SIDES,
    answers,
    bert,
    bert_and_gpt2,
    check_merged,
    gemma3,
    gpt2,
    llama,
    llava,
    noise,
    off,
    opened,
    qwen2_5_vl,
    roberta,
    saved_adapter,
    saved_base,
    t5,
    told,
    vit,
)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def tied_llava() -> Any:
    config = llava().config
    config.tie_word_embeddings = True
    return tf.LlavaForConditionalGeneration(config)


def bert_for_masks() -> Any:
    return tf.BertForMaskedLM(bert().config)


def wav2vec2() -> Any:
    shape: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions: Any = {"conv_dim": (16, 16), "conv_stride": (3, 2), "conv_kernel": (4, 3)}
    positions: Any = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 64}
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**shape, **convolutions, **positions, feat_extract_norm="layer"))


# --- what adapters hold besides updates of linear layers -------------------------------------------------------------

KINDS: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "DoRA": (llama, TOKENS, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of Conv1D and an embedding": (gpt2, TOKENS, {"target_modules": ["c_attn", "wpe"], "use_dora": True}),
    "all biases": (gpt2, TOKENS, {"target_modules": ["c_attn"], "bias": "all"}),
    "all biases, some of them tied": (bert_for_masks, TOKENS, {"target_modules": ["query"], "bias": "all"}),
    "biases of adapted layers": (gpt2, TOKENS, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "a bias of the update": (gpt2, TOKENS, {"target_modules": ["c_attn"], "lora_bias": True}),
    "tokens": (llama, TOKENS, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens of tied embeddings": (tied, TOKENS, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "rsLoRA with patterns": (
        llama,
        TOKENS,
        {
            "target_modules": ["q_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"down_proj": 4},
            "alpha_pattern": {"q_proj": 7},
        },
    ),
    "one-dimensional convolutions": (
        wav2vec2,
        {"input_values": noise(1, 200)},
        {"target_modules": r".*(conv_layers.*\.conv|q_proj)"},
    ),
    "three-dimensional convolutions": (
        qwen2_5_vl,
        MODELS["qwen2.5-vl"].inputs,
        {"target_modules": r".*(patch_embed\.proj|language_model.*q_proj)"},
    ),
    "two-dimensional convolutions": (llava, TOKENS_AND_PIXELS, {"target_modules": r".*(patch_embedding|q_proj)"}),
    "a head of which one part is adapted": (
        roberta,
        TOKENS,
        {"target_modules": ["query", "dense"], "modules_to_save": ["out_proj"]},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    make, inputs, fields = KINDS[kind]
    base, cls = saved_base(tmp_path / "base", make), type(make())
    out = check_merged(base, saved_adapter(tmp_path / "lora", opened(base, cls)[0], **fields), cls, inputs)
    assert told(out) == told(base)
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_of_rankwise(method: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", gpt2)
    fields = {"r": 2, "target_modules": ["c_attn", "c_proj"], "init_weights": False} | CASES[method].alone
    torch.manual_seed(0)
    model = get_peft_model(opened(base, tf.GPT2LMHeadModel)[0], CONFIGS[method](**fields))
    bare = answers(opened(base, tf.GPT2LMHeadModel)[0], TOKENS)
    model.save_pretrained(str(tmp_path / "adapter"))
    out = merge_into_base([tmp_path / "adapter"], base, tmp_path / "out")
    merged = opened(out, tf.GPT2LMHeadModel)[0]
    assert off(answers(merged, TOKENS), answers(model, TOKENS)) <= 1e-5
    assert off(bare, answers(model, TOKENS)) > 1e-3


@pytest.mark.parametrize("names", ["of today", "before transformers 4.52", "with the adapter's own name"])
def test_names_that_peft_reads(names: str, tmp_path: Path) -> None:
    base, cls = saved_base(tmp_path / "base", llava), tf.LlavaForConditionalGeneration
    targets = r".*language_model.*(q_proj|down_proj)"
    adapter = saved_adapter(tmp_path / "lora", opened(base, cls)[0], target_modules=targets)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if names == "before transformers 4.52":
        tensors = {
            key.replace("model.model.language_model", "model.language_model.model"): t for key, t in tensors.items()
        }
    if names == "with the adapter's own name":
        tensors = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    save_file(tensors, file)
    check_merged(base, adapter, cls, TOKENS_AND_PIXELS)


def test_wrappers_in_names_are_left_out(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", llama)
    adapter = saved_adapter(tmp_path / "lora", opened(base, tf.LlamaForCausalLM)[0], target_modules=["q_proj"])
    wanted = load_file(merge_into_base([adapter], base, tmp_path / "plain") / "model.safetensors")
    file = adapter / "adapter_model.safetensors"
    tensors = {f"_orig_mod.{key}": tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="holds wrappers' names, which are left out, in 4 of its keys"):
        out = merge_into_base([adapter], base, tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    save_file(tensors | {key.removeprefix("_orig_mod."): tensor + 1 for key, tensor in tensors.items()}, file)
    with pytest.raises(RankwiseError, match="holds one tensor under two names"):
        merge_into_base([adapter], base, tmp_path / "twice")


# --- tied embeddings --------------------------------------------------------------------------------------------------

TIES: dict[str, tuple[Callable[[], Any], Any, dict[str, Any]]] = {
    "embeddings trained": (tied, TOKENS, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "head trained": (tied, TOKENS, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both trained": (tied, TOKENS, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "embeddings adapted": (tied, TOKENS, {"target_modules": ["embed_tokens"]}),
    "head adapted": (tied, TOKENS, {"target_modules": ["lm_head"]}),
    "both adapted": (tied, TOKENS, {"target_modules": ["lm_head", "embed_tokens"]}),
    "a vision-language model's head": (tied_llava, TOKENS_AND_PIXELS, {"target_modules": ["lm_head", "q_proj"]}),
    "GPT-2's embeddings": (gpt2, TOKENS, {"target_modules": ["wte"]}),
    "BERT's embeddings": (bert_for_masks, TOKENS, {"target_modules": ["word_embeddings"]}),
    "BERT's head": (bert_for_masks, TOKENS, {"target_modules": ["decoder"]}),
    "a decoder's head": (bert_and_gpt2, TWO_SIDES, {"target_modules": ["lm_head", "query"]}),
    "Gemma's head": (gemma3, TOKENS_AND_PIXELS, {"target_modules": r".*(lm_head|language_model.*q_proj)"}),
    "Whisper's head": (MODELS["whisper"].make, MODELS["whisper"].inputs, {"target_modules": ["proj_out"]}),
}


@pytest.mark.parametrize("case", TIES)
def test_tied_weights_that_come_out_different_are_both_written(case: str, tmp_path: Path) -> None:
    make, inputs, fields = TIES[case]
    base, cls = saved_base(tmp_path / "base", make), type(make())
    out = check_merged(base, saved_adapter(tmp_path / "lora", opened(base, cls)[0], **fields), cls, inputs)
    config = tf.AutoConfig.from_pretrained(out)
    assert not getattr(config, "tie_word_embeddings", False)
    assert not config.get_text_config(decoder=True).tie_word_embeddings
    assert load_file(out / "model.safetensors").keys() > load_file(base / "model.safetensors").keys()


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable_token_indices": [3, 5]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ],
    ids=["tokens", "trained", "adapted"],
)
def test_tied_weights_that_stay_alike_stay_tied(fields: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tied)
    model = opened(base, tf.LlamaForCausalLM)[0]
    adapter = saved_adapter(tmp_path / "lora", model, **{"target_modules": ["q_proj"]} | fields)
    out = check_merged(base, adapter, tf.LlamaForCausalLM, TOKENS)
    assert told(out) == told(base)
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_a_file_may_hold_one_of_two_tied_weights(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", tied)
    adapter = saved_adapter(tmp_path / "lora", opened(base, tf.LlamaForCausalLM)[0], target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.lm_head.weight": noise(64, 32)}, file)
    out = check_merged(base, adapter, tf.LlamaForCausalLM, TOKENS)
    assert told(out) == told(base)


@pytest.mark.parametrize("targets", [["lm_head"], ["shared"]])
def test_t5_ties_whatever_its_config_says(targets: list[str], tmp_path: Path) -> None:
    """A config that does not tie would turn off the scale of T5's output instead."""
    base = saved_base(tmp_path / "base", t5)
    model = opened(base, tf.T5ForConditionalGeneration)[0]
    adapter = saved_adapter(tmp_path / "lora", model, target_modules=[*targets, "q"])
    with pytest.warns(UserWarning, match="differ now, and the config of T5ForConditionalGeneration cannot say so"):
        merge_into_base([adapter], base, tmp_path / "warned")
    out = check_merged(base, adapter, tf.T5ForConditionalGeneration, TWO_SIDES)
    assert told(out) == told(base)


# --- heads and classes ------------------------------------------------------------------------------------------------

HEADS: dict[str, tuple[Callable[[], Any], Any, Any, dict[str, Any]]] = {
    "a classifier of a causal model": (
        llama,
        tf.AutoModelForSequenceClassification,
        TOKENS,
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
    ),
    "a classifier of a bare encoder": (
        lambda: bert().bert,
        tf.AutoModelForSequenceClassification,
        TOKENS,
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
    "labels of tokens": (
        bert_for_masks,
        tf.AutoModelForTokenClassification,
        TOKENS,
        {"target_modules": ["query"], "task_type": "TOKEN_CLS"},
    ),
    "no task named": (
        llama,
        tf.AutoModelForSequenceClassification,
        TOKENS,
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    ),
    "images": (
        lambda: vit().vit,
        tf.AutoModelForImageClassification,
        PIXELS,
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
    ),
    "a head of another size": (
        bert,
        tf.AutoModelForSequenceClassification,
        TOKENS,
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_is_written_with_its_class_and_labels(case: str, tmp_path: Path) -> None:
    make, cls, inputs, fields = HEADS[case]
    base, options = saved_base(tmp_path / "base", make), {"num_labels": 5, "ignore_mismatched_sizes": True}
    model = opened(base, cls, **options)[0]
    adapter = saved_adapter(tmp_path / "lora", model, **fields)
    out = check_merged(base, adapter, cls, inputs, **options)
    assert told(out)["architectures"] == [type(model).__name__]
    assert tf.AutoConfig.from_pretrained(out).num_labels == 5


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("make", [llama, bert, lambda: gpt2().transformer, vit])
def test_an_adapter_of_a_model_without_a_head(make: Callable[[], Any], task: str | None, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", make)
    model = opened(base, tf.AutoModel)[0]
    targets = ["q_proj", "query", "c_attn"]
    adapter = saved_adapter(tmp_path / "lora", model, target_modules=targets, task_type=task)
    inputs = PIXELS if "Image" in type(make()).__name__ else TOKENS
    out = check_merged(base, adapter, tf.AutoModel, inputs)
    assert told(out) == told(base)


def test_weights_that_nobody_has_are_named(tmp_path: Path) -> None:
    """A masked language model has no pooler: a classifier made from it draws one, and the adapter does not hold it."""
    base = saved_base(tmp_path / "base", bert_for_masks)
    model = opened(base, tf.AutoModelForSequenceClassification)[0]
    adapter = saved_adapter(tmp_path / "lora", model, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.warns(UserWarning, match=r"hold no bert.pooler.dense.bias, .*: whoever loads the model draws them"):
        merge_into_base([adapter], base, tmp_path / "out")


def test_a_head_that_nobody_trained_cannot_be_merged(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", llama)
    model = opened(base, tf.AutoModelForSequenceClassification)[0]
    adapter = saved_adapter(tmp_path / "lora", model, target_modules=["q_proj", "score"])
    with pytest.raises(RankwiseError, match=r"files hold no 'score.weight', and .* holds only an update of it"):
        merge_into_base([adapter], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [llama, tied, gemma3])
@pytest.mark.parametrize("trained", ["embeddings", "frozen embeddings", "tokens"])
def test_a_vocabulary_that_has_grown(make: Callable[[], Any], trained: str, tmp_path: Path) -> None:
    base, cls = saved_base(tmp_path / "base", make), type(make())
    model = opened(base, cls)[0]
    model.resize_token_embeddings(70)
    fields = {
        "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "frozen embeddings": {},
        "tokens": {"trainable_token_indices": list(range(64, 70))},
    }[trained]
    adapted = get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=trained != "embeddings")
    inputs = {"input_ids": torch.tensor([[3, 69, 5, 64]])}
    wanted = answers(adapted, inputs)
    out = merge_into_base([tmp_path / "lora"], base, tmp_path / "out")
    merged, lacking = opened(out, cls)
    assert off(answers(merged, inputs), wanted) <= 1e-5
    assert merged.config.get_text_config().vocab_size == 70
    assert not lacking


TIED_AND_GROWN: dict[str, tuple[str, list[str]]] = {
    "llama": ("llama", ["embed_tokens", "q_proj"]),
    "llama, both adapted": ("llama", ["embed_tokens", "lm_head"]),
    "gpt2": ("gpt2", ["wte", "c_attn"]),
    "gemma3": ("gemma3", ["embed_tokens"]),
    "whisper": ("whisper", ["embed_tokens", "q_proj"]),
    "t5": ("t5", ["shared", "q"]),
}


@pytest.mark.parametrize("case", TIED_AND_GROWN)
def test_an_adapted_embedding_of_a_vocabulary_that_has_grown(case: str, tmp_path: Path) -> None:
    """The output layer has the new rows too, which only the adapter's file holds."""
    name, targets = TIED_AND_GROWN[case]
    make = tied if name == "llama" else MODELS[name].make
    base, cls = saved_base(tmp_path / "base", make), type(make())

    def grown() -> Any:
        model = opened(base, cls)[0]
        torch.manual_seed(3)
        model.resize_token_embeddings(70)
        return model

    saved_adapter(tmp_path / "lora", grown(), target_modules=targets)
    inputs = MODELS[name].inputs
    wanted = answers(PeftModel.from_pretrained(grown(), str(tmp_path / "lora")), inputs)
    merged, lacking = opened(merge_into_base([tmp_path / "lora"], base, tmp_path / "out"), cls)
    found = answers(merged, inputs)
    assert found.shape[-1] == 70
    assert off(found, wanted) <= 1e-5
    assert not lacking


def test_a_vocabulary_that_has_grown_in_a_decoder_alone(tmp_path: Path) -> None:
    """The encoder's has as many tokens, and stays as it is."""
    base, cls = saved_base(tmp_path / "base", bert_and_gpt2), tf.EncoderDecoderModel

    def grown() -> Any:
        model = opened(base, cls)[0]
        torch.manual_seed(3)
        model.decoder.resize_token_embeddings(70)
        return model

    fields: dict[str, Any] = {"target_modules": ["query", "c_attn"], "modules_to_save": ["wte", "lm_head"]}
    saved_adapter(tmp_path / "lora", grown(), **fields)
    wanted = answers(PeftModel.from_pretrained(grown(), str(tmp_path / "lora")), TWO_SIDES)
    out = merge_into_base([tmp_path / "lora"], base, tmp_path / "out")
    assert off(answers(opened(out, cls)[0], TWO_SIDES), wanted) <= 1e-5
    assert told(out)["encoder"].get("vocab_size") == told(base)["encoder"].get("vocab_size")


# --- several adapters -------------------------------------------------------------------------------------------------


def test_heads_and_tokens_are_averaged(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", llama)
    fields: Any = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5], "target_modules": ["q_proj"]}
    folders = [
        saved_adapter(tmp_path / f"lora{seed}", opened(base, tf.LlamaForCausalLM)[0], seed, **fields) for seed in (0, 1)
    ]
    out = merge_into_base(folders, base, tmp_path / "out", weights=[0.25, 0.75])
    found = load_file(out / "model.safetensors")
    merged = [
        PeftModel.from_pretrained(opened(base, tf.LlamaForCausalLM)[0], str(folder)).merge_and_unload().state_dict()
        for folder in folders
    ]
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * merged[0][key] + 0.75 * merged[1][key], rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"`weights` must sum to 1, since '.*' is trained in full"):
        merge_into_base(folders, base, tmp_path / "again", weights=[1, 1])
    without = saved_adapter(tmp_path / "without", opened(base, tf.LlamaForCausalLM)[0], target_modules=["q_proj"])
    with pytest.raises(RankwiseError, match="is not trained in full in every adapter"):
        merge_into_base([folders[0], without], base, tmp_path / "again")


def test_dora_is_merged_alone(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", llama)
    fields: Any = {"target_modules": ["q_proj"], "use_dora": True}
    folders = [saved_adapter(tmp_path / name, opened(base, tf.LlamaForCausalLM)[0], **fields) for name in "ab"]
    for asked, weights in ((folders, None), (folders[:1], [0.5])):
        with pytest.raises(RankwiseError, match="as DoRA's does: it is merged alone and with weight 1"):
            merge_into_base(asked, base, tmp_path / "out", weights=weights)


# --- dtypes -----------------------------------------------------------------------------------------------------------


OF_ANY_DTYPE: dict[str, dict[str, Any]] = {
    "a head trained in full": {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    "an adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", OF_ANY_DTYPE)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16"])
def test_an_adapter_of_any_dtype(dtype: str, kind: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", llama)
    fields = OF_ANY_DTYPE[kind]
    adapter = saved_adapter(tmp_path / "lora", opened(base, tf.LlamaForCausalLM)[0], **fields)
    file = adapter / "adapter_model.safetensors"
    narrow = {key: tensor.to(getattr(torch, dtype)) for key, tensor in load_file(file).items()}
    save_file(narrow, file)
    found = answers(opened(merge_into_base([adapter], base, tmp_path / "out"), tf.LlamaForCausalLM)[0], TOKENS)
    save_file({key: tensor.float() for key, tensor in narrow.items()}, file)
    wide = PeftModel.from_pretrained(opened(base, tf.LlamaForCausalLM)[0], str(adapter))
    assert off(found, answers(wide, TOKENS)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_to_write(dtype: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", lambda: llava().to(torch.bfloat16))
    cls = tf.LlavaForConditionalGeneration
    adapter = saved_adapter(tmp_path / "lora", opened(base, cls)[0], target_modules=["q_proj"])
    exact = load_file(merge_into_base([adapter], base, tmp_path / "float32", dtype="float32") / "model.safetensors")
    out = merge_into_base([adapter], base, tmp_path / "out", dtype=dtype)
    for key, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, exact[key].to(getattr(torch, dtype)))
    loaded = cls.from_pretrained(out)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}
    with pytest.raises(ArgumentError, match="`dtype` must be one of float32"):
        merge_into_base([adapter], base, tmp_path / "int8", dtype="int8")
