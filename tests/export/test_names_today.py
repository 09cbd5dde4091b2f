"""Adapters with names of an older transformers keep their meaning: stock PEFT computes the same before and after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise
from rankwise.errors import AdapterFileError
from rankwise.export.check import check_export
from rankwise.export.fix import fix_adapter
from rankwise.export.merge import merge_adapters
from rankwise.export.reader import read_lora
from rankwise.export.shrink import shrink_adapter
from tiny_models import (
    PATCHES,
    TOKENS,
    TOKENS_AND_PIXELS,
    answers,
    gemma3,
    llava,
    mixtral,
    qwen2_5_vl,
    saved_adapter,
    saved_base,
)

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


MODELS: dict[str, tuple[Callable[[], Any], Any]] = {"llava": (llava, TOKENS_AND_PIXELS), "gemma3": (gemma3, TOKENS)}
HEADLESS: dict[str, tuple[Callable[[], Any], Any]] = {**MODELS, "qwen2.5-vl": (qwen2_5_vl, PATCHES)}
NEW, OLD = "model.language_model.layers", "language_model.model.layers"
"""The names of the language model's layers since transformers 4.52, and before."""


@dataclass
class Case:
    """A base model, and two adapters of it: one with the names of today, and one with those of old."""

    base: Path
    new: Path
    old: Path
    inputs: Any

    def answer(self, adapter: Path) -> Tensor:
        """What stock PEFT computes with an adapter."""
        return answers(PeftModel.from_pretrained(opened(self.base), str(adapter)), self.inputs)

    def delta(self, adapter: Path) -> dict[str, Tensor]:
        """What stock PEFT adds to every weight."""
        before = dict(opened(self.base).named_parameters())
        merged: Any = PeftModel.from_pretrained(opened(self.base), str(adapter)).merge_and_unload()
        return {name: (p - before[name]).detach() for name, p in merged.named_parameters()}


def opened(base: Path) -> Any:
    is_mixtral = json.loads((base / "config.json").read_text())["model_type"] == "mixtral"
    cls = tf.AutoModelForCausalLM if is_mixtral else tf.AutoModelForImageTextToText
    return cls.from_pretrained(base)


@pytest.fixture(params=list(MODELS))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    make, inputs = MODELS[request.param]
    base = saved_base(tmp_path / "base", make)
    targets = {"target_modules": r".*language_model.*(q_proj|v_proj)", "r": 3}
    new = saved_adapter(tmp_path / "new", opened(base), **targets)
    other = saved_adapter(tmp_path / "other", opened(base), seed=1, **targets)
    old = tmp_path / "old"
    shutil.copytree(other, old)
    tensors = {key.replace(NEW, OLD): tensor for key, tensor in load_file(other / TENSORS).items()}
    assert any(OLD in key for key in tensors)
    save_file(tensors, old / TENSORS, {"format": "pt"})
    return Case(base, new, old, inputs)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["compact", "uniform"])
def test_a_shrunk_file_is_loaded_by_peft(case: Case, layout: str, tmp_path: Path) -> None:
    before = case.delta(case.old)
    shrink_adapter(case.old, tmp_path / "same", energy=1.0, layout=layout)
    torch.testing.assert_close(case.answer(tmp_path / "same"), case.answer(case.old), rtol=1e-4, atol=1e-5)
    close(case.delta(tmp_path / "same"), before)
    report = shrink_adapter(case.old, tmp_path / "small", budget=0.5, layout=layout)
    small = case.delta(tmp_path / "small")
    lost = sum(float((small[name] - W).square().sum()) for name, W in before.items()) ** 0.5
    whole = sum(float(W.square().sum()) for W in before.values()) ** 0.5
    assert report.relative_error == pytest.approx(lost / whole, rel=1e-3)
    assert all(NEW in name for name in report.ranks)


def test_ranks_of_their_own_and_modules_left_out_keep_their_names(case: Case, tmp_path: Path) -> None:
    """Ranks and left-out modules are told by name in the config, which no loader maps."""
    tensors = load_file(case.old / TENSORS)
    for key in tensors:
        if "layers.0.self_attn.q_proj.lora_B" in key:
            tensors[key][:, 1:] = 0
        if "layers.1.self_attn.v_proj.lora_B" in key:
            tensors[key].zero_()
    save_file(tensors, case.old / TENSORS, {"format": "pt"})
    report = shrink_adapter(case.old, tmp_path / "small", energy=1.0)
    assert set(report.ranks.values()) == {0, 1, 3}
    close(case.delta(tmp_path / "small"), case.delta(case.old))


@pytest.mark.parametrize("layout", ["compact", "uniform"])
def test_old_and_new_merge_into_one_set_of_modules(case: Case, layout: str, tmp_path: Path) -> None:
    report = merge_adapters([case.old, case.new], tmp_path / "sum", weights=[0.7, 0.3], layout=layout)
    assert all(NEW in name for name in report.ranks)
    old, new = case.delta(case.old), case.delta(case.new)
    close(case.delta(tmp_path / "sum"), {name: 0.7 * old[name] + 0.3 * new[name] for name in old})


def test_an_old_adapter_goes_on_training(case: Case) -> None:
    wanted = case.answer(case.old)
    model = rankwise.import_lora(opened(case.base), case.old, rankwise.SoraConfig(r=4))
    torch.testing.assert_close(answers(model, case.inputs), wanted, rtol=1e-4, atol=1e-5)


def test_check_export_finds_nothing_wrong(case: Case) -> None:
    assert not rankwise.check_export(case.old, "peft", base=case.base).problems


def test_a_choice_by_names_of_old_becomes_one_of_today(case: Case, tmp_path: Path) -> None:
    """Such a file is loaded by PEFT under the transformers that it was trained with, and by none of today."""
    config = json.loads((case.old / CONFIG).read_text())
    names = [f"{OLD}.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")]
    wanted = case.delta(case.old)
    (case.old / CONFIG).write_text(json.dumps(config | {"target_modules": names}))
    shrink_adapter(case.old, tmp_path / "small", energy=1.0)
    close(case.delta(tmp_path / "small"), wanted)


def test_without_the_base_model_names_stay(case: Case, tmp_path: Path) -> None:
    config = json.loads((case.old / CONFIG).read_text())
    (case.old / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    assert all(OLD in name for name in shrink_adapter(case.old, tmp_path / "small", rank=2).ranks)
    assert all(NEW in name for name in shrink_adapter(case.old, tmp_path / "named", rank=2, base=case.base).ranks)
    with pytest.raises(AdapterFileError, match="does not open"):
        shrink_adapter(case.old, tmp_path / "not", rank=2, base=tmp_path / "gone")


def test_both_names_of_one_module_are_refused(case: Case, tmp_path: Path) -> None:
    save_file(load_file(case.old / TENSORS) | load_file(case.new / TENSORS), case.old / TENSORS, {"format": "pt"})
    with pytest.raises(AdapterFileError, match="one module under its old name and under its new one"):
        shrink_adapter(case.old, tmp_path / "small", rank=2)


def test_experts_that_became_one_parameter_keep_their_names(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", mixtral)
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    saved_adapter(tmp_path / "lora", model, target_modules=["q_proj"])
    expert = "base_model.model.model.layers.0.block_sparse_moe.experts"
    more = {
        f"{expert}.{i}.w2.lora_{part}.weight": torch.randn(shape)
        for i in range(4)
        for part, shape in (("A", (2, 48)), ("B", (32, 2)))
    }
    save_file(load_file(tmp_path / "lora" / TENSORS) | more, tmp_path / "lora" / TENSORS, {"format": "pt"})
    report = shrink_adapter(tmp_path / "lora", tmp_path / "small", rank=1)
    assert report.ranks.keys() == read_lora(tmp_path / "lora").updates.keys()


def saved_experts(folder: Path, base: Path) -> Path:
    """An adapter of Mixtral as transformers 4 named it, each expert's update of another size than the next one's."""
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    saved_adapter(folder, model, target_modules=["q_proj"])
    tensors = load_file(folder / TENSORS)
    for layer in range(2):
        for expert in range(4):
            for name, (out, into) in {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.lora_"
                second = 0.1 + expert  # the share of the second direction
                tensors[f"{key}A.weight"] = torch.randn(2, into) * torch.tensor([[1.0], [second]])
                tensors[f"{key}B.weight"] = 0.2 * torch.randn(out, 2)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    config["target_modules"] = ["q_proj", "w1", "w2", "w3"]
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("layout", ["compact", "uniform"])
@pytest.mark.parametrize("rule", [{"energy": 0.8}, {"budget": 0.3}, {"rank": 1}])
def test_experts_that_became_one_parameter_can_still_be_joined(
    rule: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    """PEFT joins the updates of all experts into one, for which they must all be there, at the config's rank."""
    base = saved_base(tmp_path / "base", mixtral)
    saved_experts(tmp_path / "lora", base)
    case = Case(base, tmp_path / "lora", tmp_path / "lora", TOKENS)
    wanted = case.delta(tmp_path / "lora")
    report = shrink_adapter(tmp_path / "lora", tmp_path / "small", layout=layout, **rule)
    found = case.delta(tmp_path / "small")
    assert "rank" in rule or len(set(report.ranks.values())) > 1
    lost = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    whole = sum(float(tensor.square().sum()) for tensor in wanted.values())
    assert (lost / whole) ** 0.5 == pytest.approx(report.relative_error, rel=1e-3)


# --- adapters trained on AutoModel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("name", HEADLESS)
def test_names_of_a_model_without_a_head_are_not_read_as_old_ones(name: str, task: str | None, tmp_path: Path) -> None:
    """`language_model.layers` is LLaVA's without a head today, and was with one before transformers 4.52."""
    make, inputs = HEADLESS[name]
    base = saved_base(tmp_path / "base", make)

    def bare() -> Any:
        return tf.AutoModel.from_pretrained(base)

    for seed in (0, 1):
        folder = saved_adapter(tmp_path / str(seed), bare(), seed, target_modules=["q_proj", "down_proj"])
        config = json.loads((folder / CONFIG).read_text())
        config |= {"task_type": task, "auto_mapping": None, "base_model_name_or_path": str(base)}
        (folder / CONFIG).write_text(json.dumps(config))
    first, second = tmp_path / "0", tmp_path / "1"

    def answer(adapter: Path) -> Tensor:
        return answers(PeftModel.from_pretrained(bare(), str(adapter)), inputs)

    shrink_adapter(first, tmp_path / "small", energy=1.0)
    fix_adapter(first, tmp_path / "mended", base=base)
    merge_adapters([first, second], tmp_path / "merged", weights=[1.0, 1e-9])
    for written in ("small", "mended", "merged"):
        torch.testing.assert_close(answer(tmp_path / written), answer(first), rtol=1e-4, atol=1e-5)
    assert float((answer(first) - answers(bare(), inputs)).abs().max()) > 0.1
    assert check_export(first, "peft", base=base).problems == []
