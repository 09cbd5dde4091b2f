"""Merging adapters is weighted averaging of their dense updates, exactly, whatever their forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import rankwise
from conftest import tiny_bert, tiny_gpt2
from rankwise.cli.merge import merge
from rankwise.errors import AdapterFileError, ArgumentError, RankwiseError
from rankwise.export.merge import merge_adapters
from rankwise.export.reader import read_lora


def net(into: int = 6, out: int = 5) -> nn.Module:
    return nn.Sequential(nn.Linear(into, out), nn.Tanh(), nn.Linear(out, 4))


def saved(folder: Path, seed: int, r: int = 2, base: nn.Module | None = None, **fields: Any) -> Path:
    """A stock PEFT adapter with random factors."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=r, init_lora_weights=False, **{"target_modules": ["0", "2"], "lora_alpha": 3} | fields)
    get_peft_model(base or net(), config).save_pretrained(str(folder))
    return folder


def dense(folder: Path) -> dict[str, Tensor]:
    return {name: type(f)(*(t.double() for t in f)).delta() for name, f in read_lora(folder).updates.items()}


def close(one: Tensor, other: Tensor) -> None:
    assert (one - other).norm() <= 1e-6 * other.norm() + 1e-12


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.tuples(st.integers(1, 3), st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3)), min_size=1, max_size=4),
    st.sampled_from(["uniform", "compact"]),
)
def test_a_merge_is_the_dense_weighted_sum(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int], parts: list[tuple[int, float]], layout: str
) -> None:
    at = tmp_path_factory.mktemp("merge")
    folders = [saved(at / str(i), i, r, net(*shape)) for i, (r, _) in enumerate(parts)]
    weights = [w for _, w in parts]
    report = merge_adapters(folders, at / "out", weights=weights, layout=layout)
    assert report.relative_error <= 1e-6
    merged, all_dense = dense(at / "out"), [dense(folder) for folder in folders]
    for name in ("0", "2"):
        close(merged[name], sum((w * d[name] for w, d in zip(weights, all_dense, strict=True)), torch.zeros(())))
    assert all(rank <= min(merged[name].shape) for name, rank in report.ranks.items())


def test_truncation_is_optimal_and_its_error_stated(tmp_path: Path) -> None:
    folders = [saved(tmp_path / str(i), i) for i in range(2)]
    report = merge_adapters(folders, tmp_path / "out", rank=1)
    assert report.rank == 1
    whole = {name: sum(dense(folder)[name] for folder in folders) / 2 for name in ("0", "2")}
    sigma = {name: torch.linalg.svdvals(W) for name, W in whole.items()}
    lost = sum(float(s[1:].square().sum()) for s in sigma.values())
    size = sum(float(s.square().sum()) for s in sigma.values())
    assert report.relative_error == pytest.approx((lost / size) ** 0.5, rel=1e-5)
    for name, W in dense(tmp_path / "out").items():
        assert float((W - whole[name]).norm()) == pytest.approx(float(sigma[name][1:].norm()), rel=1e-5)


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_a_missing_module_counts_as_zero_and_stock_peft_loads_all(layout: str, tmp_path: Path) -> None:
    folders = [saved(tmp_path / "a", 1, target_modules=["0"]), saved(tmp_path / "b", 2, target_modules=["2"])]
    merge_adapters(folders, tmp_path / "out", layout=layout)
    merged = dense(tmp_path / "out")
    close(merged["0"], dense(folders[0])["0"] / 2)
    close(merged["2"], dense(folders[1])["2"] / 2)
    base = net()
    weight = base[0].weight.detach().double()  # type: ignore[index]
    whole: Any = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload()
    torch.testing.assert_close(whole[0].weight.double(), weight + merged["0"], rtol=1e-5, atol=1e-5)


def test_adapters_that_cancel_leave_nothing(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", 1)
    report = merge_adapters([folder, folder], tmp_path / "out", weights=[1, -1])
    assert report.ranks == {"0": 0, "2": 0}
    assert report.relative_error == 0


def test_rankwise_and_plain_adapters_mix(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = rankwise.SoraConfig(r=3, target_modules=["attn.c_attn"], init_weights=False)
    model = get_peft_model(tiny_gpt2(), config)
    model.save_pretrained(str(tmp_path / "ours"))
    plain = saved(tmp_path / "plain", 4, base=tiny_gpt2(), target_modules=["mlp.c_fc"], fan_in_fan_out=True)
    merge_adapters([tmp_path / "ours", plain], tmp_path / "out", base=tiny_gpt2())
    merged = dense(tmp_path / "out")
    for name, f in rankwise.factors(model).items():
        close(merged[name], f.delta().double() / 2)
    for name, W in dense(plain).items():
        close(merged[name], W / 2)


def test_heads_are_averaged_or_refused(tmp_path: Path) -> None:
    fields: Any = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    folders = []
    for i in range(2):
        base = tiny_bert()
        nn.init.normal_(base.classifier.weight)
        folders.append(saved(tmp_path / str(i), i, base=base, **fields))
    merge_adapters(folders, tmp_path / "out", weights=[0.25, 0.75])
    key = "base_model.model.classifier.weight"
    one, two, out = (load_file(f / "adapter_model.safetensors")[key] for f in (*folders, tmp_path / "out"))
    torch.testing.assert_close(out, 0.25 * one + 0.75 * two)
    with pytest.raises(ArgumentError, match="`weights` must sum to 1"):
        merge_adapters(folders, tmp_path / "no", weights=[1, 1])
    bare = saved(tmp_path / "bare", 3, base=tiny_bert(), target_modules=["query"])
    with pytest.raises(RankwiseError, match="not trained in full, with one shape, in every adapter"):
        merge_adapters([folders[0], bare], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_merged_is_named(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2, base=net(7))
    with pytest.raises(AdapterFileError, match=r"disagree on module '0': \(5, 6\) and \(5, 7\)"):
        merge_adapters([a, b], tmp_path / "out")
    with pytest.raises(ArgumentError, match="`weights` must be 2 finite numbers"):
        merge_adapters([a, a], tmp_path / "out", weights=[1.0])
    with pytest.raises(ArgumentError, match="`out` must not exist yet"):
        merge_adapters([a], b)
    with pytest.raises(ArgumentError, match="`folders` must name at least one"):
        merge_adapters([], tmp_path / "out")
    with pytest.raises(RankwiseError, match="trains biases"):
        merge_adapters([saved(tmp_path / "bias", 1, bias="all")], tmp_path / "out")
    rows = rankwise.LoraConfig(r=2, target_modules=["query"], trainable_token_indices={"word_embeddings": [3, 5]})
    get_peft_model(tiny_bert(), rows).save_pretrained(str(tmp_path / "rows"))
    with pytest.raises(RankwiseError, match="trains single rows of an embedding"):
        merge_adapters([tmp_path / "rows"], tmp_path / "out", base=tiny_bert())
    with pytest.raises(RankwiseError, match="started from 'pissa'"):
        merge_adapters([_pissa(tmp_path / "pissa")], tmp_path / "out")
    file = a / "adapter_model.safetensors"
    save_file({key: t * torch.nan for key, t in load_file(file).items()}, file)
    with pytest.raises(RankwiseError, match="NaN or infinity in '0'"):
        merge_adapters([a], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _pissa(folder: Path) -> Path:
    get_peft_model(net(), peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["0"])).save_pretrained(
        str(folder)
    )
    return folder


def test_other_base_models_are_warned_about(tmp_path: Path) -> None:
    folders = [saved(tmp_path / name, 1) for name in "ab"]
    for folder in folders:
        file = folder / "adapter_config.json"
        text = file.read_text().replace(
            '"base_model_name_or_path": null', f'"base_model_name_or_path": "{folder.name}"'
        )
        file.write_text(text)
    with pytest.warns(UserWarning, match="different base models: a, b"):
        merge_adapters(folders, tmp_path / "out")
    file = folders[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "b", "revision": "v2"}))
    with pytest.warns(UserWarning, match="different base models: b, b at revision v2"):
        merge_adapters(folders, tmp_path / "out", overwrite=True)


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(merge)
    return made


def test_the_command(tmp_path: Path) -> None:
    folders = [str(saved(tmp_path / name, i)) for i, name in enumerate("ab")]
    out = str(tmp_path / "out")
    shown = CliRunner().invoke(app(), [*folders, "--out", out, "--weights", "0.25,0.75", "--rank", "2"])
    assert shown.exit_code == 0, shown.output
    assert "rank 2" in shown.output
    again = CliRunner().invoke(app(), [*folders, "--out", out])
    assert isinstance(again.exception, ArgumentError)
    assert CliRunner().invoke(app(), [*folders, "--out", out, "--force"]).exit_code == 0
    wrong = CliRunner().invoke(app(), [*folders, "--out", out, "--weights", "a,b"])
    assert isinstance(wrong.exception, ArgumentError)
    mixed = CliRunner().invoke(app(), [*folders, "--out", out, "--into-base", "--rank", "2"])
    assert "must come without --into-base" in str(mixed.exception)
