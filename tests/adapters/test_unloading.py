"""`merge_and_unload` and `unload` give back a model without PEFT, whatever is trained beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS

HEADS: dict[str, dict[str, Any]] = {
    "Roberta": {},
    "XLMRoberta": {},
    "Electra": {"embedding_size": 32},
    "MPNet": {},
    "Esm": {"pad_token_id": 1, "mask_token_id": 2},
}
"""Architectures whose classification head is of several layers, and what their configs need."""
TOKENS = torch.arange(3, 35).view(4, 8)


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        **HEADS[kind],
    )
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def adapted(model: nn.Module, method: str = "sora") -> Any:
    targets = r".*\.(query|q)"
    config = CONFIGS[method](r=2, target_modules=targets, task_type="SEQ_CLS", init_weights=False)
    made: Any = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".modules_to_save." in name:
                p.add_(0.1)
    return made


def has_no_peft(model: nn.Module) -> bool:
    return not any(isinstance(m, BaseTunerLayer) or "modules_to_save" in n for n, m in model.named_modules())


@pytest.mark.parametrize("kind", HEADS)
def test_merging_keeps_a_head_of_several_layers(kind: str) -> None:
    model = adapted(classifier(kind))
    with torch.no_grad():
        want = model(input_ids=TOKENS).logits
        merged = model.merge_and_unload()
        assert has_no_peft(merged)
        assert [n for n, _ in merged.named_parameters()] == [n for n, _ in classifier(kind).named_parameters()]
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_unloading_keeps_the_trained_head_and_the_base_weights(kind: str) -> None:
    base = classifier(kind).state_dict()
    plain = adapted(classifier(kind)).unload()
    assert has_no_peft(plain)
    for name, tensor in plain.state_dict().items():
        trained = 0.1 if name.startswith("classifier.") else 0.0
        torch.testing.assert_close(tensor, base[name] + trained if trained else base[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", CASES)
def test_every_method_merges_beside_a_head_of_one_layer(method: str) -> None:
    model = adapted(tiny_bert(), method)
    with torch.no_grad():
        want = model(input_ids=TOKENS).logits
        merged = model.merge_and_unload()
        assert has_no_peft(merged)
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, want, rtol=1e-4, atol=1e-5)


def test_a_merged_weight_stays_merged() -> None:
    """`unload` of a merged model gives the merged weights back, as PEFT's LoRA does."""
    model = adapted(classifier("Roberta"))
    with torch.no_grad():
        want = model(input_ids=TOKENS).logits
        model.merge_adapter()
        torch.testing.assert_close(model.unload()(input_ids=TOKENS).logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_a_second_adapter_beside_a_head_that_the_first_one_trains(kind: str, tmp_path: Path) -> None:
    """The saved list of targets names layers of the head, which the first adapter has wrapped by then."""
    config = CONFIGS["lora"](r=2, target_modules="all-linear", task_type="SEQ_CLS", init_weights=False)
    model: Any = get_peft_model(classifier(kind), config).eval()
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(classifier(kind), tmp_path).eval()
    targets = loaded.peft_config["default"].target_modules
    assert any(name.startswith("classifier.") for name in targets)
    loaded.load_adapter(tmp_path, "second")
    loaded.add_adapter("third", CONFIGS["lora"](r=2, target_modules=targets, task_type="SEQ_CLS"))
    one, two = ({n: p for n, p in loaded.named_parameters() if f".{name}." in n} for name in ("default", "second"))
    shared = {n.replace(".default.", ".second.") for n in one} & two.keys()
    assert any(".modules_to_save." in n for n in shared)
    assert any(".rankwise_tensors." in n for n in shared)
    assert all(torch.equal(two[n], one[n.replace(".second.", ".default.")]) for n in shared)
