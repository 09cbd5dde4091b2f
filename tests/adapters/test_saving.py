"""What is saved is a whole adapter, or an error while the model is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import rankwise
from cases import CASES
from conftest import tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError


def adapted(method: str = "adalora") -> nn.Module:
    config = CONFIGS[method](r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(tiny_llama(), config)


FILTERS: dict[str, Any] = {
    "by lora": lambda model: {name: t for name, t in model.state_dict().items() if "lora_" in name},
    "what trains": lambda model: {name: p for name, p in model.named_parameters() if p.requires_grad},
    "another prefix": lambda model: {f"module.{name}": t for name, t in model.state_dict().items()},
    "nothing": lambda model: {},
}


@pytest.mark.parametrize("filtered", FILTERS)
@pytest.mark.parametrize("method", CASES)
def test_a_state_dict_without_all_of_the_adapter_is_refused(method: str, filtered: str, tmp_path: Path) -> None:
    model: Any = adapted(method)
    with pytest.raises(ArgumentError, match="`state_dict` must hold every tensor of the adapter"):
        model.save_pretrained(str(tmp_path), state_dict=FILTERS[filtered](model))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("adapter", ["default", "b"])
def test_a_whole_state_dict_is_saved(adapter: str, tmp_path: Path) -> None:
    model: Any = adapted()
    model.add_adapter("b", rankwise.AdaLoraConfig(r=4, target_modules=["q_proj"], init_weights=False))
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict(), selected_adapters=[adapter])
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    loaded = PeftModel.from_pretrained(tiny_llama(), str(folder), adapter_name=adapter)
    saved = rankwise.factors(model, adapter)
    for name, found in rankwise.factors(loaded, adapter).items():
        assert torch.equal(found.delta(), saved[name].delta())


@pytest.mark.parametrize("method", CASES)
def test_a_model_wrapped_by_fsdp_is_saved_whole(method: str, tmp_path: Path) -> None:
    """FSDP holds the model under a name of its own, which its state dict leaves out."""
    model: Any = adapted(method)
    unwrapped = peft.get_peft_model_state_dict(model)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped: Any = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        assert any(name.startswith("_fsdp_wrapped_module.") for name, _ in wrapped.named_modules())
        found = peft.get_peft_model_state_dict(wrapped)
        state = {key: t for key, t in wrapped.state_dict().items() if not key.endswith(".progress")}
        with pytest.raises(ArgumentError, match="`state_dict` must hold every tensor of the adapter"):
            peft.get_peft_model_state_dict(wrapped, state_dict=state)
    finally:
        dist.destroy_process_group()
    assert found.keys() == unwrapped.keys()
    assert all(torch.equal(found[key], t) for key, t in unwrapped.items())


def test_a_process_that_does_not_save_may_have_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 gathers the state dict on the first process; the others call `save_pretrained` with an empty one."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    model: Any = adapted()
    model.save_pretrained(str(tmp_path), state_dict={}, is_main_process=False)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(ArgumentError, match="`state_dict` must hold every tensor"):
        model.save_pretrained(str(tmp_path), state_dict={})
