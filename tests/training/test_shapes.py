"""Models that are neither encoders nor decoders of text: images, and experts fused into one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from test_frameworks import ROWS, untold
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import rankwise
from cases import CASES, Case
from rankwise.adapters.configs import CONFIGS

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


class Pictures(torch.utils.data.Dataset):
    """Pictures whose label is where they are bright."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i))
        picture[i % 3] += 1
        return {"pixel_values": picture, "labels": torch.tensor(i % 3)}


@ROWS
def test_vision(name: str, case: Case, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = ViTConfig(image_size=16, patch_size=4, num_labels=3, initializer_range=0.2, **SIZES)
    method = untold(name, case, "SEQ_CLS")
    method.task_type, method.modules_to_save = None, ["classifier"]
    method.target_modules = {"q_proj", "v_proj", "fc1", "fc2"}
    model = get_peft_model(ViTForImageClassification(config), method)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=Pictures()).train()
    told = rankwise.status(model)
    assert (told.step, told.rules_run, told.steps_skipped) == (12, 12, 0)
    assert rankwise.export_lora(model, tmp_path / "lora").relative_error <= 1e-6


@pytest.mark.filterwarnings("error:.*fused weights")
def test_embedded_places_are_no_experts() -> None:
    config = ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES)
    get_peft_model(ViTForImageClassification(config), rankwise.LoraConfig(r=2, target_modules="all-linear"))


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("name", CASES)
def test_fused_experts_are_named(name: str) -> None:
    fields = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | CASES[name].fields
    with pytest.warns(UserWarning, match=r"4 fused weights of experts .* not adapted: .*layers\.0\.mlp\.experts\.\w+"):
        model = get_peft_model(mixtral(), CONFIGS[name](**fields))
    assert not any("experts" in module for module in rankwise.ranks(model))


@pytest.mark.filterwarnings("error:.*fused weights")
def test_experts_that_nobody_asked_for_are_not() -> None:
    get_peft_model(mixtral(), rankwise.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
