"""torch's default dtype, which scripts and model loaders change, changes nothing of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import rankwise
from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in CASES),
    *((name, {"init_weights": False}) for name in CASES),
    ("deep", {"init": "random"}),
    ("nblora", {"norm": "nuclear"}),
    ("nblora", {"parameterization": "svd"}),
    ("salora", {"density": 0.3}),
]


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def outcome(name: str, fields: dict[str, Any], dtype: torch.dtype, batch: Any, folder: Path) -> dict[str, Tensor]:
    """The adapter's state at its start and after twelve steps, and its export's factors."""
    base = tiny_bert()
    torch.manual_seed(5)
    torch.set_default_dtype(dtype)
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone
    model = get_peft_model(base, CONFIGS[name](**shared | fields)).train()
    found = {f"start {key}": value.clone() for key, value in model.state_dict().items() if "rankwise" in key}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found |= {f"end {key}": value.clone() for key, value in model.state_dict().items() if "rankwise" in key}
    rankwise.export_lora(model, folder)
    torch.set_default_dtype(torch.float32)
    plain = PeftModel.from_pretrained(tiny_bert(), str(folder))
    return found | {f"export {key}": value for key, value in plain.state_dict().items() if "lora_" in key}


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=[f"{name}-{fields}" for name, fields in VARIANTS])
def test_an_adapter_starts_trains_and_exports_the_same_under_any_default_dtype(
    name: str, fields: dict[str, Any], batch: Any, tmp_path: Path
) -> None:
    usual = outcome(name, fields, torch.float32, batch, tmp_path / "float32")
    for dtype in (torch.bfloat16, torch.float64):
        found = outcome(name, fields, dtype, batch, tmp_path / str(dtype))
        assert found.keys() == usual.keys()
        assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in usual.items()}
        assert [key for key in usual if not torch.equal(found[key], usual[key])] == []
