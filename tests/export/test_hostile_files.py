"""Broken and malicious adapters: one clear sentence each, nothing executed, nothing half written."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankwise
from rankwise.errors import RankwiseError
from rankwise.export.into_base.merge import merge_into_base

Edit = Callable[[Path], Any]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A, B = "base_model.model.0.lora_A.weight", "base_model.model.0.lora_B.weight"
MARKER = Path("/tmp") / "rankwise-hostile-marker"


class Payload:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (MARKER,))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    get_peft_model(net(), config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "adapter"
    config = rankwise.SoraConfig(r=2, target_modules=["0"], init_weights=False)
    get_peft_model(net(), config).save_pretrained(str(folder))
    return folder


def config_text(text: str | bytes) -> Edit:
    return lambda folder: (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())


def config_with(**values: Any) -> Edit:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return edit


def tensors_with(change: Callable[[dict[str, Tensor]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file({key: t.contiguous() for key, t in tensors.items()}, folder / TENSORS, {"format": "pt"})

    return edit


def tensor_bytes(make: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / TENSORS).write_bytes(make((folder / TENSORS).read_bytes()))


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def pickled(name: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / TENSORS).unlink()
        (folder / name).write_bytes(pickle.dumps(Payload()))

    return edit


def each(change: Callable[[Tensor], Tensor]) -> Edit:
    """Change the first matrix of the adapter, ours or not."""

    def edit(tensors: dict[str, Tensor]) -> None:
        key = next(key for key, t in tensors.items() if t.dim() == 2)
        tensors[key] = change(tensors[key])

    return tensors_with(edit)


def renamed(new: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.0.", f"model.{new}.")] = tensors.pop(key)

    return tensors_with(edit)


def spread(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


BOTH: dict[str, Edit] = {
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "an empty config": config_text(""),
    "half a config": config_text('{"peft_type": "LORA", "r": 2, "target'),
    "a config of bytes": config_text(b"\xff\xfe\x00\x01"),
    "a list for a config": config_text("[1, 2]"),
    "a number for a config": config_text("3"),
    "a bottomless config": config_text("[" * 100_000),
    "another kind": config_with(peft_type="IA3"),
    "an unknown kind": config_with(peft_type="NO_SUCH"),
    "no kind": config_text('{"r": 2}'),
    "a rank in words": config_with(r="two"),
    "a huge rank": config_with(r=10**12),
    "a negative rank": config_with(r=-2),
    "an infinite alpha": config_with(lora_alpha=float("inf")),
    "alpha in words": config_with(lora_alpha="much"),
    "a list for rank_pattern": config_with(rank_pattern=["0", 3]),
    "a broken expression in rank_pattern": config_with(rank_pattern={"(": 2}),
    "a number for target_modules": config_with(target_modules=5),
    "a broken expression for target_modules": config_with(target_modules="("),
    "a number for modules_to_save": config_with(modules_to_save=5),
    "a list for the base model": config_with(base_model_name_or_path=[1]),
    "no tensors": lambda folder: (folder / TENSORS).unlink(),
    "an empty file": tensor_bytes(lambda _: b""),
    "half a file": tensor_bytes(lambda data: data[: len(data) // 2]),
    "a file cut in its header": tensor_bytes(lambda data: data[:20]),
    "a file cut by one byte": tensor_bytes(lambda data: data[:-1]),
    "a header that claims all memory": tensor_bytes(lambda _: struct.pack("<Q", 2**62) + b"{}"),
    "a shape that claims all memory": tensor_bytes(
        lambda _: header(**{A: {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}}) + bytes(8)
    ),
    "offsets outside the file": tensor_bytes(
        lambda _: header(**{A: {"dtype": "F32", "shape": [2], "data_offsets": [2**40, 2**40 + 8]}}) + bytes(8)
    ),
    "an unknown dtype": tensor_bytes(
        lambda _: header(**{A: {"dtype": "Z9", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8)
    ),
    "a pickle under the name": lambda folder: (folder / TENSORS).write_bytes(pickle.dumps(Payload())),
    "a torch file under the name": lambda folder: torch.save({A: torch.ones(2, 6)}, folder / TENSORS),
    "a pickle beside": pickled("adapter_model.bin"),
    "a pickled state": pickled("pytorch_model.bin"),
    "a folder for a file": lambda folder: ((folder / TENSORS).unlink(), (folder / TENSORS).mkdir()),
    "no tensor at all": tensors_with(lambda tensors: tensors.clear()),
    "NaN": each(spread(torch.nan)),
    "infinity": each(spread(torch.inf)),
    "integers": each(lambda t: t.long()),
    "complex numbers": each(lambda t: t.to(torch.complex64)),
    "a vector for a matrix": each(lambda t: t.flatten()),
    "a third dimension": each(lambda t: t[None]),
    "no entries": each(lambda t: t[:0]),
    "another rank": each(lambda t: torch.cat([t, t])),
    "a name that climbs": renamed("../../../tmp/x"),
    "an absolute name": renamed("/tmp/x"),
    "an empty name": renamed(""),
}
PLAIN: dict[str, Edit] = {
    "no alpha": config_with(lora_alpha=None),
    "no B": tensors_with(lambda tensors: tensors.pop(B)),
    "no A": tensors_with(lambda tensors: tensors.pop(A)),
    "DoRA": config_with(use_dora=True),
    "activated LoRA": config_with(alora_invocation_tokens=[1]),
    "NaN in a head": tensors_with(lambda t: t.update({"base_model.model.head.weight": torch.tensor([torch.nan])})),
    "magnitudes": tensors_with(lambda t: t.update({"base_model.model.0.lora_magnitude_vector": torch.ones(5)})),
    "a start that changes the base": config_with(init_lora_weights="pissa"),
    "tokens trained beside": config_with(trainable_token_indices=[1]),
}
NATIVE: dict[str, Edit] = {
    "no gates": tensors_with(lambda tensors: tensors.pop(next(key for key in tensors if key.endswith(".g")))),
    "no counters": tensors_with(lambda tensors: tensors.pop(next(k for k in tensors if k.endswith("progress")))),
    "a format from the future": config_with(rankwise_format=10**6),
    "a module the base lacks": renamed("7"),
    "a field out of range": config_with(sparse_weight=-1.0),
    "a field in words": config_with(sparse_weight="much"),
}


@pytest.fixture(autouse=True)
def nothing_is_executed() -> Any:
    MARKER.unlink(missing_ok=True)
    yield
    assert not MARKER.exists(), "a pickle was opened"


def refused(run: Callable[[], Any], out: Path) -> None:
    with pytest.raises(RankwiseError) as caught:
        run()
    sentence = str(caught.value)
    assert len(sentence) > 20
    assert "\n" not in sentence
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("case", [*BOTH, *PLAIN])
def test_a_plain_adapter(case: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "in")
    (BOTH | PLAIN)[case](tmp_path / "in")
    out = tmp_path / "out"
    refused(lambda: rankwise.shrink_adapter(tmp_path / "in", out, rank=1), out)
    refused(lambda: rankwise.merge_adapters([plain, tmp_path / "in"], out), out)
    refused(lambda: merge_into_base([tmp_path / "in"], tmp_path, out), out)
    model = net()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(RankwiseError):
        rankwise.import_lora(model, tmp_path / "in", rankwise.SoraConfig(r=2, target_modules=["0"]))
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


@pytest.mark.parametrize("case", [*BOTH, *NATIVE])
def test_an_adapter_of_ours(case: str, native: Path, tmp_path: Path) -> None:
    shutil.copytree(native, tmp_path / "in")
    (BOTH | NATIVE)[case](tmp_path / "in")
    out = tmp_path / "out"
    refused(lambda: rankwise.export_lora(tmp_path / "in", out, base=net()), out)


@pytest.mark.parametrize("case", [*BOTH, *PLAIN])
def test_checking_never_passes_it(case: str, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "in")
    (BOTH | PLAIN)[case](tmp_path / "in")
    try:
        problems = rankwise.check_export(tmp_path / "in", "vllm", base=net()).problems
    except RankwiseError:
        return
    assert problems


def test_the_whole_ones_pass(plain: Path, native: Path, tmp_path: Path) -> None:
    rankwise.shrink_adapter(plain, tmp_path / "a", rank=1)
    rankwise.merge_adapters([plain, plain], tmp_path / "b")
    rankwise.export_lora(native, tmp_path / "c", base=net())
    rankwise.import_lora(net(), plain, rankwise.SoraConfig(r=2, target_modules=["0"]))
    assert rankwise.check_export(plain, "vllm", base=net()).problems == []
