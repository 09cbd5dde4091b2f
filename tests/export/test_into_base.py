"""Merging into the base's files gives what PEFT's merge_and_unload gives, with one weight in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import typer
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import rankwise
from conftest import tiny_bert, tiny_gpt2
from rankwise.cli.merge import merge
from rankwise.errors import ArgumentError, RankwiseError
from rankwise.export.into_base.merge import merge_into_base


def llama(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 30, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"num_hidden_layers": 2} | sizes | fields)).eval()


def saved(folder: Path, model: Any, seed: int = 0, **fields: Any) -> Path:
    torch.manual_seed(seed)
    shared: Any = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    get_peft_model(model, peft.LoraConfig(**shared | fields)).save_pretrained(str(folder))
    return folder


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"README.md"}


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_merge_and_unload(shard: str, dtype: torch.dtype, tmp_path: Path) -> None:
    llama().to(dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)  # type: ignore[arg-type]
    (tmp_path / "base/tokenizer.json").write_text("{}")
    (tmp_path / "base/pytorch_model.bin").write_text("stale")
    adapter = saved(tmp_path / "lora", llama().to(dtype))  # type: ignore[arg-type]
    merge_into_base([adapter], tmp_path / "base", tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "base") - {"pytorch_model.bin"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (1 if shard == "8KB" else 0)
    theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(adapter))
    theirs, ours = theirs.merge_and_unload(), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    for (key, ours_), theirs_ in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert ours_.dtype == dtype
        rough = 1e-6 if dtype == torch.float32 else 2e-2  # PEFT rounds the update itself too
        torch.testing.assert_close(ours_, theirs_, rtol=rough, atol=rough)
        assert torch.equal(ours_, base[key]) == ("q_proj" not in key and "down_proj" not in key)


def test_a_weighted_merge_of_rankwise_and_plain_adapters_of_conv1d(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "base")
    fields: Any = {"target_modules": ["c_proj", "c_attn"], "fan_in_fan_out": True}  # attn.c_proj is square
    plain = saved(tmp_path / "lora", tiny_gpt2(), **fields)
    config = rankwise.SoraConfig(r=2, target_modules=["c_proj"], init_weights=False)
    get_peft_model(tiny_gpt2(), config).save_pretrained(str(tmp_path / "ours"))
    rankwise.export_lora(tmp_path / "ours", tmp_path / "exported", base=tmp_path / "base")
    merge_into_base([plain, tmp_path / "ours"], tmp_path / "base", tmp_path / "out", weights=[0.3, 2])
    model: Any = tiny_gpt2()
    expected = {key: t.clone() for key, t in model.state_dict().items()}
    for folder, weight in ((plain, 0.3), (tmp_path / "exported", 2)):
        merged: Any = PeftModel.from_pretrained(tiny_gpt2(), str(folder))
        for key, t in merged.merge_and_unload().state_dict().items():
            expected[key] += weight * (t - model.state_dict()[key])
    for key, t in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-5)


def test_files_of_a_bare_encoder_lack_the_first_part_of_names(tmp_path: Path) -> None:
    tiny_gpt2().transformer.save_pretrained(tmp_path / "base")
    adapter = saved(tmp_path / "lora", tiny_gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    merge_into_base([adapter], tmp_path / "base", tmp_path / "out")
    merged: Any = PeftModel.from_pretrained(tiny_gpt2(), str(adapter))
    expected = merged.merge_and_unload().transformer.state_dict()
    for key, t in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-5)


def test_embeddings_and_heads(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    base = tiny_bert()
    nn.init.ones_(base.classifier.weight)
    fields: Any = {"target_modules": ["word_embeddings"], "task_type": "SEQ_CLS"}
    adapter = saved(tmp_path / "lora", base, **fields)
    merge_into_base([adapter], tmp_path / "base", tmp_path / "out")
    merged: Any = PeftModel.from_pretrained(tiny_bert(), str(adapter))
    expected = merged.merge_and_unload().state_dict()
    for key, t in load_file(tmp_path / "out/model.safetensors").items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_in_is_named(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    llama().save_pretrained(base)
    adapter = saved(tmp_path / "lora", llama())
    with pytest.raises(RankwiseError, match=r"gpt does not fit the base model: Target modules \{'c_attn'\} not found"):
        merge_into_base([saved(tmp_path / "gpt", tiny_gpt2(), target_modules=["c_attn"])], base, out)
    with pytest.raises(RankwiseError, match=r"wide does not fit the base model: size mismatch for .*q_proj"):
        merge_into_base([saved(tmp_path / "wide", llama(hidden_size=32))], base, out)
    deeper = saved(tmp_path / "deeper", llama(num_hidden_layers=3))
    with pytest.raises(RankwiseError, match=r"no place for 'base_model.model.model.layers.2.*the nearest names are"):
        merge_into_base([deeper], base, out)
    with pytest.raises(ArgumentError, match="`out` must be another folder"):
        merge_into_base([adapter], base, base, overwrite=True)
    with pytest.raises(RankwiseError, match="does not say its base model; pass `base`"):
        merge_into_base([adapter], None, out)
    file = base / "model.safetensors"
    state = load_file(file)
    save_file({key: t.to(torch.int8) for key, t in state.items()}, file)
    with pytest.raises(RankwiseError, match="is quantised or no weight: its dtype is I8"):
        merge_into_base([adapter], base, out)
    save_file({key: t.fill_(6e4).half() for key, t in state.items()}, file)
    with pytest.raises(RankwiseError, match="NaN or infinity"):
        merge_into_base([adapter], base, out, weights=[1e5])
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(RankwiseError, match="holds quantised weights"):
        merge_into_base([adapter], base, out)
    assert files(tmp_path) == {"base", "lora", "gpt", "wide", "deeper"}


# VmHWM, since ru_maxrss of a child starts from its parent's; the file's own pages, mapped, are counted too
MEASURE = """
import pathlib, sys, torch
torch.set_num_threads(1)
from rankwise.export.into_base.merge import merge_into_base
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
lora, base, out = sys.argv[1:]
before = peak()
merge_into_base([lora], base, out)
print(peak() - before)
"""


def test_a_shard_outside_its_folder_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    llama().save_pretrained(base)
    adapter = saved(tmp_path / "lora", llama())
    (tmp_path / "evil.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    kept = (tmp_path / "evil.safetensors").read_bytes()
    index = {"weight_map": {"lm_head.weight": "../evil.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    with pytest.raises(RankwiseError, match="names a file outside its folder"):
        merge_into_base([adapter], base, tmp_path / "out")
    assert (tmp_path / "evil.safetensors").read_bytes() == kept


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("data", [b"", b'{"half', b"\xff" * 16])
def test_a_broken_base_is_one_sentence(broken: str, data: bytes, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapter = saved(tmp_path / "lora", llama())
    (tmp_path / "base" / broken).write_bytes(data)
    with pytest.raises(RankwiseError):
        merge_into_base([adapter], tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "base", "lora"])
def test_what_is_read_is_never_replaced(out: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapter = saved(tmp_path / "lora", llama())
    with pytest.raises(ArgumentError, match="`out` must be another folder than"):
        merge_into_base([adapter], tmp_path / "base", tmp_path / out, overwrite=True)
    assert (tmp_path / "base" / "model.safetensors").is_file()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    small, large = (peak(tmp_path / str(layers), layers) for layers in (3, 12))
    print(f"peak above the start: {small:.1f} MiB for a model of 48, {large:.1f} for one of 192")
    assert large < small + 48  # of 144 more; what an allocator keeps differs from run to run


def peak(at: Path, layers: int) -> float:
    """MiB that a merge needs above its start, for a model of 16 MiB a layer, the largest weights 4 MiB each."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 64, "num_attention_heads": 4}
    model = llama(num_hidden_layers=layers, **sizes)
    model.save_pretrained(at / "base", max_shard_size="64MB")
    adapter = saved(at / "lora", model, target_modules="all-linear")
    asked = [sys.executable, "-c", MEASURE, str(adapter), str(at / "base"), str(at / "out")]
    return float(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[-1])


def test_a_config_may_say_that_nothing_is_quantised(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": None}))
    merge_into_base([saved(tmp_path / "lora", llama())], tmp_path / "base", tmp_path / "out")


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_base_of_pickles(in_parts: bool, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    model = llama(tie_word_embeddings=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(base)
    state = model.state_dict()  # the tied weight under both names, as transformers wrote it before safetensors
    names = [f"pytorch_model-{i + 1:05}-of-00002.bin" for i in range(2)] if in_parts else ["pytorch_model.bin"]
    where = {key: names[i % len(names)] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: tensor for key, tensor in state.items() if where[key] == name}, base / name)
    if in_parts:
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    adapter = saved(tmp_path / "lora", model)
    merge_into_base([adapter], base, tmp_path / "out")
    parts = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert files(tmp_path / "out") == {"config.json"} | (parts if in_parts else {"model.safetensors"})
    merged: Any = PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(adapter))
    expected = merged.merge_and_unload().state_dict()
    found, lacking = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(lacking.values())
    for key, t in found.state_dict().items():
        torch.testing.assert_close(t, expected[key], rtol=1e-5, atol=1e-5)


def test_a_pickle_that_runs_something_is_not_opened(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    base = tmp_path / "base"
    base.mkdir()
    llama().config.save_pretrained(base)
    torch.save({"lm_head.weight": Payload()}, base / "pytorch_model.bin")
    with pytest.raises(RankwiseError, match="holds no tensors that torch reads with weights_only=True"):
        merge_into_base([saved(tmp_path / "lora", llama())], base, tmp_path / "out")
    assert not (tmp_path / "opened").exists()


def test_new_tensors_lie_in_a_file_of_the_index(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base", max_shard_size="8KB")
    adapter = saved(tmp_path / "lora", llama(tie_word_embeddings=True), target_modules=["lm_head"])
    out = merge_into_base([adapter], tmp_path / "base", tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert {(key, name) for name, found in tensors.items() for key in found} == set(index["weight_map"].items())
    sizes = [tensor.nbytes for found in tensors.values() for tensor in found.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"]["lm_head.weight"] == index["weight_map"]["model.embed_tokens.weight"]


def test_the_revision_of_the_adapter_is_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    models = {"main": llama(), "v2": llama(initializer_range=0.5)}
    for revision, commit in {"main": "a" * 40, "v2": "b" * 40}.items():
        models[revision].save_pretrained(repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, revision in (("a", "v2"), ("b", None)):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, revision=revision)
        adapted: Any = get_peft_model(models["v2"], config)
        adapted.peft_config["default"].base_model_name_or_path = "me/tiny"
        adapted.save_pretrained(str(tmp_path / name))
        expected = adapted.merge_and_unload().state_dict()
        models["v2"] = llama(initializer_range=0.5)
    out = merge_into_base([tmp_path / "a"], None, tmp_path / "out")
    for key, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5)
    assert "| Base model | `me/tiny` |\n| Revision | `v2` |" in (out / "README.md").read_text()
    with pytest.warns(UserWarning, match="different base models: me/tiny, me/tiny at revision v2"):
        merge_into_base([tmp_path / "a", tmp_path / "b"], None, tmp_path / "both")


def test_the_command(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    adapter, app = saved(tmp_path / "lora", llama()), typer.Typer()
    app.command()(merge)
    out = tmp_path / "out"
    asked = [str(adapter), "--out", str(out), "--base", str(tmp_path / "base"), "--into-base", "--weights", "0.5"]
    shown = CliRunner().invoke(app, [*asked, "--dtype", "bfloat16"])
    assert shown.exit_code == 0, shown.output
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
