"""A config refuses what breaks a rule, in one sentence, when it is made."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

import rankwise
from conftest import tiny_bert
from rankwise.errors import AdapterFileError, ArgumentError

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("LoraConfig", {"r": 0}, "`r` must be a whole number ≥ 1; found 0"),
    ("LoraConfig", {"r": 2.5}, "`r` must be a whole number ≥ 1; found 2.5"),
    ("LoraConfig", {"r": True}, "`r` must be a whole number ≥ 1; found True"),
    ("LoraConfig", {"lora_alpha": 0}, "`lora_alpha` must be a number ≥ 1e-30; found 0"),
    ("LoraConfig", {"lora_dropout": 1.0}, r"`lora_dropout` must be a number in [0, 1); found 1.0"),
    ("LoraConfig", {"bias": "some"}, '`bias` must be "none", "all" or "lora_only"; found \'some\''),
    ("LoraConfig", {"rank_pattern": {"q": 0}}, "must be a whole number ≥ 1 (leave modules out with exclude_modules)"),
    (
        "LoraConfig",
        {"use_dora": True},
        "`use_dora` must be left out of LoraConfig: it belongs to PEFT's own LoRA",
    ),
    ("SoraConfig", {"lora_bias": False}, "`lora_bias` must be left out of SoraConfig"),
    ("LoraConfig", {"init_lora_weights": "pissa"}, "`init_lora_weights` must be True or False"),
    (
        "LoraConfig",
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "`layers_to_transform` must be left out",
    ),
    ("LoraConfig", {"layers_pattern": "layers"}, "`layers_pattern` must come with layers_to_transform"),
    ("NnmLoraConfig", {"nuclear_weight": -1.0}, "`nuclear_weight` must be a number ≥ 0; found -1.0"),
    ("NnmLoraConfig", {"nuclear_weight": float("nan")}, "`nuclear_weight` must be a number ≥ 0; found nan"),
    ("SoraConfig", {"sparse_weight": "a"}, "`sparse_weight` must be a number ≥ 0; found 'a'"),
    ("SoraConfig", {"gate_init": "zeros"}, "`gate_init` must be one of normal, ones; found 'zeros'"),
    ("SoraConfig", {"gate_lr": 0.0}, "`gate_lr` must be a number"),
    ("AdaLoraConfig", {"init_r": 4, "target_r": 8}, "`init_r` must be at least target_r (8); found 4"),
    ("AdaLoraConfig", {"beta1": 1.0}, "`beta1` must be a number in [0, 1); found 1.0"),
    (
        "AdaLoraConfig",
        {"total_step": 10, "tinit": 6, "tfinal": 4},
        "`tinit + tfinal` must be less than total_step (10)",
    ),
    ("AdaLoraConfig", {"importance": "guess"}, "`importance` must be one of smoothed, sensitivity, magnitude"),
    ("AdaLoraConfig", {"total_step": 0}, "`total_step` must be a whole number ≥ 1; found 0"),
    ("AdaLoraConfig", {"deltaT": 0}, "`deltaT` must be a whole number of steps ≥ 1"),
    ("AdaLoraConfig", {"tfinal": 7.3}, "`tfinal` must be a whole number of steps"),
    ("NnmLoraConfig", {"scale_by_frobenius": "no"}, "`scale_by_frobenius` must be True or False; found 'no'"),
    ("NnmLoraConfig", {"frobenius": "free"}, "`frobenius` must be one of differentiated, held, none; found 'free'"),
    ("LoraConfig", {"use_rslora": "yes"}, "`use_rslora` must be True or False; found 'yes'"),
    ("LoraConfig", {"init_weights": "gaussian"}, "`init_weights` must be True or False; found 'gaussian'"),
    ("LoraConfig", {"rank_pattern": {"q": True}}, "must be a whole number ≥ 1"),
    ("SorsaConfig", {"svd": "fast"}, "`svd` must be one of randomized, full; found 'fast'"),
    ("SorsaConfig", {"svd_iterations": 0}, "`svd_iterations` must be a whole number ≥ 1; found 0"),
    ("SorsaConfig", {"orth_reg_form": "max"}, "`orth_reg_form` must be one of mean, sum; found 'max'"),
]


@pytest.mark.parametrize(
    ("config", "fields", "sentence"), BAD, ids=[f"{c}-{next(iter(f))}-{i}" for i, (c, f, _) in enumerate(BAD)]
)
def test_bad_fields(config: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        getattr(rankwise, config)(**fields)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_module_lists_the_nearest_and_changes_nothing() -> None:
    model = tiny_bert()
    with pytest.raises(ArgumentError, match="the nearest names are query"):
        get_peft_model(model, rankwise.LoraConfig(target_modules=["quary"]))
    assert not any("rankwise" in name for name, _ in model.named_modules())


def test_unknown_module_to_save_lists_the_nearest() -> None:
    config = rankwise.LoraConfig(target_modules=["query"], modules_to_save=["clasifier"])
    with pytest.raises(ArgumentError, match=r"`modules_to_save` must name modules of the model .*classifier"):
        get_peft_model(tiny_bert(), config)


def test_loaded_values_are_checked_at_the_first_forward(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.LoraConfig(r=2, target_modules=["query"]))
    next(p for n, p in model.named_parameters() if n.endswith("default.A")).data[0, 0] = float("nan")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    with pytest.raises(AdapterFileError, match="tensor 'A' of the loaded adapter 'default' holds NaN or infinity"):
        loaded(torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize("how", ["by hand", "by module", "on disk", "by the base"])
def test_sorsas_start_is_rounded_with_its_parameters(how: str, tmp_path: Path) -> None:
    """A spell in bfloat16 rounds U, S and Vh; the update must still be 0 when nothing was trained."""
    base = tiny_bert().bfloat16() if how == "by the base" else tiny_bert()
    model = get_peft_model(base, rankwise.SorsaConfig(r=4, target_modules=["query"]))
    if how in ("by hand", "on disk"):
        for name, p in model.named_parameters():
            if "rankwise_tensors" in name:
                p.data = p.data.bfloat16()
    if how == "by module":
        model.bfloat16().float()
    if how == "on disk":
        model.save_pretrained(str(tmp_path))
        model = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    model(torch.zeros(1, 3, dtype=torch.long))
    for update in rankwise.factors(model).values():
        assert update.delta().float().abs().max() <= 1e-6


def test_module_of_another_kind_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match=r"name linear layers, Conv1D of transformers, Conv2d or Embedding; found '.*LayerNorm"
    ):
        get_peft_model(tiny_bert(), rankwise.LoraConfig(target_modules=["LayerNorm"]))


def test_adalora_reads_r_as_its_target() -> None:
    with pytest.warns(UserWarning, match="AdaLoRA reads r = 9 as target_r = 9 and init_r = 14"):
        config = rankwise.AdaLoraConfig(r=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rankwise.AdaLoraConfig(r=9)  # said once
    assert (config.target_r, config.init_r, config.start_rank) == (9, 14, 14)
    assert (rankwise.AdaLoraConfig().target_r, rankwise.AdaLoraConfig().init_r) == (8, 12)
    assert rankwise.AdaLoraConfig(r=5, init_r=5).init_r == 5


def test_scale_is_alpha_over_r_and_one_by_default() -> None:
    assert rankwise.LoraConfig(r=4).scale_of("x") == 1.0
    assert rankwise.LoraConfig(r=4, lora_alpha=8).scale_of("x") == 2.0
    assert rankwise.LoraConfig(r=4, lora_alpha=8, use_rslora=True).scale_of("x") == 4.0
    assert rankwise.LoraConfig(r=16, use_rslora=True).scale_of("x") == 4.0, "lora_alpha is r where none is given"
    assert rankwise.AdaLoraConfig(r=4, lora_alpha=12).scale_of("x") == 2.0, "the divisor is the starting rank, for good"
    patterned = rankwise.LoraConfig(r=4, lora_alpha=8, rank_pattern={"a.x": 2}, alpha_pattern={"a.x": 6})
    assert (patterned.scale_of("a.x"), patterned.scale_of("a.y")) == (3.0, 2.0)


def test_methods_without_a_scale_say_so() -> None:
    with pytest.warns(UserWarning, match="SorsaConfig has no lora_alpha / r scale"):
        assert rankwise.SorsaConfig(lora_alpha=16).scale_of("x") == 1.0


def test_rank_above_a_layer_is_clamped_and_said_once() -> None:
    with pytest.warns(UserWarning, match=r"above the size of 13 module\(s\) and is clamped") as told:
        model = get_peft_model(tiny_bert(), rankwise.LoraConfig(r=50, target_modules="all-linear", task_type="SEQ_CLS"))
    assert len([w for w in told if "clamped" in str(w.message)]) == 1
    assert set(rankwise.ranks(model).values()) == {32}


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.SoraConfig(target_modules=["query"]))
    model.save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["rankwise_format"] == 2
    assert saved["peft_type"] == "RANKWISE_SORA"
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"rankwise_format": 99}))
    with pytest.raises(AdapterFileError, match="saved in format 99 and this rankwise reads formats 1 to 2"):
        PeftModel.from_pretrained(tiny_bert(), str(tmp_path))


def test_tensors_of_another_adapter_are_refused_not_ignored(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.SoraConfig(target_modules=["query"]))
    model.save_pretrained(str(tmp_path))
    other = get_peft_model(tiny_bert(), rankwise.SoraConfig(target_modules=["query", "value"]))
    with pytest.raises(ArgumentError, match="must hold every tensor of the adapter"):
        other.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_loading_never_decomposes_the_base_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny_bert(), rankwise.SorsaConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    model.save_pretrained(str(tmp_path))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an SVD was computed")

    monkeypatch.setattr("rankwise.methods.sorsa.leading_triplets", never)
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path))
    x = torch.randint(0, 100, (2, 5))
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)


def test_a_config_from_a_file_used_for_a_fresh_adapter_still_gets_its_start(tmp_path: Path) -> None:
    rankwise.SorsaConfig(r=4, target_modules=["query"]).save_pretrained(str(tmp_path))
    fresh = get_peft_model(tiny_bert(), rankwise.SorsaConfig.from_pretrained(str(tmp_path)))
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.rankwise_tensors.default.S"
    assert (fresh.state_dict()[key] > 0).all()


def test_adapter_named_like_part_of_a_module(tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert(), rankwise.SoraConfig(r=2, target_modules=["query"], init_weights=False), "query")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_bert(), str(tmp_path / "query"), "que-r_y").eval()
    x = torch.randint(0, 100, (2, 5))
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)


def test_a_batch_of_several_adapters_is_refused() -> None:
    fields = {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert(), rankwise.LoraConfig(**fields)).eval()
    model.add_adapter("other", rankwise.LoraConfig(**fields))
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(ArgumentError, match="`adapter_names` must be left out: batches of several adapters"):
        model(input_ids=tokens, adapter_names=["default", "other"])


def test_unknown_adapter_names_those_there_are() -> None:
    model = get_peft_model(tiny_bert(), rankwise.LoraConfig(target_modules=["query"]))
    with pytest.raises(ArgumentError, match=r"be a rankwise adapter of the model \(it has default\); found 'x'"):
        rankwise.ranks(model, "x")
    with pytest.raises(ArgumentError, match="it has none"):
        rankwise.factors(tiny_bert())


def test_lora_is_pefts_lora(batch: dict[str, torch.Tensor]) -> None:
    """Same A and B: same outputs and gradients, to rounding in float64."""
    import peft

    ours = get_peft_model(tiny_bert(), rankwise.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "dense"]))
    theirs = get_peft_model(tiny_bert(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "dense"]))
    ours.double(), theirs.double()
    pairs = {}
    for name, parameter in ours.named_parameters():
        if "rankwise_tensors" in name:
            twin = name.replace("rankwise_tensors.default.", "lora_") + ".default.weight"
            pairs[name] = (parameter, theirs.get_parameter(twin))
            with torch.no_grad():
                parameter.copy_(torch.randn_like(parameter))
                pairs[name][1].copy_(parameter)
    outputs = [model(**batch) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.loss.backward()
    for mine, other in pairs.values():
        assert (mine.grad - other.grad).norm() <= 1e-11 * other.grad.norm() + 1e-14
