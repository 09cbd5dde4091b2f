"""Every number of a record against a float64 decomposition of the dense matrices, on planted spectra."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rankwise.errors import ArgumentError, DataError
from rankwise.spectral import (
    LayerRecord,
    Measured,
    Pretrained,
    measure,
    read_record,
    subspace_alignment,
    weight_drift_top_k,
    write_record,
)
from rankwise.spectral import stacks as stacks_module
from rankwise.update import Factors

PLANTED = {
    "flat": [2.0, 2.0, 2.0, 2.0],
    "falling": [8.0, 4.0, 2.0, 1.0],
    "one": [5.0, 1e-9, 1e-9, 1e-9],
    "spread": [1.0, 1e-2, 1e-4, 1e-5],
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(out: int, into: int, spectrum: list[float], seed: int = 0) -> Factors:
    """Factors of an update with these singular values, themselves neither orthonormal nor balanced."""
    r = len(spectrum)
    U, V = torch.linalg.qr(random(out, r, seed=seed)).Q, torch.linalg.qr(random(into, r, seed=seed + 1)).Q
    mix, s = random(r, r, seed=seed + 2) + 3 * torch.eye(r, dtype=torch.float64), 1 + random(r, seed=seed + 3).abs()
    # U diag(σ) Vᵀ = (U diag(σ) mix / s) diag(s) (mix⁻¹ Vᵀ)
    return Factors(
        U @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ mix / s, s, torch.linalg.inv(mix) @ V.T
    )


def looked_at(updates: dict[str, Factors], **more: object) -> Measured:
    kept = {name: f.r for name, f in updates.items()}
    return measure(updates, step=3, method="lora", kept=kept, **more)  # type: ignore[arg-type]


def assert_dense(layer: LayerRecord, update: Factors) -> None:
    """The layer's numbers are those that numpy finds in the dense matrices."""
    dense = update.delta().numpy()
    S = np.linalg.svd(dense, compute_uv=False)[: update.r]
    assert layer.singular_values == pytest.approx(S.tolist(), rel=1e-9, abs=1e-12 * S[0])
    assert layer.shape == dense.shape
    assert layer.norm == pytest.approx(float(np.linalg.norm(dense)), rel=1e-12)
    assert layer.numerical_rank == int((max(dense.shape) * np.finfo(np.float32).eps * S[0] < S).sum())
    p = S / S.sum()
    assert layer.effective_rank == pytest.approx(math.exp(-float((p * np.log(p)).sum())), rel=1e-7)
    assert layer.stable_rank == pytest.approx(float((S**2).sum() / S[0] ** 2), rel=1e-9)
    assert layer.subspace_use == pytest.approx(float(S.sum() / math.sqrt(len(S) * (S**2).sum())), rel=1e-9)
    A = np.linalg.svd(update.A.numpy(), compute_uv=False)
    assert layer.subspace_use_of_factor == pytest.approx(float(A.sum() / math.sqrt(len(A) * (A**2).sum())), rel=1e-9)
    assert layer.condition_of_left == pytest.approx(float(np.linalg.cond(update.B.numpy())), rel=1e-6)
    assert layer.condition_of_right == pytest.approx(float(np.linalg.cond(update.A.numpy())), rel=1e-6)
    assert layer.condition_of_product == pytest.approx(float(S[0] / S[-1]), rel=1e-4)
    assert layer.gates == update.s.tolist()


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(("out", "into"), [(30, 20), (12, 40)])
def test_every_number_is_that_of_the_dense_matrices(name: str, out: int, into: int) -> None:
    update = planted(out, into, PLANTED[name])
    layer = looked_at({"query": update}).record.modules["query"]
    assert layer.singular_values == pytest.approx(PLANTED[name], rel=1e-6, abs=1e-11)
    assert_dense(layer, update)


def test_layers_of_one_shape_are_measured_together_and_all_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = {f"layer {i}": planted(20, 10 + 5 * (i % 2), PLANTED["falling"], seed=i) for i in range(7)}
    whole = looked_at(updates, directions=2)
    assert list(whole.record.modules) == list(updates)
    for name, update in updates.items():
        assert_dense(whole.record.modules[name], update)
    decompositions: list[int] = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *args, **kw: decompositions.append(1) or qr(*args, **kw))
    looked_at(updates)
    at_once = len(decompositions)
    looked_at(dict(list(updates.items())[:2]))
    assert len(decompositions) == 2 * at_once  # two shapes cost the same, however many layers have them
    # Stacks of at most two layers give the same numbers, to rounding.
    monkeypatch.setattr(stacks_module, "TOGETHER", 2 * 8 * 4 * 30)
    again = looked_at(updates, directions=2)
    for name, layer in whole.record.modules.items():
        assert again.record.modules[name].singular_values == pytest.approx(layer.singular_values, rel=1e-12)


def test_what_is_trained_has_its_own_gates_and_condition_numbers() -> None:
    """SORSA's update is the difference of two products, of which the first is trained."""
    moving, start = planted(30, 20, [4.0, 2.0]), planted(30, 20, [3.0, 2.5], seed=9)
    parts = zip(moving, start, strict=True)
    (U, U0), (S, S0), (V, V0) = parts
    update = Factors(torch.cat([U, U0], 1), torch.cat([S, -S0]), torch.cat([V, V0]))
    found = measure({"w": update}, step=0, method="sorsa", kept={"w": 2}, trained={"w": moving})
    layer = found.record.modules["w"]
    assert (layer.rank, layer.kept) == (4, 2)
    assert layer.gates == S.tolist()
    assert layer.condition_of_product == pytest.approx(2.0)
    assert layer.singular_values == pytest.approx(torch.linalg.svdvals(update.delta())[:4].tolist(), rel=1e-9)


def test_no_update_is_no_number_that_json_lacks() -> None:
    update = Factors(torch.zeros(6, 2), torch.ones(2), random(2, 5).float())
    none = Factors(torch.zeros(6, 0), torch.zeros(0), torch.zeros(0, 5))
    modules = looked_at({"zero": update, "none": none}, directions=2).record.modules
    assert modules["zero"].condition_of_product is None
    assert modules["zero"].condition_of_left is None
    assert modules["zero"].condition_of_right is not None
    for layer in modules.values():
        assert (layer.effective_rank, layer.stable_rank, layer.numerical_rank, layer.subspace_use) == (0, 0, 0, 0)


def test_beside_a_pretrained_weight_against_dense_decompositions() -> None:
    W0, update = random(24, 18, seed=5), planted(24, 18, [0.9, 0.5, 0.1], seed=6)
    layer = looked_at({"w": update}, pretrained={"w": Pretrained(W0, 4)}).record.modules["w"]
    assert layer.pretrained is not None
    expected = weight_drift_top_k(W0, W0 + update.delta(), 4)
    assert layer.pretrained.drift_values == pytest.approx(float(expected.values), rel=1e-6)
    assert layer.pretrained.drift_vectors == pytest.approx(float(expected.vectors), rel=1e-4, abs=1e-8)
    assert layer.pretrained.norm == pytest.approx(float(W0.norm()))
    U, _, Vh = np.linalg.svd(update.delta().numpy())
    lengths = [abs(float(U[:, i] @ W0.numpy() @ Vh[i])) for i in range(3)]
    assert layer.pretrained.lengths == pytest.approx(lengths, rel=1e-8)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize(("m", "n", "k"), [(200, 120, 5), (90, 300, 8), (40, 40, 40)])
def test_drift_by_subspace_iteration_is_that_of_full_decompositions(m: int, n: int, k: int, size: float) -> None:
    planted_weight = planted(m, n, [10.0 * 0.9**i for i in range(min(m, n))], seed=1).delta()
    update = Factors(size * random(m, 3, seed=2), torch.ones(3), random(3, n, seed=3))
    found, dense = Pretrained(planted_weight, k).drift(update), planted_weight + update.delta()
    expected = weight_drift_top_k(planted_weight, dense, k)
    assert float(found.values) == pytest.approx(float(expected.values), rel=1e-5, abs=1e-11)
    assert float(found.vectors) == pytest.approx(float(expected.vectors), rel=1e-4, abs=1e-9)


def test_files_hold_the_record_and_directions_good_enough_for_alignments(tmp_path: Path) -> None:
    updates = {f"layer.{i}": planted(30, 20, PLANTED["falling"], seed=i) for i in range(3)}
    found = looked_at(updates, directions=2, budget=7.5)
    again = read_record(write_record(tmp_path, found))
    assert again.record == found.record
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000003.json", "step-00000003.safetensors"]
    for name, directions in found.directions.items():
        assert float(subspace_alignment(again.directions[name].U, directions.U)) == pytest.approx(1, abs=1e-3)
        U = torch.linalg.svd(updates[name].delta()).U[:, :2]
        assert float(subspace_alignment(again.directions[name].U, U)) == pytest.approx(1, abs=1e-3)


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = write_record(tmp_path, looked_at({"w": planted(6, 5, [1.0])}, directions=1))
    whole = file.read_text()
    file.write_text(whole.replace('"format":1', '"format":9'))
    with pytest.raises(DataError, match="is a record of format 9, and this rankwise reads format 1"):
        read_record(file)
    file.write_text(whole[:50])
    with pytest.raises(DataError, match="is no whole record of an adapter"):
        read_record(file)
    file.write_text(whole)
    beside = file.with_suffix(".safetensors")
    beside.write_bytes(beside.read_bytes()[:40])
    with pytest.raises(DataError, match="is no whole file of directions"):
        read_record(file)


def test_bad_input_is_named() -> None:
    update = planted(6, 5, [1.0])
    with pytest.raises(ArgumentError, match=r"`step` must be a whole number ≥ 0; found -1"):
        measure({"w": update}, step=-1, method="lora", kept={"w": 1})
    broken = Factors(update.B * math.nan, update.s, update.A)
    with pytest.raises(ArgumentError, match=r"'w'.*must hold finite numbers only; found nan"):
        looked_at({"w": broken})
    with pytest.raises(ArgumentError, match=r"`k` must be at most min\(m, n\) = 5; found 6"):
        Pretrained(torch.ones(8, 5), 6)
    with pytest.raises(ArgumentError, match=r"`W0` must be one matrix \(m, n\); found \(2, 8, 5\)"):
        Pretrained(torch.ones(2, 8, 5), 2)
