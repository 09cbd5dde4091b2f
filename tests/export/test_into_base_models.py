"""A merge into the base model's files computes what stock PEFT computes with the adapter, over many architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from rankwise.export.into_base.merge import merge_into_base
from tiny_models import MODELS, answers, check_merged, noise, off, opened, saved_adapter, saved_base, told


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_peft_computes(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    base = saved_base(tmp_path / "base", tiny.make)
    cls = type(tiny.make())
    adapter = saved_adapter(tmp_path / "lora", opened(base, cls)[0], target_modules=tiny.targets, **tiny.fields)
    out = check_merged(base, adapter, cls, tiny.inputs)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].shape == after[key].shape and before[key].dtype == after[key].dtype for key in before)
    assert told(out) == told(base)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"])
def test_a_unet_of_diffusers(file: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    shape: Any = {"block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16}
    blocks: Any = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "attention_head_dim": 8}
    unet = diffusers.UNet2DConditionModel(sample_size=8, **shape, **blocks)
    unet.save_pretrained(tmp_path / "base", safe_serialization=file.endswith("safetensors"))
    assert (tmp_path / "base" / file).is_file()
    inputs = {"sample": noise(1, 4, 8, 8), "timestep": torch.tensor(5), "encoder_hidden_states": noise(1, 3, 16)}

    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_in", "proj_in", "time_emb_proj"]
    adapter = saved_adapter(tmp_path / "lora", unet, target_modules=targets)
    out = merge_into_base([adapter], tmp_path / "base", tmp_path / "out")
    assert {found.name for found in out.iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "README.md",
    }
    bare = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base")
    bare_answer = answers(bare, inputs)
    wanted = answers(PeftModel.from_pretrained(bare, str(adapter)), inputs)
    merged, lacking = diffusers.UNet2DConditionModel.from_pretrained(out, output_loading_info=True)
    assert off(answers(merged, inputs), wanted) <= 1e-5
    assert off(bare_answer, wanted) > 1e-2
    assert not any(lacking.values())
    assert "from diffusers import UNet2DConditionModel" in (out / "README.md").read_text()
