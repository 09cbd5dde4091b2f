"""Targets that no adapter can be put on are refused by name, with the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import rankwise
from cases import CASES
from conftest import tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError, RankwiseError

TOKENS = torch.arange(2, 10).view(2, 4)
SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}


def mamba(kind: str = "mamba") -> nn.Module:
    torch.manual_seed(1)
    if kind == "mamba2":
        return Mamba2ForCausalLM(Mamba2Config(**SMALL, num_heads=4, head_dim=8, n_groups=1, expand=2))
    if kind == "falcon_mamba":
        return FalconMambaForCausalLM(FalconMambaConfig(**SMALL))
    return MambaForCausalLM(MambaConfig(**SMALL))


# --- fused kernels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["all-linear", ["in_proj", "out_proj"], r".*\.mixer\..*_proj"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_what_mambas_kernels_pass_by_is_refused_as_by_peft(kind: str, target: Any) -> None:
    model = mamba(kind)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        get_peft_model(mamba(kind), peft.LoraConfig(target_modules=target))
    with pytest.raises(ArgumentError, match=r"pass exclude_modules=\['out_proj'\]\); found 'backbone.layers.0.mixer"):
        get_peft_model(model, rankwise.LoraConfig(r=2, target_modules=target))
    assert not any("rankwise" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("method", CASES)
def test_the_rest_of_a_mamba_trains_and_its_export_loads_in_peft(method: str, tmp_path: Path) -> None:
    fields = {"target_modules": "all-linear", "exclude_modules": ["out_proj", "x_proj", "dt_proj"]}
    model = get_peft_model(mamba(), CONFIGS[method](r=2, init_weights=False, task_type="CAUSAL_LM", **fields)).eval()
    assert set(rankwise.ranks(model)) == {"backbone.layers.0.mixer.in_proj"}
    rankwise.export_lora(model, tmp_path / "lora", server="peft")
    loaded = PeftModel.from_pretrained(mamba(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-5)


# --- offloaded weights ---------------------------------------------------------------------------------------------


def offloaded(model: nn.Module, kind: str, folder: Path) -> nn.Module:
    device = torch.device("cpu")
    return cpu_offload(model, device) if kind == "cpu" else disk_offload(model, str(folder), device)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_base_is_refused(kind: str, tmp_path: Path) -> None:
    model = offloaded(tiny_llama(), kind, tmp_path)
    sentence = r'weights are loaded \(no "cpu" or "disk" in the device map .*; found .*q_proj, offloaded by accelerate'
    with pytest.raises(ArgumentError, match=sentence):
        get_peft_model(model, rankwise.SorsaConfig(r=2, target_modules=["q_proj"]))
    assert not any("rankwise" in name for name, _ in model.named_modules())


def test_an_adapter_is_not_loaded_onto_an_offloaded_base(tmp_path: Path) -> None:
    saved: Any = get_peft_model(tiny_llama(), rankwise.LoraConfig(r=2, target_modules=["q_proj"]))
    saved.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ArgumentError, match="offloaded by accelerate"):
        PeftModel.from_pretrained(offloaded(tiny_llama(), "disk", tmp_path / "base"), str(tmp_path / "adapter"))


def test_layers_that_stay_in_memory_take_an_adapter_beside_offloaded_ones() -> None:
    model = tiny_llama()
    cpu_offload(model.model.embed_tokens, torch.device("cpu"))
    adapted = get_peft_model(model, rankwise.LoraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    assert torch.isfinite(adapted(TOKENS).logits).all()


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("method", CASES)
def test_an_adapter_that_was_offloaded_itself_says_so(method: str, kind: str, tmp_path: Path) -> None:
    config = CONFIGS[method](r=2, target_modules=["q_proj"], init_weights=False)
    model = offloaded(get_peft_model(tiny_llama(), config), kind, tmp_path)
    for use in (lambda: model(TOKENS), lambda: rankwise.factors(model), lambda: model.state_dict()):
        with pytest.raises(RankwiseError, match="accelerate has offloaded the tensors of adapter 'default'"):
            use()


# --- what PEFT's own tuners can do ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("add_weighted_adapter", r"rankwise.merge_adapters\(folders"),
        ("update_and_allocate", "allocated at the optimiser step"),
        ("subtract_mutated_init", "no method changes the base weight"),
    ],
)
def test_a_call_of_pefts_own_tuners_says_what_to_do_instead(name: str, instead: str) -> None:
    model = get_peft_model(tiny_llama(), rankwise.AdaLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AttributeError, match=f"rankwise adapters have no `{name}`: .*{instead}"):
        getattr(model, name)
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match="no attribute 'not_there'"):
        model.not_there  # noqa: B018
