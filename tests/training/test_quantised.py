"""Quantised base weights: start, training, resuming, saving, loading and export, and optimisers of eight bits."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)

import rankwise
from cases import CASES
from rankwise.adapters.configs import CONFIGS
from rankwise.adapters.layer import AdapterLayer

pytest.importorskip("bitsandbytes", reason='in the "test" extra')
pytest.importorskip("torchao", reason='in the "test" extra')

STEPS = 12


def kinds() -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig

    heads = ["classifier"]
    return {
        "bitsandbytes 4-bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=heads,
        ),
        "bitsandbytes 8-bit": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads),
        "torchao int8": TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=heads),
    }


KINDS = pytest.mark.parametrize(
    "kind",
    [
        "bitsandbytes 4-bit",
        pytest.param("bitsandbytes 8-bit", marks=pytest.mark.slow),
        pytest.param("torchao int8", marks=pytest.mark.slow),
    ],
)
NAMES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose rows are as long as bitsandbytes' blocks, below which its evaluation on CPUs fails."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=100, num_labels=3, initializer_range=0.2, **sizes, **dropout)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def quantised(saved: Path, kind: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        saved, quantization_config=kinds()[kind], device_map="cpu"
    )


def adapted(saved: Path, kind: str, name: str) -> Any:
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS"} | CASES[name].alone
    return get_peft_model(quantised(saved, kind), CONFIGS[name](**fields)).train()


def train(model: Any, optimizer: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 3, (8,), generator=generator)
        tokens = torch.randint(0, 30, (8, 10), generator=generator) + 30 * labels[:, None]
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """In evaluation mode, but for the base layers: bitsandbytes packs four-bit weights there and cannot train again."""
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    return model(input_ids=torch.arange(2, 12)[None]).logits.float()


@KINDS
@NAMES
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_trains_resumes_loads_and_exports(name: str, kind: str, saved: Path, tmp_path: Path) -> None:
    whole = adapted(saved, kind, name)
    start = logits(whole)
    torch.testing.assert_close(start, logits(quantised(saved, kind)), rtol=1e-2, atol=2e-2)
    whole.train()
    optimizer = adamw(whole)
    first = train(whole, optimizer, range(6))
    state = {key: t.clone() for key, t in get_peft_model_state_dict(whole).items()}
    moments = copy.deepcopy(optimizer.state_dict())
    resumed = adapted(saved, kind, name)
    set_peft_model_state_dict(resumed, state)
    other = adamw(resumed)
    other.load_state_dict(moments)
    last = train(whole, optimizer, range(6, STEPS))
    train(resumed, other, range(6, STEPS))
    assert min(last) < first[0]
    for key, value in get_peft_model_state_dict(whole).items():
        assert torch.equal(get_peft_model_state_dict(resumed)[key], value), key
    told = rankwise.status(whole)
    assert (told.step, told.rules_run) == (STEPS, STEPS)
    after = logits(whole)
    whole.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(quantised(saved, kind), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), after, rtol=1e-5, atol=1e-5)
    exported = rankwise.export_lora(whole, tmp_path / "lora")
    assert exported.relative_error <= 1e-5
    plain = PeftModel.from_pretrained(quantised(saved, kind), str(exported.folder))
    torch.testing.assert_close(logits(plain), after, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sorsa", "nblora"])
@pytest.mark.filterwarnings("ignore")
def test_base_weights_are_dequantised_one_at_a_time(name: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the starts that read them: a singular value decomposition of each."""
    held: list[weakref.ref[torch.Tensor]] = []
    of_one = AdapterLayer.base_weight

    def counted(layer: AdapterLayer) -> torch.Tensor:
        assert all(weight() is None for weight in held), "the weight of another layer is still held"
        found = of_one(layer)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(AdapterLayer, "base_weight", counted)
    model = adapted(saved, "bitsandbytes 4-bit", name)
    train(model, adamw(model), range(1))
    assert len(held) == 13


@NAMES
@pytest.mark.filterwarnings("ignore")
def test_an_optimiser_of_eight_bits(name: str, saved: Path) -> None:
    import bitsandbytes

    model = adapted(saved, "bitsandbytes 4-bit", name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=3e-3, min_8bit_size=1)
    losses = train(model, optimizer, range(STEPS))
    assert min(losses[6:]) < losses[0]
    told = rankwise.status(model)
    assert (told.step, told.rules_run, told.steps_skipped) == (STEPS, STEPS, 0)
