"""Recording spectra in a bare loop, under the Trainer and under Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import get_peft_model
from test_kill import Examples
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import rankwise
from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError
from rankwise.spectral import read_record
from rankwise.spectral.record import record_files
from rankwise.training.recording import look

IDS = torch.arange(24).view(4, 6)


def adapted(config: Any) -> Any:
    return get_peft_model(tiny_bert(), config)


def trained(folder: Path, model: Any, callback: Any, **arguments: Any) -> Trainer:
    given = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.05,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **arguments,
    )
    trainer = Trainer(model=model, args=given, train_dataset=Examples(), callbacks=[callback])
    trainer.train()
    return trainer


def steps_in(folder: Path) -> list[int]:
    return [read_record(file).record.step for file in record_files(folder)]


@pytest.mark.parametrize("method", CONFIGS)
def test_a_record_is_what_the_dense_updates_have(method: str, tmp_path: Path) -> None:
    config = CONFIGS[method](r=4, target_modules=["query", "output.dense"], init_weights=False)
    model = adapted(config)
    found = rankwise.Recorder(model, tmp_path, pretrained=3).record(step=7)
    assert found.record.method == method
    assert read_record(*record_files(tmp_path)).record == found.record
    base = dict(tiny_bert().named_modules())
    for name, update in rankwise.factors(model).items():
        layer, dense = found.record.modules[name], update.delta().double()
        S = torch.linalg.svdvals(dense)[: update.r]
        assert layer.singular_values == pytest.approx(S.tolist(), rel=1e-4, abs=2e-6 * float(S[0]))
        assert layer.kept == rankwise.ranks(model)[name]
        assert layer.pretrained is not None
        weight: Any = base[name]
        W0 = weight.weight.detach().double()
        drift = rankwise.spectral.weight_drift_top_k(W0, W0 + dense, 3)
        assert layer.pretrained.drift_values == pytest.approx(float(drift.values), rel=1e-3, abs=1e-7)
        assert layer.pretrained.drift_vectors == pytest.approx(float(drift.vectors), rel=1e-3, abs=1e-5)


def test_of_sorsa_the_trained_triplets_have_the_condition_numbers() -> None:
    model = adapted(rankwise.SorsaConfig(r=4, target_modules=["query"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".U", ".Vh")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    state = model.state_dict()
    for name, layer in look(model, 0).record.modules.items():
        key = next(key for key in state if name in key and key.endswith(".U"))
        U = state[key].double().numpy()
        S, Vh = (state[key.removesuffix("U") + part].double().numpy() for part in ("S", "Vh"))
        assert layer.condition_of_left == pytest.approx(np.linalg.cond(U), rel=1e-5)
        assert layer.condition_of_right == pytest.approx(np.linalg.cond(Vh), rel=1e-5)
        values = np.linalg.svd((U * S) @ Vh, compute_uv=False)
        assert layer.condition_of_product == pytest.approx(values[0] / values[3], rel=1e-4)
        assert layer.gates == pytest.approx(S.tolist())


def test_lora_of_pefts_own_is_recorded_alike(tmp_path: Path) -> None:
    model = adapted(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"], init_lora_weights=False))
    found = rankwise.Recorder(model, tmp_path, pretrained=2).record(step=0).record
    assert len(found.modules) == 2
    for name, layer in found.modules.items():
        dense = model.base_model.model.get_submodule(name).get_delta_weight("default").double()
        assert layer.singular_values == pytest.approx(torch.linalg.svdvals(dense)[:4].tolist(), rel=1e-5)
        assert layer.gates == [2.0] * 4
        assert layer.pretrained is not None
    dora = adapted(peft.LoraConfig(r=4, target_modules=["query"], use_dora=True))
    with pytest.raises(ArgumentError, match="`model` must carry a plain LoRA, whose update is B·A alone"):
        rankwise.Recorder(dora, tmp_path)


def test_recording_changes_nothing_of_a_run(tmp_path: Path) -> None:
    def run(*, record: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = adapted(rankwise.SaloraConfig(r=4, target_modules=["query"], total_step=8))
        recorder = rankwise.Recorder(model, tmp_path, pretrained=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(1, 9):
            model(input_ids=IDS, labels=IDS[:, 0] % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if record:
                recorder.record(step)
        return model.state_dict()

    with_records, without = run(record=True), run(record=False)
    for key, value in without.items():
        assert torch.equal(with_records[key], value), key
    assert steps_in(tmp_path) == list(range(1, 9))


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_records_at_the_start_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    model = adapted(rankwise.AdaLoraConfig(r=4, target_modules=["query", "value"]))
    callback = rankwise.SpectraCallback(tmp_path / "spectra", every=4, directions=2)
    trained(tmp_path, model, callback, max_steps=10)
    assert steps_in(tmp_path / "spectra") == [0, 4, 8, 10]
    records = [read_record(file) for file in record_files(tmp_path / "spectra")]
    budgets = [measured.record.budget for measured in records]
    assert budgets[0] is None  # nobody has said yet how long the run is
    assert budgets[-1] == 4 * 4
    assert sum(layer.kept for layer in records[-1].record.modules.values()) == 16
    assert all(measured.directions for measured in records)
    names = list(rankwise.ranks(model))
    assert list(records[0].record.modules) == names


@pytest.mark.filterwarnings("ignore")
def test_a_tracker_gets_every_record_as_numbers_and_images(tmp_path: Path) -> None:
    class Listening:
        name = "wandb"
        numbers: dict[int, dict[str, float]] = {}  # noqa: RUF012  one run, one listener
        images: dict[int, dict[str, list[np.ndarray]]] = {}  # noqa: RUF012

        def log(self, values: dict[str, float], step: int) -> None:
            self.numbers[step] = values

        def log_images(self, values: dict[str, list[np.ndarray]], step: int) -> None:
            self.images[step] = values

    model, tracker = adapted(rankwise.AdaLoraConfig(r=4, target_modules=["query"])), Listening()
    trained(tmp_path, model, rankwise.SpectraCallback(tmp_path / "s", every=5, tracker=tracker), max_steps=10)  # type: ignore[arg-type]
    assert list(tracker.numbers) == list(tracker.images) == [0, 5, 10]
    last = read_record(record_files(tmp_path / "s")[-1]).record
    assert tracker.numbers[10]["rank/budget"] == last.budget == 8
    for name, layer in last.modules.items():
        assert tracker.numbers[10][f"rank/{name}"] == layer.kept
        assert tracker.numbers[10][f"effective_rank/{name}"] == layer.effective_rank
    for pictures in tracker.images.values():
        for (picture,) in pictures.values():
            assert picture.dtype == np.uint8
            assert picture.shape[2] == 3
            assert picture.std() > 0


@pytest.mark.filterwarnings("ignore")
def test_lightning_records_as_the_trainer_does(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason='in the "test" extra')
    from test_lightning import make_module

    module = make_module(next(iter(CASES)), automatic=True)
    trainer = lightning.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[rankwise.LightningSpectra(tmp_path / "spectra", every=2)],
    )
    trainer.fit(module, DataLoader(Examples(), batch_size=4))
    assert steps_in(tmp_path / "spectra") == [0, 2, 4, 5]
    last = read_record(record_files(tmp_path / "spectra")[-1]).record
    assert list(last.modules) == list(rankwise.ranks(module.model))


def test_bad_input_is_named_before_the_run(tmp_path: Path) -> None:
    model = adapted(rankwise.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ArgumentError, match="`every` must be a whole number ≥ 1; found 0"):
        rankwise.SpectraCallback(tmp_path, every=0)
    with pytest.raises(ArgumentError, match="`pretrained` must be a whole number ≥ 1; found 0"):
        rankwise.SpectraCallback(tmp_path, pretrained=0)
    pytest.importorskip("lightning", reason='in the "test" extra')
    for callback in (rankwise.SpectraCallback, rankwise.LightningSpectra):
        with pytest.raises(ArgumentError, match="`directions` must be a whole number ≥ 0; found -1"):
            callback(tmp_path, directions=-1)
    with pytest.raises(ArgumentError, match="`pretrained` must be a whole number ≥ 1; found 0"):
        rankwise.LightningSpectra(tmp_path, pretrained=0)
    with pytest.raises(ArgumentError, match="`directions` must be a whole number ≥ 0; found -1"):
        rankwise.Recorder(model, tmp_path, directions=-1)
    with pytest.raises(ArgumentError, match="`adapter` must be a rankwise adapter of the model"):
        rankwise.Recorder(model, tmp_path, adapter="other")
    with pytest.raises(ArgumentError, match="`step` must be a whole number ≥ 0; found -1"):
        rankwise.Recorder(model, tmp_path).record(-1)
    assert not record_files(tmp_path)
