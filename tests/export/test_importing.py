"""A plain LoRA, ours or stock PEFT's, goes on training under another method from the very same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from test_conformance import ROWS, adapted, config_of, logits, optimizer_of, train
from torch import Tensor

import rankwise
from cases import CASES, Case
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import AdapterFileError, ArgumentError

Batch = dict[str, Tensor]
REFUSED = ("sorsa", "nblora", "deep")


@pytest.fixture
def plain(tmp_path: Path, batch: Batch) -> Path:
    """A trained adapter of stock PEFT: two ranks, rslora, a classifier beside."""
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"query": 2},
        alpha_pattern={"value": 5},
        target_modules=["query", "value", "dense"],
        exclude_modules=["pooler.dense"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(tiny_bert(), config)
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), batch, 5)
    model.save_pretrained(str(tmp_path / "plain"))
    return tmp_path / "plain"


def config(name: str, **fields: Any) -> Any:
    return CONFIGS[name](**{"r": 8} | CASES[name].alone | fields)


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_a_stock_adapter_is_taken_up_exactly_and_trains_on(name: str, plain: Path, batch: Batch) -> None:
    expected = logits(PeftModel.from_pretrained(tiny_bert(), str(plain)).eval(), batch)
    model = rankwise.import_lora(tiny_bert(), plain, config(name)).eval()
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        before = model(**batch).loss
    train(model, optimizer_of(model), batch, 8)
    with torch.no_grad():
        assert model(**batch).loss < before
    assert rankwise.status(model).rules_run == 8


@pytest.mark.parametrize("name", REFUSED)
def test_methods_of_another_form_refuse_with_the_reason(name: str, plain: Path) -> None:
    with pytest.raises(ArgumentError, match="`config` must be of a method that can hold any update"):
        rankwise.import_lora(tiny_bert(), plain, config(name))


@ROWS
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_every_export_is_imported_again(name: str, case: Case, layout: str, batch: Batch, tmp_path: Path) -> None:
    model = adapted(name, case)
    train(model, optimizer_of(model), batch, 12)
    rankwise.export_lora(model, tmp_path / "lora", layout=layout)
    again = rankwise.import_lora(tiny_bert(), tmp_path / "lora", config("lora")).eval()
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=1e-5, atol=1e-5)
    dense = {module: f.delta() for module, f in rankwise.factors(model).items()}
    for module, f in rankwise.factors(again).items():
        torch.testing.assert_close(f.delta(), dense[module], rtol=1e-4, atol=1e-6)


def test_the_scale_of_the_new_config_does_not_change_the_update(plain: Path, batch: Batch) -> None:
    one = rankwise.import_lora(tiny_bert(), plain, config("sora", lora_alpha=32)).eval()
    other = rankwise.import_lora(tiny_bert(), plain, config("sora")).eval()
    torch.testing.assert_close(logits(one, batch), logits(other, batch), rtol=1e-5, atol=1e-5)


def test_a_second_adapter_beside_another(plain: Path, batch: Batch) -> None:
    model = get_peft_model(tiny_bert(), config_of("nnm", CASES["nnm"])).eval()
    first = logits(model, batch)
    model = rankwise.import_lora(model, plain, config("nnm"), adapter="taken").eval()
    expected = logits(PeftModel.from_pretrained(tiny_bert(), str(plain)).eval(), batch)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)


def test_too_little_rank_and_missing_modules_are_named(plain: Path) -> None:
    with pytest.raises(ArgumentError, match=r"`r` must be at least the adapter's rank at .*, 4; found 2"):
        rankwise.import_lora(tiny_bert(), plain, config("lora", r=2))
    with pytest.raises(ArgumentError, match="`target_modules` must include every module of the adapter"):
        rankwise.import_lora(tiny_bert(), plain, config("lora", target_modules=["query"]))


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    adapted("sora", CASES["sora"]).save_pretrained(str(tmp_path / "sora"))
    with pytest.raises(AdapterFileError, match="holds a sora adapter of rankwise: export it first"):
        rankwise.import_lora(tiny_bert(), tmp_path / "sora", config("lora"))
    with pytest.raises(AdapterFileError, match="holds no LoRA adapter"):
        rankwise.import_lora(tiny_bert(), tmp_path, config("lora"))
    dora = get_peft_model(tiny_bert(), peft.LoraConfig(use_dora=True, target_modules=["query"]))
    dora.save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(AdapterFileError, match="DoRA"):
        rankwise.import_lora(tiny_bert(), tmp_path / "dora", config("lora"))
