"""A quantised model by one key: bitsandbytes' layers under the adapter, and what cannot be had is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BertTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankwise.base_models import open_tokenizer
from rankwise.compare import plan as planning
from rankwise.compare import train
from rankwise.compare.plan import make_plan
from rankwise.compare.runner import run_plan
from rankwise.compare.spec import parse_spec, read_spec
from rankwise.errors import ArgumentError
from tiny_comparison import WriteSpec

bitsandbytes = pytest.importorskip("bitsandbytes", reason='in the "test" extra')
pytest_plugins = ["tiny_comparison", "tiny_llama"]

BITS = pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
# bitsandbytes' blocks have 64 numbers, and its evaluation on CPUs fails for shorter rows.
WIDE: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wider Llama with the tokenizer and the questions of the tiny one."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = open_tokenizer(tiny_llama / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=0, eos_token_id=2, **WIDE)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text((tiny_llama / f"{name}.jsonl").read_text())
    return folder


def table(folder: Path, bits: str, **changes: Any) -> dict[str, Any]:
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "test")}
    return {
        "model": str(folder / "model"),
        "output": "out",
        "data": files | {"prompt": "question", "response": "answer"},
        "task": {"type": "causal_lm", "max_length": 32},
        "training": {
            "steps": 10,
            "batch_size": 10,
            "learning_rate": 1e-2,
            "quantise": bits,
            "gradient_checkpointing": True,
        },
        "budget": {"r": 4},
        "methods": ["lora", "sora"],
    } | changes


@BITS
def test_adapters_train_over_quantised_weights(
    bits: str, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The score is that of the exported adapter on the same quantised model in stock PEFT."""
    kinds: set[str] = set()
    opened = train.open_for

    def watched(*given: Any) -> Any:
        model = opened(*given)
        kinds.update(type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj"))
        return model

    monkeypatch.setattr(train, "open_for", watched)
    plan = make_plan(parse_spec(table(wide_llama, bits), tmp_path).with_floor())
    results = {result.method: result for result in run_plan(plan, "a test")}
    assert kinds == {{"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits]}
    assert results["lora"].score < results["pretrained"].score
    assert results["lora"].versions["bitsandbytes"] == bitsandbytes.__version__
    config = BitsAndBytesConfig(
        load_in_4bit=bits == "4bit",
        load_in_8bit=bits == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(plan.spec.model, quantization_config=config, device_map="cpu")
    export = results["lora"].export
    assert export is not None
    model = PeftModel.from_pretrained(base, str(plan.spec.output / export)).eval()
    tokenizer, test = open_tokenizer(plan.spec.model), plan.splits.test
    total, count = 0.0, 0
    for prompt, responses in zip(test["prompt"], test["responses"], strict=True):
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        whole = [*prompt, {"role": "assistant", "content": responses[0]}]
        ids = torch.tensor([tokenizer.apply_chat_template(whole)["input_ids"]])
        with torch.no_grad():
            told = model(ids).logits[0].log_softmax(-1)
        total -= float(told[start - 1 : -1].gather(1, ids[0, start:, None]).sum())
        count += ids.shape[1] - start
    assert results["lora"].score == pytest.approx(total / count, rel=1e-2)


def test_a_head_stays_as_it_is(tiny: Path, write_spec: WriteSpec, tmp_path: Path) -> None:
    """The floor trains the head alone over a quantised encoder."""
    (tmp_path / "model").mkdir()
    tokenizer = BertTokenizer.from_pretrained(tiny / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), initializer_range=0.2, **WIDE)).save_pretrained(tmp_path / "model")
    path = write_spec(tmp_path, model="model", training={"steps": 6, "quantise": "4bit"})
    results = {result.method: result for result in run_plan(make_plan(read_spec(path).with_floor()), "a test")}
    assert set(results) == {"lora", "head"}
    for result in results.values():
        assert result.head_parameters == 64 * 3 + 3
        losses = [loss for _, loss in result.train_loss]
        assert min(losses[3:]) < losses[0]


@pytest.mark.parametrize("method", [{"name": "full"}, {"name": "partial", "modules": ["query"]}])
def test_quantised_weights_cannot_be_trained(method: dict[str, Any], write_spec: WriteSpec, tmp_path: Path) -> None:
    path = write_spec(tmp_path, method=[method], training={"quantise": "4bit"})
    rule = rf"^`training.quantise` must be left out for {method['name']}: quantised weights cannot be trained; found"
    with pytest.raises(ArgumentError, match=rule):
        make_plan(read_spec(path))


def test_bitsandbytes_that_is_not_installed(
    write_spec: WriteSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(planning, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    path = write_spec(tmp_path, training={"quantise": "4bit"})
    with pytest.raises(ArgumentError, match=r"^`training.quantise` must come with bitsandbytes installed \(pip"):
        make_plan(read_spec(path))


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"name": "peft.LoraConfig", "init_lora_weights": "pissa"}, "PiSSA"),
        ({"name": "peft.DeloraConfig"}, "vector_norm"),
    ],
)
def test_baselines_that_cannot_train_beside_quantised_weights_are_told_before_any_run(
    method: dict[str, Any], reason: str, wide_llama: Path, tmp_path: Path
) -> None:
    asked = table(wide_llama, "4bit", method=[method])
    del asked["methods"]
    spec = parse_spec(asked, tmp_path)
    with pytest.raises(ArgumentError, match=rf"must be a config that works on weights in 4bit.*{reason}"):
        make_plan(spec)
