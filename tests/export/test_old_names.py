"""Adapters with names that the base model's modules had years ago: mended, shrunk, merged, and merged into the base.

What a module was called is read from the base model's own files, which keep the names of old. The right value is what
stock PEFT computes with the adapter under the names of today.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise
from rankwise.errors import RankwiseError
from rankwise.export.check import check_export
from rankwise.export.into_base.merge import merge_into_base
from rankwise.export.merge import merge_adapters
from rankwise.export.shrink import shrink_adapter
from tiny_models import MODELS, answers, off, opened, saved_adapter, saved_base

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
WITHIN = re.compile(r"\.(lora_|base_layer\.|token_adapter\.|weight$|bias$)")


def names_of_old(base: Path, model: Any) -> dict[str, str]:
    """What the base model's files call each module: the one whose weight they hold under another name."""
    stored = load_file(base / "model.safetensors")
    found = {}
    for name, weight in model.state_dict().items():
        old = next((key for key, tensor in stored.items() if torch.equal(tensor, weight)), None)
        if old is not None and name.endswith(".weight"):
            found[name.removesuffix(".weight")] = old.removesuffix(".weight")
    return found


def with_names_of_old(adapter: Path, folder: Path, old_names: dict[str, str], **entries: Any) -> Path:
    """A copy of an adapter with the names of old in its keys, and with other entries in its config."""
    shutil.copytree(adapter, folder)
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(adapter / TENSORS).items():
        name = key.removeprefix(PREFIX)
        place = WITHIN.search(name)
        assert place is not None, name
        module, rest = name[: place.start()], name[place.start() :]
        tensors[f"{PREFIX}{old_names.get(module, module)}{rest}"] = tensor
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    config = json.loads((adapter / CONFIG).read_text()) | entries
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@dataclass
class Old:
    """An adapter of today, and what the config of the same adapter said when modules had their names of old."""

    model: str
    fields: dict[str, Any]
    entries: dict[str, Any] = field(default_factory=dict)


LANGUAGE = r".*language_model.*(q_proj|v_proj)"
OLD: dict[str, Old] = {
    "ViT": Old(
        "vit",
        {"target_modules": ["q_proj", "v_proj", "fc1"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"fc1": 5}},
        {
            "target_modules": ["query", "value", "intermediate.dense"],
            "rank_pattern": {"query": 3},
            "alpha_pattern": {"intermediate.dense": 5},
        },
    ),
    "ViT, its head in full": Old(
        "vit",
        {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        {"target_modules": ["query"]},
    ),
    "ViT, DoRA": Old("vit", {"target_modules": ["q_proj"], "use_dora": True}, {"target_modules": ["query"]}),
    "ViT, biases": Old("vit", {"target_modules": ["q_proj"], "bias": "lora_only"}, {"target_modules": ["query"]}),
    "ViT, a layer by its number": Old(
        "vit",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "DINOv2": Old("dinov2", {"target_modules": ["q_proj", "fc1"]}, {"target_modules": ["query", "fc1"]}),
    "LLaVA": Old("llava", {"target_modules": LANGUAGE}),
    "LLaVA, all of it": Old("llava", {"target_modules": "all-linear"}),
    "LLaVA, its head in full": Old("llava", {"target_modules": LANGUAGE, "modules_to_save": ["lm_head"]}),
    "LLaVA, its embeddings in full": Old(
        "llava",
        {"target_modules": LANGUAGE, "modules_to_save": ["model.language_model.embed_tokens"]},
        {"modules_to_save": ["language_model.model.embed_tokens"]},
    ),
    "LLaVA, embeddings": Old("llava", {"target_modules": ["embed_tokens", "linear_1"]}),
    "LLaVA, rows of embeddings": Old("llava", {"target_modules": LANGUAGE, "trainable_token_indices": [4, 5]}),
    "LLaVA, a rank by name": Old(
        "llava",
        {"target_modules": LANGUAGE, "rank_pattern": {"model.language_model.layers.1.self_attn.q_proj": 3}},
        {"rank_pattern": {"language_model.model.layers.1.self_attn.q_proj": 3}},
    ),
    "Gemma 3": Old("gemma3", {"target_modules": LANGUAGE}),
    "Qwen2.5-VL": Old("qwen2.5-vl", {"target_modules": ["q_proj", "qkv", "down_proj"]}),
}


@dataclass
class Case:
    base: Path
    today: Path
    old: Path
    cls: Any
    inputs: Any

    def answer(self, adapter: Path) -> Tensor:
        """What stock PEFT computes with an adapter."""
        return answers(PeftModel.from_pretrained(opened(self.base, self.cls)[0], str(adapter)), self.inputs)


def case_of(name: str, folder: Path) -> Case:
    old, tiny = OLD[name], MODELS[OLD[name].model]
    base, cls = saved_base(folder / "base", tiny.make), type(tiny.make())
    model = opened(base, cls)[0]
    old_names = names_of_old(base, model)
    today = saved_adapter(folder / "today", model, **old.fields)
    given = with_names_of_old(today, folder / "old", old_names, **old.entries)
    assert load_file(given / TENSORS).keys() != load_file(today / TENSORS).keys()
    return Case(base, today, given, cls, tiny.inputs)


@pytest.mark.parametrize("name", ["ViT", "Qwen2.5-VL", "LLaVA, all of it"])
def test_check_export_says_how_to_mend_what_peft_leaves_out(name: str, tmp_path: Path) -> None:
    case = case_of(name, tmp_path)
    sentences = [problem.sentence for problem in check_export(case.old, "peft", base=case.base).problems]
    assert any("today, which `rankwise fix` writes" in sentence for sentence in sentences)


@pytest.mark.parametrize("base_is_named", [True, False])
@pytest.mark.parametrize("name", list(OLD))
def test_a_mended_adapter_has_the_names_of_today(name: str, base_is_named: bool, tmp_path: Path) -> None:
    case = case_of(name, tmp_path)
    report = rankwise.fix_adapter(case.old, tmp_path / "out", base=case.base if base_is_named else None)
    assert any("the names that modules have today" in change for change in report.changes)
    wanted, found = load_file(case.today / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert torch.equal(case.answer(tmp_path / "out"), case.answer(case.today))
    assert check_export(tmp_path / "out", "peft", base=case.base).problems == []
    again = rankwise.fix_adapter(tmp_path / "out", tmp_path / "again", base=case.base if base_is_named else None)
    assert again.changes == ()


MORE_THAN_UPDATES = ("DoRA", "biases", "rows")
PLAIN = [name for name in OLD if not any(word in name for word in MORE_THAN_UPDATES)]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_shrunk_or_merged_computes_the_same_under_the_names_of_today(name: str, tmp_path: Path) -> None:
    case = case_of(name, tmp_path)
    wanted = case.answer(case.today)
    report = shrink_adapter(case.old, tmp_path / "small", energy=1.0)
    close(case.answer(tmp_path / "small"), wanted)
    merged = merge_adapters([case.old, case.today], tmp_path / "sum", weights=[0.7, 0.3])
    close(case.answer(tmp_path / "sum"), wanted)
    names = shrink_adapter(case.today, tmp_path / "as", rank=1).ranks.keys()
    assert report.ranks.keys() == merged.ranks.keys() == names


@pytest.mark.parametrize("name", list(OLD))
def test_what_is_merged_into_the_base_computes_the_same(name: str, tmp_path: Path) -> None:
    case = case_of(name, tmp_path)
    out = merge_into_base([case.old], case.base, tmp_path / "model")
    merged, lacking = opened(out, case.cls)
    assert not lacking
    wanted = case.answer(case.today)
    assert off(answers(merged, case.inputs), wanted) <= 1e-5
    assert off(answers(opened(case.base, case.cls)[0], case.inputs), wanted) > 1e-2


def test_a_module_under_both_names_is_refused(tmp_path: Path) -> None:
    case = case_of("ViT", tmp_path)
    both = load_file(case.old / TENSORS) | load_file(case.today / TENSORS)
    save_file(both, case.old / TENSORS, {"format": "pt"})
    for call in (
        lambda: rankwise.fix_adapter(case.old, tmp_path / "out"),
        lambda: merge_into_base([case.old], case.base, tmp_path / "out"),
    ):
        with pytest.raises(RankwiseError, match="has one module under its old name and under its new one"):
            call()
    assert not (tmp_path / "out").exists()


def test_without_a_base_model_names_stay(tmp_path: Path) -> None:
    case = case_of("ViT", tmp_path)
    config = json.loads((case.old / CONFIG).read_text())
    (case.old / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert rankwise.fix_adapter(case.old, tmp_path / "out").changes == ()
    assert load_file(tmp_path / "out" / TENSORS).keys() == load_file(case.old / TENSORS).keys()


def test_an_adapter_of_the_model_without_a_head(tmp_path: Path) -> None:
    tiny = MODELS["vit"]
    base = saved_base(tmp_path / "base", tiny.make)
    model = opened(base, tf.AutoModel)[0]
    old_names = {
        name.removeprefix("vit."): old.removeprefix("vit.")
        for name, old in names_of_old(base, opened(base, type(tiny.make()))[0]).items()
    }
    today = saved_adapter(tmp_path / "today", model, target_modules=["q_proj"], task_type="FEATURE_EXTRACTION")
    old = with_names_of_old(today, tmp_path / "old", old_names, target_modules=["query"])
    assert rankwise.fix_adapter(old, tmp_path / "out", base=base).changes
    wanted, found = load_file(today / TENSORS), load_file(tmp_path / "out" / TENSORS)
    assert found.keys() == wanted.keys()
    loaded = PeftModel.from_pretrained(opened(base, tf.AutoModel)[0], str(tmp_path / "out"))
    expected = PeftModel.from_pretrained(opened(base, tf.AutoModel)[0], str(today))
    assert torch.equal(answers(loaded, tiny.inputs), answers(expected, tiny.inputs))
