"""A shrunk adapter is the best of its ranks: by dense decomposition, by brute force, and as stock PEFT computes it."""

from __future__ import annotations

import itertools
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

from conftest import tiny_bert
from rankwise.cli.shrink import shrink
from rankwise.errors import AdapterFileError, ArgumentError, DataError, RankwiseError
from rankwise.export.moments import second_moments_of
from rankwise.export.reader import read_lora
from rankwise.export.shrink import shrink_adapter
from rankwise.linalg.budget import best_ranks

IDS = torch.arange(60).view(10, 6) % 20
SPECTRUM = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25])


class Net(nn.Module):
    """An embedding, a convolution, a linear layer, and one that is adapted with another scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.mid = nn.Linear(24, 20)
        self.head = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        image = self.emb(x).reshape(len(x), 3, 4, 4)
        return self.head(self.mid(self.conv(image).flatten(1)).tanh())


def planted(folder: Path, **fields: Any) -> Path:
    """An adapter of `Net` by stock PEFT whose every update has singular values of a known shape, up to scale."""
    torch.manual_seed(2)
    shared = {"r": 6, "lora_alpha": 5, "target_modules": ["emb", "conv", "mid", "head"], "init_lora_weights": False}
    get_peft_model(Net(), peft.LoraConfig(**shared | fields)).save_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in [key for key in tensors if "lora_A" in key or "embedding_A" in key]:
        A, B = tensors[key], tensors[key.replace("_A", "_B")]
        V, U = torch.linalg.qr(A.flatten(1).T).Q, torch.linalg.qr(B.flatten(1)).Q
        rank = A.shape[0]
        mix = torch.randn(rank, rank) + 3 * torch.eye(rank)  # neither factor shows the spectrum by itself
        tensors[key] = (torch.linalg.inv(mix) @ V.T).view_as(A)
        tensors[key.replace("_A", "_B")] = (U * SPECTRUM[:rank] @ mix).view_as(B)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    return {name: (f.B.double() * f.s) @ f.A.double() for name, f in read_lora(folder).updates.items()}


def truncated(W: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def outputs(base: nn.Module, folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(IDS)


SHAPED: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"mid": 11, "conv": 2}},
    {"rank_pattern": {"head": 4, "emb": 2}, "use_rslora": True, "alpha_pattern": {"head": 3}},
    {"target_modules": "(mid|head)", "lora_dropout": 0.1},
]


@pytest.mark.parametrize("fields", SHAPED)
@pytest.mark.parametrize("layout", ["compact", "uniform"])
def test_it_is_the_dense_truncation_and_stock_peft_computes_it(
    fields: dict[str, Any], layout: str, tmp_path: Path
) -> None:
    source = planted(tmp_path / "lora", **fields)
    report = shrink_adapter(source, tmp_path / "small", rank=3, layout=layout)
    before, after = deltas(source), deltas(tmp_path / "small")
    assert report.folder == tmp_path / "small"
    assert report.ranks == {name: min(3, f.r) for name, f in read_lora(source).updates.items()}
    assert list(report.ranks) == list(report.ranks_before) == list(report.errors) == list(before)
    expected = {name: truncated(W, report.ranks[name]) for name, W in before.items()}
    for name, W in before.items():
        torch.testing.assert_close(after[name], expected[name], rtol=1e-5, atol=1e-6)
        assert report.errors[name] == pytest.approx(float((expected[name] - W).norm() / W.norm()), abs=1e-6)
    lost = sum((expected[name] - W).square().sum() for name, W in before.items())
    whole = sum(W.square().sum() for W in before.values())
    assert report.relative_error == pytest.approx(float((lost / whole).sqrt()), abs=1e-6)
    stored = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert report.parameters == sum(t.numel() for key, t in stored.items() if "lora_" in key)

    by_hand = Net()
    with torch.no_grad():
        for name, W in expected.items():
            layer: Any = by_hand.get_submodule(name)
            layer.weight += (W.T if name == "emb" else W).view_as(layer.weight)
        torch.testing.assert_close(outputs(Net(), tmp_path / "small"), by_hand(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("energy", "rank"), [(1.0, 6), (0.9999, 6), (0.98, 3), (0.9, 2), (0.5, 1), (1e-6, 1)])
def test_energy_takes_the_least_rank_that_holds_it(energy: float, rank: int, tmp_path: Path) -> None:
    report = shrink_adapter(planted(tmp_path / "lora"), tmp_path / "small", energy=energy)
    held = SPECTRUM.square().cumsum(0) / SPECTRUM.square().sum()
    assert set(report.ranks.values()) == {rank} == {int((held < energy - 1e-6).sum()) + 1}
    assert report.relative_error <= (1 - energy) ** 0.5 + 1e-6


def test_directions_that_hold_nothing_are_no_loss(tmp_path: Path) -> None:
    source = planted(tmp_path / "lora")
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.mid.lora_B.weight"][:, 1:] = 0
    tensors["base_model.model.head.lora_A.weight"].zero_()
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    for layout in ("compact", "uniform"):
        report = shrink_adapter(source, tmp_path / layout, energy=1.0, layout=layout)
        assert report.ranks == {"emb": 6, "conv": 6, "mid": 1, "head": 0}
        assert report.relative_error < 1e-6
        torch.testing.assert_close(outputs(Net(), tmp_path / layout), outputs(Net(), source), rtol=1e-5, atol=1e-5)
    assert "head" not in read_lora(tmp_path / "compact").updates


def brute(values: list[list[float]], costs: list[int], budget: int) -> float:
    choices = itertools.product(*(range(len(v) + 1) for v in values))
    fit = (ks for ks in choices if sum(c * k for c, k in zip(costs, ks, strict=True)) <= budget)
    return max(sum(sum(v[:k]) for v, k in zip(values, ks, strict=True)) for ks in fit)


FALLING = st.lists(st.floats(1e-4, 100), max_size=4).map(lambda v: sorted(v, reverse=True))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(FALLING, st.integers(1, 15)), min_size=1, max_size=5), st.floats(0, 1.1))
def test_budget_equals_brute_force(modules: list[tuple[list[float], int]], share: float) -> None:
    values, costs = [v for v, _ in modules], [c for _, c in modules]
    budget = int(share * sum(len(v) * c for v, c in modules))
    ranks = best_ranks([torch.tensor(v, dtype=torch.float64) for v in values], costs, budget)
    assert sum(c * k for c, k in zip(costs, ranks, strict=True)) <= budget
    found = sum(sum(v[:k]) for v, k in zip(values, ranks, strict=True))
    assert found == pytest.approx(brute(values, costs, budget), rel=1e-9)


@pytest.mark.parametrize("budget", [0.5, 0.1, 300, 77, 10**9, 1])
def test_budget_spends_over_all_modules_at_once(budget: float, tmp_path: Path) -> None:
    source = planted(tmp_path / "lora", alpha_pattern={"mid": 20, "emb": 9})
    report = shrink_adapter(source, tmp_path / "small", budget=budget, layout="uniform" if budget == 1 else "compact")
    before = deltas(source)
    values = [torch.linalg.svdvals(W).square()[:6].tolist() for W in before.values()]
    costs = [sum(W.shape) for W in before.values()]
    limit = budget if budget >= 1 else budget * report.parameters_before
    assert sum(c * k for c, k in zip(costs, report.ranks.values(), strict=True)) <= limit
    found = sum(sum(v[:k]) for v, k in zip(values, report.ranks.values(), strict=True))
    assert found == pytest.approx(brute(values, costs, int(limit)), rel=1e-6)


def moments(width: int, kind: str) -> Tensor:
    x = torch.randn(200 if kind != "singular" else 3, width) * torch.logspace(0, -2, width)
    C = (x.T @ x / len(x)).double()
    return C.diagonal().clone() if kind == "diagonal" else C


@pytest.mark.parametrize("kind", ["diagonal", "full", "singular"])
def test_weighting_is_the_dense_weighted_decomposition(kind: str, tmp_path: Path) -> None:
    source = planted(tmp_path / "lora")
    before = deltas(source)
    torch.manual_seed(3)
    given_moments = {name: moments(W.shape[1], kind) for name, W in before.items()}
    shrink_adapter(source, tmp_path / "plain", rank=2)
    report = shrink_adapter(source, tmp_path / "small", rank=2, second_moments=given_moments)
    plain, after = deltas(tmp_path / "plain"), deltas(tmp_path / "small")
    for name, W in before.items():
        C = given_moments[name]
        values, vectors = torch.linalg.eigh(torch.diag(C) if C.dim() == 1 else C)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        best = truncated(W @ root, report.ranks[name])
        torch.testing.assert_close(after[name] @ root, best, rtol=1e-4, atol=1e-6)
        assert torch.linalg.matrix_rank(torch.cat([W, after[name]]), rtol=1e-5) == 6  # rows stay in the span of A
        assert ((after[name] - W) @ root).norm() <= ((plain[name] - W) @ root).norm()
    assert any(not torch.allclose(after[name], plain[name], rtol=1e-2) for name in before)


@pytest.mark.parametrize("full", [True, False])
def test_moments_are_of_what_each_layer_reads(full: bool) -> None:
    net = Net()
    found = second_moments_of(net, [IDS[:4], IDS[4:]], ["emb", "conv", "mid"], full=full)
    image = net.emb(IDS).reshape(10, 3, 4, 4)
    patches = nn.functional.unfold(image, 3, padding=1, stride=2).mT.flatten(0, 1).double()
    read = {"conv": patches, "mid": net.conv(image).flatten(1).double()}
    for name, x in read.items():
        whole = x.T @ x / len(x)
        torch.testing.assert_close(
            found[name], whole.detach() if full else whole.diagonal().detach(), rtol=1e-5, atol=1e-8
        )
    torch.testing.assert_close(found["emb"], IDS.flatten().bincount(minlength=20).double() / 60)
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_moments_leave_out_padding(batch: dict[str, Tensor]) -> None:
    ids = {"input_ids": batch["input_ids"][:1, :7], "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    padded = {key: nn.functional.pad(value, (0, 5)) for key, value in ids.items()}
    name = "bert.encoder.layer.1.attention.self.query"
    alone, beside = (second_moments_of(tiny_bert(), [b], [name], full=True)[name] for b in (ids, padded))
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)
    with pytest.raises(ArgumentError, match="`modules` must name modules of the model; found 'no'"):
        second_moments_of(tiny_bert(), [ids], ["no"])
    with pytest.raises(ArgumentError, match="`batches` must reach every module"):
        second_moments_of(tiny_bert(), [], [name])


def ones(**changed: Tensor) -> dict[str, Tensor]:
    widths = {"emb": 20, "conv": 27, "mid": 24, "head": 20}
    return {name: torch.ones(width) for name, width in widths.items()} | changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"`energy`, `budget` or `rank` must be given, exactly one of them; found \{\}"),
        ({"energy": 0.9, "rank": 2}, "exactly one of them; found {'energy': 0.9, 'rank': 2}"),
        ({"energy": 0.0}, r"`energy` must be in \(0, 1\]; found 0.0"),
        ({"energy": 1.01}, r"`energy` must be in \(0, 1\]"),
        ({"energy": "all"}, "`energy` must be a number"),
        ({"budget": 1.5}, r"`budget` must be a whole number ≥ 1, or a share in \(0, 1\); found 1.5"),
        ({"budget": 0}, "`budget` must be a whole number"),
        ({"budget": True}, "`budget` must be a number"),
        ({"rank": 0}, "`rank` must be a whole number ≥ 1; found 0"),
        (
            {"rank": 2, "layout": "dense"},
            "`layout` must be one of uniform, compact",
        ),
        ({"rank": 2, "out": "lora"}, "`out` must be another folder than"),
        ({"rank": 2, "out": ".", "overwrite": True}, "`out` must be another folder .* not one around it"),
        ({"rank": 2, "out": "there"}, "`out` must not exist yet, unless it may be replaced"),
        ({"rank": 2, "second_moments": {}}, "`second_moments` must hold those of every module .*'none of "),
        (
            {"rank": 2, "second_moments": ones(mid=torch.ones(3))},
            r"must be \(24,\) or \(24, 24\) for mid; found \(3,\)",
        ),
        ({"rank": 2, "second_moments": ones(mid=-torch.ones(24))}, "with no negative square, for mid"),
        ({"rank": 2, "second_moments": ones(mid=torch.full((24,), torch.nan))}, "must be finite"),
    ],
)
def test_what_is_wrong_is_told(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = planted(tmp_path / "lora")
    (tmp_path / "there").mkdir()
    with pytest.raises(ArgumentError, match=message):
        shrink_adapter(source, tmp_path / fields.pop("out", "small"), **fields)
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "there"}


def test_adapters_that_cannot_be_shrunk(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="holds no LoRA adapter"):
        shrink_adapter(tmp_path, tmp_path / "small", rank=2)
    source = planted(tmp_path / "lora")
    with pytest.raises(
        RankwiseError, match='every update is zero, which a compact export cannot hold; use layout="uniform"'
    ):
        shrink_adapter(source, tmp_path / "small", budget=1)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors["base_model.model.mid.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, source / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(RankwiseError, match="holds NaN or infinity in 'mid'"):
        shrink_adapter(source, tmp_path / "small", rank=2)


def command(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(shrink)
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A saved base model with a tokenizer, and an adapter of it in `lora`."""
    from transformers import BertTokenizerFast

    tiny_bert().save_pretrained(tmp_path / "base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "day", "night"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    get_peft_model(tiny_bert(), config).save_pretrained(str(tmp_path / "lora"))
    return tmp_path


def test_the_command_folds_layers_and_tells_totals(bert: Path) -> None:
    done = command(bert / "lora", "--budget", "0.5", "--out", bert / "small")
    assert done.exit_code == 0, done.output
    assert "bert.encoder.layer.*.attention.self.query" in done.output
    assert "numbers  1,024 → 512 (50.0%)" in done.output
    assert "read back from the file" in done.output
    again = command(bert / "lora", "--rank", 2, "--out", bert / "small", "--force", "--all", "--layout", "uniform")
    assert "bert.encoder.layer.1.attention.self.value" in again.output
    assert json.loads((bert / "small" / "adapter_config.json").read_text())["r"] == 2


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
def test_the_command_weighs_by_texts(bert: Path, name: str) -> None:
    texts = ["good day", "bad night day", "good"]
    lines = [json.dumps({"text": text}) for text in texts] if name.endswith("jsonl") else texts
    (bert / name).write_text("\n".join(lines) + "\n\n")
    arguments = ("--energy", 0.9, "--out", bert / "small", "--base", bert / "base", "--calibration", bert / name)
    done = command(bert / "lora", *arguments)
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "weighted by full second moments over 3 texts" in done.output
    command(bert / "lora", "--energy", 0.9, "--out", bert / "plain")
    small, plain = deltas(bert / "small"), deltas(bert / "plain")
    assert any(name not in plain or not torch.allclose(W, plain[name], rtol=1e-3) for name, W in small.items())


def test_the_command_tells_what_is_wrong(bert: Path) -> None:
    (bert / "none.txt").write_text("\n")
    (bert / "bad.jsonl").write_text('{"label": 1}\n')
    rest = (bert / "lora", "--rank", 2, "--out", bert / "small")
    cases: list[tuple[tuple[object, ...], type[Exception], str]] = [
        (("--calibration", bert / "vocab.txt"), ArgumentError, "`--calibration` must come together with --base"),
        (("--base", bert / "none"), AdapterFileError, "does not open"),
        (("--dtype", "int8"), ArgumentError, "`dtype` must be"),
        (("--base", bert / "base", "--calibration", bert / "none.txt"), DataError, "must hold texts"),
        (("--base", bert / "base", "--calibration", bert / "bad.jsonl"), DataError, 'a line lacks "text"'),
        (("--base", bert / "base", "--calibration", bert / "no.txt"), DataError, "No such file"),
        (("--base", bert / "lora", "--calibration", bert / "vocab.txt"), ArgumentError, "`--base` must be a folder"),
        (("--energy", 0.5), ArgumentError, "exactly one of them"),
    ]
    for arguments, kind, message in cases:
        error = command(*rest, *arguments).exception
        assert isinstance(error, kind), error
        assert message in str(error)
