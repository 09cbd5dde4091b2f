"""LoRAs merged into a pipeline of diffusers': it computes what dense updates of its components' weights give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipelines import (
    BOTH,
    SD,
    SDXL,
    Scale,
    Tensors,
    TinyPipeline,
    Updates,
    headers,
    in_diffusers_names,
    in_kohyas_names,
    in_kohyas_names_of_sdxl,
    in_kohyas_names_with_alphas,
    one,
    two_alphas,
    two_scales,
    write,
)
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.into_base.merge import merge_into_base
from tiny_models import llama, saved_adapter


def opened(tiny: TinyPipeline, folder: Path) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, model in tiny.components().items():
        cls: Any = type(model)
        found[name] = cls.from_pretrained(folder / name).eval()
    return found


FORMS: dict[str, tuple[TinyPipeline, Callable[[Updates], Tensors], Any, Scale]] = {
    "configs in the header": (SD, in_diffusers_names, BOTH, two_scales),
    "no scales": (SD, in_diffusers_names, None, one),
    "kohya": (SD, in_kohyas_names_with_alphas, None, two_scales),
    "SDXL, diffusers": (SDXL, in_diffusers_names, None, one),
    "SDXL, kohya": (SDXL, lambda given: in_kohyas_names_of_sdxl(given, two_alphas), None, two_scales),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_a_pipeline_computes_what_dense_updates_give(form: str, tmp_path: Path) -> None:
    tiny, change, header, scale = FORMS[form]
    base = tiny.save(tmp_path / "base")
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text("{}")
    given = tiny.updates()
    out = merge_into_base([write(tmp_path / "lora", change(given), header)], base, tmp_path / "out")
    found, wanted = tiny.answers(opened(tiny, out)), tiny.added(given, scale)
    assert found.distance(wanted) < 1e-4
    assert tiny.answers(tiny.components()).distance(wanted) > 1e-2
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == {
        str(path.relative_to(base)) for path in base.rglob("*")
    } | {"README.md"}


def test_a_weighted_sum_and_a_component_that_only_one_adapts(tmp_path: Path) -> None:
    base = SD.save(tmp_path / "base")
    first, second = SD.updates(0), {name: pair for name, pair in SD.updates(7).items() if name.startswith("unet")}
    folders = [
        write(tmp_path / "first", in_diffusers_names(first), BOTH),
        write(tmp_path / "second", in_kohyas_names(second, two_alphas)),
    ]
    out = merge_into_base(folders, base, tmp_path / "out", weights=[0.7, -1.5], dtype="float32")
    sums = {name: (A, 0.7 * B) for name, (A, B) in first.items()}
    for name, (A, B) in second.items():
        sums[name] = torch.cat([sums[name][0], A]), torch.cat([sums[name][1], -1.5 * B], 1)
    assert SD.answers(opened(SD, out)).distance(SD.added(sums, two_scales)) < 1e-4


def test_a_component_that_no_lora_adapts_stays_as_it_is(tmp_path: Path) -> None:
    base = SD.save(tmp_path / "base")
    given = {name: pair for name, pair in SD.updates().items() if name.startswith("unet")}
    lora = write(tmp_path / "lora", in_diffusers_names(given), headers({"unet": 8.0}))
    out = merge_into_base([lora], base, tmp_path / "out", dtype="bfloat16")
    before, after = (at / "text_encoder" / "model.safetensors" for at in (base, out))
    assert before.read_bytes() == after.read_bytes()
    written = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


def test_one_component_alone(tmp_path: Path) -> None:
    base = SD.save(tmp_path / "base")
    given = {name: pair for name, pair in SD.updates().items() if name.startswith("unet")}
    lora = write(tmp_path / "lora", in_kohyas_names_with_alphas(given))
    out = merge_into_base([lora], base / "unet", tmp_path / "out")
    found: Any = SD.components()
    found["unet"] = type(found["unet"]).from_pretrained(out).eval()
    assert SD.answers(found).distance(SD.added(given, two_scales)) < 1e-4


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, out = SD.save(tmp_path / "base"), tmp_path / "out"
    lora = write(tmp_path / "lora", in_diffusers_names(SD.updates()), BOTH)
    with pytest.raises(
        ArgumentError, match="`base` must be given, since the LoRA of a pipeline does not name its base"
    ):
        merge_into_base([lora], None, out)
    with pytest.raises(RankwiseError, match=r"adapts text_encoder, which .*unet does not hold"):
        merge_into_base([lora], base / "unet", out)
    comfyui = {key.replace("unet.", "diffusion_model."): t for key, t in in_diffusers_names(SD.updates()).items()}
    with pytest.raises(RankwiseError, match=r"has ComfyUI's names, and only those of a UNet .* pipeline.fuse_lora"):
        merge_into_base([write(tmp_path / "comfyui", comfyui)], base, out)
    of_xl = {name: pair for name, pair in SDXL.updates().items() if name.startswith("unet")}
    with pytest.raises(RankwiseError, match=r"xl.* does not fit the base model"):
        merge_into_base([write(tmp_path / "xl", in_diffusers_names(of_xl))], base, out)
    with pytest.raises(RankwiseError, match=r"adapts text_encoder_2, which .*base does not hold"):
        merge_into_base([write(tmp_path / "whole xl", in_diffusers_names(SDXL.updates()))], base, out)
    numbered = {
        key.replace("input_blocks_4_1", "input_blocks_9_7"): t for key, t in in_kohyas_names_of_sdxl(of_xl).items()
    }
    with pytest.raises(RankwiseError, match="diffusers cannot convert kohya's names of this LoRA"):
        merge_into_base([write(tmp_path / "numbered", numbered)], SDXL.save(tmp_path / "sdxl"), out)
    plain = saved_adapter(tmp_path / "plain", llama(), target_modules=["q_proj"])
    with pytest.raises(RankwiseError, match=r"plain is no LoRA of a pipeline, and others are"):
        merge_into_base([lora, plain], base, out)
    with pytest.raises(ArgumentError, match="`out` must be another folder"):
        merge_into_base([lora], base, base, overwrite=True)
    assert not out.exists()
