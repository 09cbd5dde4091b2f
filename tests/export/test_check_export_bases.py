"""What stock PEFT loads is called right, and what vLLM would open as another class is called wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

import rankwise
from rankwise.errors import RankwiseError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(12)[None]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.2,
}
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(3, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def headless_llama() -> LlamaModel:
    return llama().model


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).eval()


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=VISION, image_token_index=63)
    return LlavaForConditionalGeneration(config).eval()


def saved(adapted: Any, folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    adapted.save_pretrained(folder, **options)
    return load_file(folder / TENSORS), json.loads((folder / CONFIG).read_text())


def as_experts_of_old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same update of each expert, under the keys that transformers 4 gave."""
    torch.manual_seed(1)
    found = {}
    for expert in range(2):
        for name, (out, into) in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            found |= {f"{key}.lora_A.weight": torch.randn(2, into), f"{key}.lora_B.weight": torch.randn(out, 2)}
    return found


def as_before_4_52(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("model.language_model", "language_model.model", 1): t for key, t in tensors.items()}


def unchanged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LOADED: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[..., Any], dict[str, Any]]] = {
    "fused experts": (mixtral, mixtral, unchanged, {"target_modules": [], "target_parameters": EXPERTS}),
    "a key for each expert": (mixtral, mixtral, as_experts_of_old, {"target_modules": ["w1", "w2", "w3"]}),
    "AutoModel": (llama, headless_llama, unchanged, {"task_type": "FEATURE_EXTRACTION", "target_modules": ["q_proj"]}),
    "AutoModel without a task": (llama, headless_llama, unchanged, {"target_modules": ["q_proj"]}),
    "names before transformers 4.52": (llava, llava, as_before_4_52, {"target_modules": r".*language_model.*q_proj"}),
    "DoRA": (llama, llama, unchanged, {"target_modules": ["q_proj"], "use_dora": True}),
    "a trained head": (llama, llama, unchanged, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": (llama, llama, unchanged, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
}


@pytest.mark.parametrize("case", list(LOADED))
def test_what_peft_loads_breaks_no_rule_of_peft(case: str, tmp_path: Path) -> None:
    base, adapted, change, fields = LOADED[case]
    base().save_pretrained(tmp_path / "base")
    original = adapted()
    torch.manual_seed(2)
    if change is as_experts_of_old:
        # PEFT cannot make such an adapter any more, so that its config and tensors are written by hand.
        model = get_peft_model(original, LoraConfig(r=2, target_modules=["q_proj"]))
    else:
        model = get_peft_model(original, LoraConfig(r=2, init_lora_weights=False, **fields)).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tensors, config = saved(model, tmp_path / "lora")
    save_file(change(tensors), tmp_path / "lora" / TENSORS)
    (tmp_path / "lora" / CONFIG).write_text(json.dumps(config | fields))

    loaded = PeftModel.from_pretrained(adapted(), str(tmp_path / "lora")).eval()
    expected = with_updates_of_experts(change(tensors)) if change is as_experts_of_old else model
    difference = (loaded(IDS)[0] - expected(IDS)[0]).abs().max()
    effect = (loaded(IDS)[0] - adapted()(IDS)[0]).abs().max()
    assert difference < 1e-4 < 1e-2 < effect

    report = rankwise.check_export(tmp_path / "lora", "peft")
    assert report.base_seen
    assert report.problems == []


@torch.no_grad()
def with_updates_of_experts(tensors: dict[str, Tensor]) -> nn.Module:
    """Mixtral with the update of each expert added to its fused weights; lora_alpha / r is 8 / 2."""
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    for expert in range(2):
        key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}"
        w1, w2, w3 = (
            4 * tensors[f"{key}.{name}.lora_B.weight"] @ tensors[f"{key}.{name}.lora_A.weight"]
            for name in ("w1", "w2", "w3")
        )
        experts.gate_up_proj[expert] += torch.cat([w1, w3])
        experts.down_proj[expert] += w2
    return model


def test_a_convolution_in_one_dimension(tmp_path: Path) -> None:
    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)).eval()
    saved(model, tmp_path / "lora")
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(PeftModel.from_pretrained(Net(), str(tmp_path / "lora")).eval()(x), model(x))
    before = Net()
    weight = before.conv.weight.clone()
    assert rankwise.check_export(tmp_path / "lora", "peft", base=before).problems == []
    assert rankwise.check_export(tmp_path / "lora", "peft").problems == []
    assert [problem.rule for problem in rankwise.check_export(tmp_path / "lora", "vllm", base=before).problems] == [
        "convolution"
    ]
    # The base model that was given is neither adapted nor emptied.
    assert [name for name, _ in before.named_modules()] == ["", "conv"]
    assert before.conv.weight.equal(weight)


def test_what_peft_leaves_out_without_a_word_is_found(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tensors, _ = saved(model, tmp_path / "lora")
    save_file({key.replace("layers.0", "layers.7"): t for key, t in tensors.items()}, tmp_path / "lora" / TENSORS)
    rules = [problem.rule for problem in rankwise.check_export(tmp_path / "lora", "peft").problems]
    assert rules == ["unknown module"]


def test_embeddings_saved_beside_an_adapter(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tensors, _ = saved(model, tmp_path / "lora", save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in tensors
    for server, refuses in {"peft": False, "sglang": False, "vllm": True, "llama.cpp": True}.items():
        problems = rankwise.check_export(tmp_path / "lora", server).problems
        assert bool(problems) == refuses
        assert all("save_embedding_layers=False" in problem.sentence for problem in problems)


@pytest.mark.parametrize(("alpha", "peft_scales_otherwise"), [(8.0, False), (2.0, True)])
def test_a_stray_alpha(alpha: float, peft_scales_otherwise: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tensors, _ = saved(model, tmp_path / "lora")
    key = "base_model.model.model.layers.0.self_attn.q_proj.alpha"
    save_file(tensors | {key: torch.tensor(alpha)}, tmp_path / "lora" / TENSORS)
    for server in ("peft", "vllm", "sglang", "llama.cpp"):
        rules = [problem.rule for problem in rankwise.check_export(tmp_path / "lora", server).problems]
        assert rules == (["stray alpha"] if server != "peft" or peft_scales_otherwise else [])


# --- the class that a server opens ----------------------------------------------------------------------------------


@pytest.fixture
def multimodal(tmp_path: Path) -> Path:
    text = {**SIZES, "head_dim": 16, "layer_types": ["full_attention"]}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


QKV: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}


def test_vllm_opens_a_multimodal_base_and_a_text_only_adapter_matches_none_of_it(
    multimodal: Path, tmp_path: Path
) -> None:
    config = Qwen3_5Config.from_pretrained(multimodal)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(**QKV, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(multimodal)
    saved(model, tmp_path / "lora")
    opened = {name for name, _ in Qwen3_5ForConditionalGeneration(config).named_modules()}
    adapted = {
        key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in load_file(tmp_path / "lora" / TENSORS)
    }
    assert not adapted & opened

    (problem,) = rankwise.check_export(tmp_path / "lora", "vllm").problems
    assert problem.rule == "class of the base model"
    assert "Qwen3_5ForConditionalGeneration" in problem.sentence
    assert problem.sentence.endswith("it would serve the bare base model")
    # SGLang finds a module by the number of its layer and its own name, and llama.cpp converts the language model.
    for server in ("sglang", "llama.cpp", "peft"):
        assert rankwise.check_export(tmp_path / "lora", server).problems == []


def test_an_adapter_of_the_class_that_vllm_opens_is_taken(multimodal: Path, tmp_path: Path) -> None:
    config = Qwen3_5Config.from_pretrained(multimodal)
    whole = LoraConfig(**QKV | {"target_modules": r".*language_model.*\.[qkv]_proj"}, task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3_5ForConditionalGeneration(config), whole)
    model.peft_config["default"].base_model_name_or_path = str(multimodal)
    saved(model, tmp_path / "lora")
    rules = {problem.rule for problem in rankwise.check_export(tmp_path / "lora", "vllm").problems}
    assert "class of the base model" not in rules


def test_an_adapter_of_automodel_matches_nothing_of_what_vllm_opens(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(headless_llama(), LoraConfig(**QKV))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    saved(model, tmp_path / "lora")
    sentences = [problem.sentence for problem in rankwise.check_export(tmp_path / "lora", "vllm").problems]
    assert any("LlamaForCausalLM" in sentence for sentence in sentences)
    assert rankwise.check_export(tmp_path / "lora", "peft").problems == []


def test_an_export_for_vllm_is_refused_too(multimodal: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(Qwen3_5Config.from_pretrained(multimodal))
    fields = {key: value for key, value in QKV.items() if key != "init_lora_weights"}
    adapted = get_peft_model(model, rankwise.LoraConfig(**fields, task_type="CAUSAL_LM", init_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(multimodal)
    with pytest.raises(RankwiseError, match="vllm would not serve this adapter as it is: vLLM opens the base model as"):
        rankwise.export_lora(adapted, tmp_path / "lora", server="vllm")
    assert not (tmp_path / "lora").exists()
    rankwise.export_lora(adapted, tmp_path / "lora", server="sglang")
