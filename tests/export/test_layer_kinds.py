"""Convolutions and embeddings export as what stock PEFT makes of them, or are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise
from cases import CASES
from conftest import tiny_bert, tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import AdapterFileError, RankwiseError
from rankwise.export.into_base.merge import merge_into_base

IDS = torch.arange(60).view(10, 6) % 20
LORA_FORM = [name for name in CASES if not CONFIGS[name].linear_only]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb = nn.Embedding(20, 8, padding_idx=3)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.one = nn.Conv2d(6, 5, 1, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = self.emb(x).reshape(len(x), 3, 4, 4)
        return self.head(self.one(self.conv(image).tanh()).flatten(1))


class Pair(nn.Module):
    """Two modules of one name, of any two kinds, at two depths."""

    def __init__(self, shallow: nn.Module, deep: nn.Module) -> None:
        super().__init__()
        self.part, self.sub = shallow, nn.ModuleDict({"part": deep})

    def forward(self, x: Tensor) -> Tensor:
        return self.sub["part"](self.part(x))


def adapted(name: str = "sora", *targets: str, **fields: Any) -> Any:
    own = CASES[name].alone
    shared = {"r": 4, "target_modules": list(targets) or ["emb", "conv", "one", "head"], "init_weights": False}
    torch.manual_seed(2)
    return get_peft_model(Net(), CONFIGS[name](**shared | own | fields)).eval()


def stock(base: nn.Module, folder: Path) -> PeftModel:
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    assert model.peft_config["default"].peft_type.value == "LORA"
    return model


def outputs(model: nn.Module, x: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


@pytest.mark.parametrize("name", LORA_FORM)
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_stock_peft_computes_the_same(name: str, layout: str, tmp_path: Path) -> None:
    model = adapted(name, lora_alpha=7)
    report = rankwise.export_lora(model, tmp_path / "live", layout=layout)
    assert report.relative_error <= 1e-6
    torch.testing.assert_close(outputs(stock(Net(), tmp_path / "live")), outputs(model), rtol=1e-5, atol=1e-5)
    assert (outputs(model) - outputs(Net())).abs().max() > 1e-2

    model.save_pretrained(str(tmp_path / "adapter"))
    kwargs: Any = {"base": Net(), "layout": layout}
    rankwise.export_lora(tmp_path / "adapter", tmp_path / "saved", **kwargs)
    live, saved = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("live", "saved"))
    assert live.keys() == saved.keys()
    assert all(torch.equal(live[key], saved[key]) for key in live)


def test_tensors_are_named_and_shaped_as_pefts(tmp_path: Path) -> None:
    report = rankwise.export_lora(adapted("lora"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model."): tuple(t.shape) for key, t in tensors.items()} == {
        "emb.lora_embedding_A": (4, 20),
        "emb.lora_embedding_B": (8, 4),
        "conv.lora_A.weight": (4, 3, 3, 3),
        "conv.lora_B.weight": (6, 4, 1, 1),
        "one.lora_A.weight": (4, 6, 1, 1),
        "one.lora_B.weight": (5, 4, 1, 1),
        "head.lora_A.weight": (3, 20) if report.rank == 3 else (4, 20),
        "head.lora_B.weight": (3, 4),
    }
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert not tensors["base_model.model.emb.lora_embedding_A"][:, 3].any()


def test_ranks_of_their_own_and_truncation(tmp_path: Path) -> None:
    model = adapted("sora")
    for name, tensor in model.state_dict().items():
        if name.endswith("default.g"):
            tensor[{"emb": 0, "conv": 1}.get(name.split(".")[2], 4) :] = 0
    report = rankwise.export_lora(model, tmp_path / "compact", layout="compact")
    assert report.ranks == {"conv": 1, "one": 4, "head": 3}
    torch.testing.assert_close(outputs(stock(Net(), tmp_path / "compact")), outputs(model), rtol=1e-5, atol=1e-5)

    model = adapted("lora")
    report = rankwise.export_lora(model, tmp_path / "cut", rank=2)
    size = lost = 0.0
    for factors in rankwise.factors(model).values():
        values = torch.linalg.svdvals(factors.delta().double())
        size, lost = size + values.square().sum(), lost + values[2:].square().sum()
    assert report.relative_error == pytest.approx(float((lost / size).sqrt()), rel=1e-4)


def test_shapes_of_a_saved_adapter_come_from_the_config_of_its_base(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    targets = ["word_embeddings", "query"]
    config = rankwise.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", init_weights=False)
    model = get_peft_model(tiny_bert(), config).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    rankwise.export_lora(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    torch.testing.assert_close(outputs(stock(tiny_bert(), tmp_path / "out")), outputs(model), rtol=1e-5, atol=1e-5)


def test_the_weight_that_peft_saves_beside_a_tied_embedding(tmp_path: Path) -> None:
    """PEFT saves frozen `embed_tokens`; both it and the tied `lm_head` are adapted."""

    def llama() -> LlamaForCausalLM:
        torch.manual_seed(1)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **shape)).eval()

    config = rankwise.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_weights=False)
    model = get_peft_model(llama(), config).eval()
    rankwise.export_lora(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == ["embed_tokens", "lm_head", "q_proj"]
    torch.testing.assert_close(outputs(stock(llama(), tmp_path / "out")), outputs(model), rtol=1e-5, atol=1e-5)


# --- modules that a target's name matches too -------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_a_vocabulary_resized_after_the_base_was_saved(targets: list[str], tmp_path: Path) -> None:
    """The base model that the adapter names has another vocabulary than the one that it was trained on."""
    tiny_llama().save_pretrained(str(tmp_path / "base"))
    llama: Any = LlamaForCausalLM.from_pretrained(str(tmp_path / "base"))
    llama.resize_token_embeddings(104)
    model: Any = get_peft_model(llama, rankwise.LoraConfig(r=2, target_modules=targets, init_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    sentence = rf"'.*{targets[0]}' is \(104, 32\), and this base model's is \(100, 32\): save the base model with its"
    with pytest.raises(AdapterFileError, match=sentence):
        rankwise.export_lora(tmp_path / "adapter", tmp_path / "lora")
    other = "lm_head" if "lm_head" not in targets else "embed_tokens"  # its new rows are in no file
    with pytest.raises(RankwiseError, match=rf"'.*{other}.weight' is \(100, 32\), and .* is \(104, 32\): save"):
        merge_into_base([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged")
    model.get_base_model().config.save_pretrained(str(tmp_path / "resized"))
    report = rankwise.export_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "resized")
    assert set(report.ranks) == set(rankwise.ranks(model))
    assert report.relative_error <= 1e-6


def conv(**fields: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, **{"padding": 1} | fields)


@pytest.mark.parametrize(
    ("deep", "padded"),
    [
        (conv(), True),
        (conv(groups=2), False),
        (conv(dilation=2, padding=2), False),
        (conv(padding_mode="reflect"), False),
        (nn.Conv3d(2, 2, 1), False),
        (nn.Linear(5, 5), False),
    ],
    ids=["alike", "groups", "dilation", "padding_mode", "Conv3d", "linear"],
)
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_other_modules_of_the_name(deep: nn.Module, padded: bool, layout: str, tmp_path: Path) -> None:
    """Zero factors where PEFT would give a module the same kind of layer; else it is left out by its full name."""
    base = Pair(conv(), deep)
    config = rankwise.LoraConfig(r=3, target_modules=["part"], exclude_modules=["sub.part"], init_weights=False)
    model = get_peft_model(Pair(base.part, base.sub["part"]), config).eval()
    report = rankwise.export_lora(model, tmp_path / "out", layout=layout)
    zeros = {"sub.part": 0} if padded and layout == "uniform" else {}
    assert report.ranks == {"part": 3} | zeros
    delta = rankwise.factors(model)["part"].delta().view(4, 4, 3, 3)
    model.unload()
    loaded = stock(base, tmp_path / "out")
    found: Any = loaded.base_model.model
    torch.testing.assert_close(found.part.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-5)
    assert hasattr(found.sub["part"], "lora_A") == bool(zeros)


def test_adapters_of_linear_layers_add_no_convolution(tmp_path: Path) -> None:
    config = rankwise.SorsaConfig(r=3, target_modules=["part"], exclude_modules=["sub.part"], init_weights=False)
    model = get_peft_model(Pair(nn.Linear(5, 5), conv()), config)
    assert list(rankwise.export_lora(model, tmp_path / "out").ranks) == ["part"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (conv(dilation=(1, 2)), r"PEFT's LoRA ignores a convolution's dilation, here \(1, 2\)"),
        (conv(padding_mode="circular"), r"pads a convolution's input with zeros, and the padding here is 'circular'"),
        (nn.Embedding(4, 4, max_norm=1.0), r"max_norm bounds the columns of A"),
    ],
)
def test_what_peft_would_compute_otherwise_is_refused(layer: nn.Module, reason: str, tmp_path: Path) -> None:
    config = rankwise.LoraConfig(r=2, target_modules=["0"], init_weights=False)
    model = get_peft_model(nn.Sequential(layer), config)
    with pytest.raises(RankwiseError, match=rf"^the update of module '0' cannot be a plain LoRA: .*{reason}"):
        rankwise.export_lora(model, tmp_path / "out")
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(RankwiseError, match=reason):
        rankwise.export_lora(tmp_path / "adapter", tmp_path / "out", base=nn.Sequential(layer))
    assert not (tmp_path / "out").exists()
