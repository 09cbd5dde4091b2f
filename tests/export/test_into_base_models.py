"""A merge into the base model's files computes what stock PEFT computes with the adapter, over many architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny_models import (
    MODELS,
    check_merged,
    opened,
    saved_adapter,
    saved_base,
    told,
)


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
