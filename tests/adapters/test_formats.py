"""Adapters of the first saved form are read; what is written is of the present one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import rankwise
from cases import CASES, Case
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import AdapterFileError

ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
ADDED = (".closed", ".peaks", ".seed")


def trained(name: str, case: Case, batch: dict[str, Tensor]) -> Any:
    torch.manual_seed(2)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | case.alone
    model = get_peft_model(tiny_bert(), CONFIGS[name](**fields)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def without_added(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.endswith(ADDED)]:
        del tensors[key]


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch["input_ids"]).logits


@ROWS
def test_an_adapter_of_format_1_is_the_same_function(
    name: str, case: Case, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model = trained(name, case, batch)
    model.save_pretrained(str(tmp_path / "first"))
    rewrite(tmp_path / "first", without_added, rankwise_format=1)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "first")).eval()
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert rankwise.ranks(loaded) == rankwise.ranks(model)
    found = rankwise.export_lora(tmp_path / "first", tmp_path / "from folder", base=tiny_bert())
    assert found.ranks == rankwise.export_lora(model, tmp_path / "from model").ranks
    loaded.save_pretrained(str(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["rankwise_format"] == 2
    assert any(key.endswith(".peaks") for key in load_file(tmp_path / "again" / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_a_whole_state_dict_of_format_1_loads_strictly(name: str, batch: dict[str, Tensor]) -> None:
    """As a checkpoint of Accelerate's holds it, which reads no config."""
    model = trained(name, CASES[name], batch)
    first = {key: t.clone() for key, t in model.state_dict().items()}
    without_added(first)
    other = trained(name, CASES[name], {key: t.flip(0) for key, t in batch.items()})
    other.load_state_dict(first)
    assert torch.equal(logits(other, batch), logits(model, batch))
    assert not any(t.any() for key, t in other.state_dict().items() if key.endswith(ADDED))


def test_a_part_of_a_state_dict_resets_nothing(batch: dict[str, Tensor]) -> None:
    model = trained("adalora", CASES["adalora"], batch)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert any(t.any() for key, t in before.items() if key.endswith(".closed"))
    model.load_state_dict({key: t for key, t in before.items() if key.endswith(".P")}, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_file_of_format_2_must_hold_what_is_closed(batch: dict[str, Tensor], tmp_path: Path) -> None:
    trained("adalora", CASES["adalora"], batch).save_pretrained(str(tmp_path / "saved"))
    rewrite(tmp_path / "saved", without_added)
    with pytest.raises(AdapterFileError, match=r"must hold closed of .* with shape \(6,\); found None"):
        rankwise.export_lora(tmp_path / "saved", tmp_path / "export", base=tiny_bert())
