"""LoRAs of pipelines, shrunk and merged: diffusers computes with what was written what dense updates give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rankwise
from pipelines import (
    BOTH,
    DIFFUSERS,
    METADATA,
    SD,
    SDXL,
    TWO_HEADERS,
    Scale,
    Tensors,
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
from rankwise.cli.main import app
from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.merge import merge_adapters

FORMS: dict[str, tuple[Callable[[Updates], Tensors], dict[str, Any] | None, Scale]] = {
    "configs in the header": (in_diffusers_names, BOTH, two_scales),
    "no scales": (in_diffusers_names, None, one),
    "kohya": (in_kohyas_names_with_alphas, None, two_scales),
    "kohya without alphas": (in_kohyas_names, None, one),
}


def header_of(folder: Path) -> dict[str, Any]:
    with safe_open(folder / DIFFUSERS, "pt") as opened:
        return json.loads((opened.metadata() or {}).get(METADATA, "{}"))


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_file_that_loses_nothing_computes_the_same(form: str, layout: str, tmp_path: Path) -> None:
    change, header, scale = FORMS[form]
    given = SD.updates()
    folder = write(tmp_path / "lora", change(given), header)
    rankwise.shrink_adapter(folder, tmp_path / "small", energy=1.0, layout=layout)
    found = SD.loaded(tmp_path / "small")
    assert found.distance(SD.added(given, scale)) < 1e-4
    assert found.distance(SD.answers(SD.components())) > 0.1
    assert set(load_file(tmp_path / "small" / DIFFUSERS)) == set(load_file(folder / DIFFUSERS))
    assert {key.partition(".")[0] for key in header_of(tmp_path / "small")} == (set(TWO_HEADERS) if header else set())


@pytest.mark.parametrize("form", list(FORMS))
def test_a_smaller_file_holds_the_best_updates_of_its_ranks(form: str, tmp_path: Path) -> None:
    change, header, scale = FORMS[form]
    given = SD.updates()
    folder = write(tmp_path / "lora", change(given), header)
    report = rankwise.shrink_adapter(folder, tmp_path / "small", rank=1)
    best, lost, whole = {}, 0.0, 0.0
    for name, (A, B) in given.items():
        U, s, V = torch.linalg.svd(scale(name) * B.flatten(1) @ A.flatten(1), full_matrices=False)
        best[name] = (s[:1, None] * V[:1]).view(1, *A.shape[1:]), U[:, :1].view(-1, 1, *B.shape[2:])
        lost, whole = lost + float(s[1:].square().sum()), whole + float(s.square().sum())
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert SD.loaded(tmp_path / "small").distance(SD.added(best, one)) < 1e-4
    assert rankwise.check_export(tmp_path / "small", "diffusers").problems == []


@pytest.mark.parametrize("form", list(FORMS))
def test_a_merge_adds_dense_updates(form: str, tmp_path: Path) -> None:
    change, header, scale = FORMS[form]
    first, second = SD.updates(0), SD.updates(7)
    folders = [write(tmp_path / str(n), change(given), header) for n, given in enumerate((first, second))]
    merge_adapters(folders, tmp_path / "sum", weights=[0.7, 0.3])
    sums = {
        name: (torch.cat([A, second[name][0]]), torch.cat([0.7 * B, 0.3 * second[name][1]], 1))
        for name, (A, B) in first.items()
    }
    assert SD.loaded(tmp_path / "sum").distance(SD.added(sums, scale)) < 1e-4
    assert {key.partition(".")[0] for key in header_of(tmp_path / "sum")} == (set(TWO_HEADERS) if header else set())


def test_ranks_that_differ_between_modules(tmp_path: Path) -> None:
    given = {name: (A[:1], B[:, :1]) if "to_q" in name else (A, B) for name, (A, B) in SD.updates().items()}
    ranks = {name.partition(".")[2]: 1 for name in given if "to_q" in name}
    folder = write(tmp_path / "lora", in_diffusers_names(given), BOTH | {"unet.rank_pattern": ranks})
    scaled = {name: (A, B * (8.0 if "to_q" in name else two_scales(name))) for name, (A, B) in given.items()}
    assert SD.loaded(folder).distance(SD.added(scaled, one)) < 1e-4
    for layout in ("uniform", "compact"):
        rankwise.shrink_adapter(folder, tmp_path / layout, energy=1.0, layout=layout)
        assert SD.loaded(tmp_path / layout).distance(SD.added(scaled, one)) < 1e-4


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
BROKEN: dict[str, tuple[Tensors, dict[str, Any] | None, str]] = {
    "LoHa": ({f"{CONV}.hada_w1_a": torch.ones(2, 2)}, None, "hada_w1_a"),
    "DoRA": ({f"{CONV}.dora_scale": torch.ones(2, 2)}, None, "dora_scale"),
    "a middle factor": ({f"{CONV}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, None, "lora_mid"),
    "NaN": ({f"{CONV}.lora_up.weight": torch.full((32, 4, 1, 1), torch.nan)}, None, "NaN or infinity"),
    "half": ({"lora_unet_mid.lora_down.weight": torch.ones(2, 2)}, None, "half of the update of 'lora_unet_mid'"),
    "scales twice": ({}, BOTH, "gives scales twice"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_what_is_more_than_updates_is_refused_by_name(case: str, tmp_path: Path) -> None:
    extra, header, match = BROKEN[case]
    folder = write(tmp_path / "lora", in_kohyas_names_with_alphas(SD.updates()) | extra, header)
    with pytest.raises(AdapterFileError, match=match):
        rankwise.shrink_adapter(folder, tmp_path / "small", rank=1)
    assert not (tmp_path / "small").exists()


def test_a_header_without_a_component_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "lora", in_diffusers_names(SD.updates()), headers({"unet": 8.0}))
    with pytest.raises(AdapterFileError, match="holds configs, and none of text_encoder"):
        rankwise.shrink_adapter(folder, tmp_path / "small", rank=1)


def test_what_cannot_be_added_is_not_merged(tmp_path: Path) -> None:
    given = SD.updates()
    diffusers = write(tmp_path / "diffusers", in_diffusers_names(given))
    kohya = write(tmp_path / "kohya", in_kohyas_names(given))
    with pytest.raises(RankwiseError, match=r"names modules as diffusers does and .*kohya as kohya does"):
        merge_adapters([diffusers, kohya], tmp_path / "sum")
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q"]}))
    pair = {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(4, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    with pytest.raises(RankwiseError, match=r"diffusers is the LoRA of a pipeline and .*peft is not"):
        merge_adapters([folder, diffusers], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


# --- SDXL -------------------------------------------------------------------------------------------------------------


def of_sdxl(seed: int, folder: Path) -> tuple[Updates, Path]:
    given = SDXL.updates(seed)
    return given, write(folder, in_kohyas_names_of_sdxl(given, two_alphas))


def test_kohyas_names_of_sdxl_are_inspected_shrunk_and_merged(tmp_path: Path) -> None:
    first, folder = of_sdxl(0, tmp_path / "first")
    second, other = of_sdxl(7, tmp_path / "second")
    printed = CliRunner().invoke(app, ["inspect", str(folder)])
    assert printed.exception is None
    norm = sum(float((two_scales(name) * B.flatten(1) @ A.flatten(1)).square().sum()) for name, (A, B) in first.items())
    assert f"‖ΔW‖_F {norm**0.5:.4g} over all modules" in printed.output

    rankwise.shrink_adapter(folder, tmp_path / "same", energy=1.0)
    assert SDXL.loaded(tmp_path / "same").distance(SDXL.added(first, two_scales)) < 1e-4
    merge_adapters([folder, other], tmp_path / "sum", weights=[0.7, 0.3])
    sums = {
        name: (torch.cat([A, second[name][0]]), torch.cat([0.7 * B, 0.3 * second[name][1]], 1))
        for name, (A, B) in first.items()
    }
    assert SDXL.loaded(tmp_path / "sum").distance(SDXL.added(sums, two_scales)) < 1e-4


def test_two_names_of_one_module_are_not_merged(tmp_path: Path) -> None:
    """diffusers would leave out one of them."""
    given, folder = of_sdxl(0, tmp_path / "one")
    of_unet = {name: pair for name, pair in given.items() if name.startswith("unet")}
    other = write(tmp_path / "two", in_kohyas_names(of_unet, two_alphas))
    with pytest.raises(
        RankwiseError, match=r"one has a UNet's blocks by the numbers of Stability AI and .*two by those"
    ):
        merge_adapters([folder, other], tmp_path / "sum")
    of_text = {name: pair for name, pair in given.items() if name.startswith("text_encoder.")}
    texts = [
        write(tmp_path / "te1", in_kohyas_names_of_sdxl(of_text)),
        write(tmp_path / "te", {key.replace("te1", "te"): t for key, t in in_kohyas_names_of_sdxl(of_text).items()}),
    ]
    with pytest.raises(RankwiseError, match="two names of one module"):
        merge_adapters(texts, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
