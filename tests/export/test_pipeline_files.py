"""check-export calls right what diffusers loads and computes as it is meant, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise
from pipelines import (
    BOTH,
    RANKS,
    SD,
    SDXL,
    Scale,
    Tensors,
    Updates,
    headers,
    in_diffusers_names,
    in_kohyas_names,
    in_kohyas_names_of_sdxl,
    in_kohyas_names_with_alphas,
    one,
    tiny_text_encoder,
    two_alphas,
    two_scales,
    write,
)
from tiny_unet import tiny_unet


def convolutions_differ(name: str) -> float:
    return 3.0 if "conv1" in name else two_alphas(name)


def attention_differs(name: str) -> float:
    return 3.0 if "to_q" in name else two_alphas(name)


def text_attention_differs(name: str) -> float:
    return 2.0 if "q_proj" in name else two_alphas(name)


def over_rank(alpha: Scale) -> Scale:
    return lambda name: alpha(name) / RANKS[name.partition(".")[0]]


def with_old_names(given: Updates) -> Tensors:
    """Those of diffusers before PEFT: `attn1.processor.to_q_lora.down.weight`."""
    tensors: Tensors = {}
    for name, (A, B) in given.items():
        if not name.startswith("unet") or ".attn" not in name:
            continue
        parent, _, own = name.replace("to_out.0", "to_out").rpartition(".")
        start = f"{parent}.processor.{own}_lora"
        tensors |= {f"{start}.down.weight": A, f"{start}.up.weight": B}
    return tensors


def comfyui(given: Updates) -> Tensors:
    return {key.replace("unet.", "diffusion_model.", 1): t for key, t in in_diffusers_names(given).items()}


CONV = "unet.down_blocks.0.resnets.0.conv1.alpha"
FILES: dict[str, tuple[Callable[[Updates], Tensors], dict[str, Any] | None, Scale, str | None]] = {
    "two components, a config of each": (in_diffusers_names, BOTH, two_scales, None),
    "two components, no config": (in_diffusers_names, None, one, None),
    "kohya": (in_kohyas_names_with_alphas, None, two_scales, None),
    "kohya without alphas": (in_kohyas_names, None, one, None),
    "kohya, alphas of convolutions": (
        lambda u: in_kohyas_names(u, convolutions_differ),
        None,
        over_rank(convolutions_differ),
        None,
    ),
    "kohya, alphas of attention": (
        lambda u: in_kohyas_names(u, attention_differs),
        None,
        over_rank(attention_differs),
        "alphas of attention",
    ),
    "kohya, alphas of a text encoder": (
        lambda u: in_kohyas_names(u, text_attention_differs),
        None,
        over_rank(text_attention_differs),
        "alphas of attention",
    ),
    "kohya and a config": (in_kohyas_names_with_alphas, BOTH, two_scales, "scales told twice"),
    "kohya, a part of another kind": (
        lambda u: in_kohyas_names_with_alphas(u) | {"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)},
        None,
        two_scales,
        "converted names",
    ),
    "a component without a config": (
        in_diffusers_names,
        headers({"unet": 8.0}),
        two_scales,
        "component without a config",
    ),
    "an alpha among diffusers' names": (
        lambda u: in_diffusers_names(u) | {CONV: torch.tensor(8.0)},
        BOTH,
        two_scales,
        "stray alpha",
    ),
    "no component": (
        lambda u: {key.partition(".")[2]: t for key, t in in_diffusers_names(u).items()},
        None,
        one,
        "prefix",
    ),
    "a rank unlike the config's": (
        lambda u: {key: t[:3] if "lora_A" in key and "unet" in key else t for key, t in in_diffusers_names(u).items()},
        BOTH,
        two_scales,
        "rank of the config",
    ),
    "ComfyUI's names of a UNet": (comfyui, None, one, "converted names"),
    "an unknown module": (
        lambda u: {key.replace("conv1", "conv7"): t for key, t in in_diffusers_names(u).items()},
        None,
        one,
        "unknown module",
    ),
}


@pytest.mark.parametrize("case", list(FILES))
def test_a_file_is_right_where_diffusers_computes_what_it_means(case: str, tmp_path: Path) -> None:
    change, header, scale, broken = FILES[case]
    given = SD.updates()
    folder = write(tmp_path / "lora", change(given), header)
    try:
        right = SD.loaded(folder).distance(SD.added(given, scale)) < 1e-4
    except (ValueError, RuntimeError, KeyError):
        right = False
    assert right == (broken is None)

    report = rankwise.check_export(folder, "diffusers", base=SD.save(tmp_path / "base"))
    assert report.base_seen
    rules = {problem.rule for problem in report.problems}
    assert broken in rules if broken else not rules


def test_names_of_older_versions_of_diffusers(tmp_path: Path) -> None:
    given = {name: pair for name, pair in SD.updates().items() if name.startswith("unet") and ".attn" in name}
    folder = write(tmp_path / "lora", with_old_names(given))
    assert (
        SD.loaded(folder).distance(SD.added(given, one))
        < 1e-4
        < SD.added(given, one).distance(SD.answers(SD.components()))
    )
    assert rankwise.check_export(folder, "diffusers", base=tiny_unet()).problems == []


def test_a_base_of_one_component_says_nothing_of_the_others(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", in_diffusers_names(SD.updates()), BOTH)
    for base in (tiny_unet(), tiny_text_encoder()):
        assert rankwise.check_export(folder, "diffusers", base=base).problems == []
    report = rankwise.check_export(folder, "diffusers")
    assert report.problems == []
    assert not report.base_seen


def test_a_file_of_any_name_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", in_kohyas_names_with_alphas(SD.updates()), name="my style.safetensors")
    assert rankwise.check_export(folder, "diffusers", base=tiny_unet()).problems == []
    assert rankwise.check_export(folder / "my style.safetensors", "diffusers", base=tiny_unet()).problems == []
    assert "diffusers' file" in {problem.rule for problem in rankwise.check_export(folder, "peft").problems}


# --- SDXL -------------------------------------------------------------------------------------------------------------


def numbered_in_both_ways(given: Updates) -> Tensors:
    """The same LoRA with kohya's two names for each module of the UNet."""
    of_unet = {name: (A.clone(), B.clone()) for name, (A, B) in given.items() if name.startswith("unet")}
    return in_kohyas_names_of_sdxl(given, two_alphas) | in_kohyas_names_with_alphas(of_unet)


XL_FILES: dict[str, tuple[Callable[[Updates], Tensors], Scale, str | None]] = {
    "diffusers": (in_diffusers_names, one, None),
    "kohya": (lambda u: in_kohyas_names_of_sdxl(u, two_alphas), two_scales, None),
    "kohya without alphas": (in_kohyas_names_of_sdxl, one, None),
    "blocks numbered in both ways": (numbered_in_both_ways, two_scales, "blocks by two numberings"),
    "a block that is not there": (
        lambda u: {
            key.replace("input_blocks_4_1", "input_blocks_9_1"): t for key, t in in_kohyas_names_of_sdxl(u).items()
        },
        one,
        "converted names",
    ),
}


@pytest.mark.parametrize("case", list(XL_FILES))
def test_a_file_of_sdxl_is_right_where_diffusers_computes_what_it_means(case: str, tmp_path: Path) -> None:
    change, scale, broken = XL_FILES[case]
    given = {name: pair for name, pair in SDXL.updates().items() if "text_encoder_2" not in name or "kohya" in case}
    folder = write(tmp_path / "lora", change(given))
    if broken is None:
        assert SDXL.loaded(folder).distance(SDXL.added(given, scale)) < 1e-4
        assert SDXL.added(given, scale).distance(SDXL.answers(SDXL.components())) > 1e-2
    report = rankwise.check_export(folder, "diffusers", base=SDXL.save(tmp_path / "base"))
    rules = {problem.rule for problem in report.problems}
    assert broken in rules if broken else not rules
