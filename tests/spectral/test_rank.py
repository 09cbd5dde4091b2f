"""Measures of rank against the formulas over plain numbers, and spectra of factors against dense decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.errors import ArgumentError
from rankwise.spectral import (
    effective_rank,
    energy_curve,
    energy_rank,
    numerical_rank,
    spectra,
    stable_rank,
    subspace_use,
)
from rankwise.update import Factors

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(out: int, into: int, r: int, seed: int = 0) -> Factors:
    return Factors(random(out, r, seed=seed), random(r, seed=seed + 1), random(r, into, seed=seed + 2))


# --- measures of rank -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(S=SPECTRA, share=st.floats(0.01, 0.999))
def test_equal_the_formulas_number_by_number(S: list[float], share: float) -> None:
    total, energy = math.fsum(S), math.fsum(s * s for s in S)
    entropy = -math.fsum(s / total * math.log(s / total) for s in S)
    assert float(effective_rank(values(*S))) == pytest.approx(math.exp(entropy), rel=1e-10)
    assert float(stable_rank(values(*S))) == pytest.approx(energy / max(S) ** 2, rel=1e-10)
    falling = sorted(S, reverse=True)
    reaches = [math.fsum(s * s for s in falling[:k]) / energy for k in range(1, len(S) + 1)]
    expected = next(k for k, reach in enumerate(reaches, 1) if reach >= share * (1 - 1e-13))
    assert int(energy_rank(values(*S), share)) == expected


@settings(max_examples=60, deadline=None)
@given(S=SPECTRA)
def test_curve_and_use_equal_the_formulas_number_by_number(S: list[float]) -> None:
    energy, falling = math.fsum(s * s for s in S), sorted(S, reverse=True)
    reaches = [math.fsum(s * s for s in falling[:k]) / energy for k in range(1, len(S) + 1)]
    assert energy_curve(values(*S)).tolist() == pytest.approx(reaches, rel=1e-10)
    use = math.fsum(S) / math.sqrt(len(S) * energy)
    assert float(subspace_use(values(*S))) == pytest.approx(use, rel=1e-10)
    assert 1 / math.sqrt(len(S)) - 1e-9 <= use <= 1 + 1e-9
    counted = sum(s > 50 * 2**-23 * max(S) for s in S)
    assert int(numerical_rank(values(*S), 50)) == counted


def test_the_numerical_rank_of_a_product_in_float32_is_the_planted_one() -> None:
    for r in (1, 5, 20):
        product = factors(80, 60, r).delta().float()
        S = torch.linalg.svdvals(product)
        assert int(numerical_rank(S, 80)) == r == int(torch.linalg.matrix_rank(product))
    assert int(numerical_rank(values(1.0, 1e-9), 10, torch.float64)) == 2


def test_curve_and_use_of_nothing_are_zero() -> None:
    for nothing in (torch.zeros(3), torch.zeros(0)):
        assert energy_curve(nothing).tolist() == [0.0] * len(nothing)
        assert float(subspace_use(nothing)) == 0
        assert int(numerical_rank(nothing, 5)) == 0
    with pytest.raises(ArgumentError, match="`larger_side` must be a whole number ≥ 1; found 0"):
        numerical_rank(torch.ones(2), 0)


@settings(max_examples=30, deadline=None)
@given(S=SPECTRA, zeros=st.integers(0, 3), exponent=st.integers(-160, 160))
def test_neither_scale_nor_zeros_nor_order_count_and_no_measure_exceeds_the_rank(
    S: list[float], zeros: int, exponent: int
) -> None:
    plain, other = values(*S), 10.0**exponent * values(*reversed(S), *[0.0] * zeros)
    for measure in (effective_rank, stable_rank):
        assert float(measure(other)) == pytest.approx(float(measure(plain)), rel=1e-9)
        assert 1 - 1e-9 <= float(measure(plain)) <= len(S) + 1e-9
    assert int(energy_rank(other, 0.9)) == int(energy_rank(plain, 0.9))
    assert float(stable_rank(plain)) <= float(effective_rank(plain)) * (1 + 1e-9)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_equal_singular_values_all_count(k: int) -> None:
    S = torch.full((k,), 0.37)
    assert float(effective_rank(S)) == pytest.approx(k)
    assert float(stable_rank(S)) == pytest.approx(k)
    for wanted in range(1, k + 1):
        assert int(energy_rank(S, wanted / k)) == wanted
        if wanted < k:
            assert int(energy_rank(S, wanted / k + 1e-6)) == wanted + 1


def test_one_dominant_value_is_rank_one() -> None:
    S = values(1.0, 1e-9, 1e-9, 1e-9)
    assert float(effective_rank(S)) == pytest.approx(1, abs=1e-6)
    assert float(stable_rank(S)) == pytest.approx(1)
    assert int(energy_rank(S, 1.0)) == 1
    assert int(energy_rank(values(1.0, 1e-6, 0.0), 1.0)) == 2


@pytest.mark.parametrize("S", [values(0.0, 0.0), values()])
def test_nothing_has_rank_zero(S: Tensor) -> None:
    assert (float(effective_rank(S)), float(stable_rank(S)), int(energy_rank(S, 0.5))) == (0, 0, 0)


def test_truncating_at_the_energy_rank_leaves_the_promised_error() -> None:
    W = random(12, 9)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    for share in (0.3, 0.9, 0.99):
        k = int(energy_rank(S, share))
        for rank, kept in ((k, True), (k - 1, False)):
            error = float((W - (U[:, :rank] * S[:rank]) @ Vh[:rank]).norm() / W.norm())
            assert (error <= math.sqrt(1 - share)) is kept


def test_stacks_equal_their_rows() -> None:
    S = torch.stack([values(3.0, 2.0, 1.0), values(0.0, 0.0, 0.0), values(1.0, 1.0, 0.0)]).view(3, 1, 3)
    assert energy_rank(S, 0.9).tolist() == [[2], [0], [2]]
    assert effective_rank(S).shape == stable_rank(S).shape == (3, 1)
    assert stable_rank(S).flatten().tolist() == pytest.approx([14 / 9, 0, 2])
    assert effective_rank(S).flatten().tolist() == pytest.approx([float(effective_rank(row)) for row in S[:, 0]])


@pytest.mark.parametrize("measure", [effective_rank, stable_rank, lambda S: energy_rank(S, 0.5)])
def test_what_is_no_spectrum_is_refused(measure: object) -> None:
    with pytest.raises(ArgumentError, match=r"`singular_values` must be a tensor .* of numbers ≥ 0; found -2\.0"):
        measure(values(1.0, -2.0))  # type: ignore[operator]
    with pytest.raises(ArgumentError, match="`singular_values` must hold finite numbers only; found nan"):
        measure(values(1.0, math.nan))  # type: ignore[operator]


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, math.nan])
def test_a_share_lies_above_zero_and_at_most_one(share: float) -> None:
    with pytest.raises(ArgumentError, match=r"`share` must be in \(0, 1\]; found"):
        energy_rank(values(1.0), share)


# --- spectra of updates ---------------------------------------------------------------------------------------------


def test_every_layer_has_the_spectrum_of_its_dense_update() -> None:
    updates = {
        "b.query": factors(8, 6, 3),
        "a.dense": factors(5, 9, 7, seed=10),
        "b.value": factors(8, 6, 3, seed=20),
        "c": factors(8, 6, 2, seed=30),
    }
    found = spectra(updates)
    assert list(found) == list(updates)
    for name, update in updates.items():
        S = torch.linalg.svdvals(update.delta())[: min(update.r, *update.delta().shape)]
        assert found[name].singular_values.tolist() == pytest.approx(S.tolist(), rel=1e-9)
        assert found[name].effective_rank == pytest.approx(float(effective_rank(S)))
        assert found[name].stable_rank == pytest.approx(float(stable_rank(S)))
        assert found[name].energy_rank(0.9) == int(energy_rank(S, 0.9))


def test_a_planted_spectrum_comes_back_whatever_the_factors_look_like() -> None:
    """B·M and M⁻¹·A make the same update as B and A for every invertible M."""
    S = values(9.0, 3.0, 1.0, 0.1)
    U, V = torch.linalg.qr(random(20, 4)).Q, torch.linalg.qr(random(15, 4, seed=1)).Q
    M = random(4, 4, seed=2)
    mixed = Factors((U * S) @ M, torch.ones(4), torch.linalg.inv(M) @ V.T)
    layer = spectra({"w": mixed})["w"]
    assert layer.singular_values.tolist() == pytest.approx(S.tolist(), rel=1e-9)
    assert [layer.energy_rank(share) for share in (0.5, 0.9, 0.99, 1.0)] == [1, 2, 3, 4]


def test_no_dense_update_is_decomposed_and_layers_of_a_shape_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    svd = torch.linalg.svd

    def watched(W: Tensor, **options: bool) -> object:
        shapes.append(tuple(W.shape))
        return svd(W, **options)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    spectra({f"layer {i}": factors(200, 100, 4, seed=i) for i in range(12)})
    assert shapes == [(12, 4, 4)]


def test_zero_updates_and_rank_zero_have_rank_zero() -> None:
    none = Factors(torch.zeros(5, 0), torch.zeros(0), torch.zeros(0, 4))
    closed = Factors(torch.ones(5, 2), torch.zeros(2), torch.ones(2, 4))
    for layer in spectra({"none": none, "closed": closed}).values():
        assert (layer.effective_rank, layer.stable_rank, layer.energy_rank(0.9)) == (0, 0, 0)
    assert spectra({}) == {}


def test_float32_parameters_are_read_in_float64_and_without_their_graph() -> None:
    update = Factors(*(t.float().requires_grad_() for t in factors(8, 6, 3)))
    layer = spectra({"w": update})["w"]
    assert layer.singular_values.dtype == torch.float64
    assert not layer.singular_values.requires_grad
    dense = Factors(*(t.detach().double() for t in update)).delta()
    assert layer.singular_values.tolist() == pytest.approx(torch.linalg.svdvals(dense)[:3].tolist(), rel=1e-9)


def test_a_bad_layer_is_named() -> None:
    broken = factors(4, 4, 2)
    broken.s[1] = math.inf
    with pytest.raises(ArgumentError, match=r"`updates\['q'\]` must hold finite numbers only; found inf"):
        spectra({"p": factors(4, 4, 2), "q": broken})
    stack = Factors(random(3, 4, 2), random(3, 2), random(3, 2, 5))
    with pytest.raises(ArgumentError, match=r"`updates\['s'\]` must be the Factors of one layer; found 'B of shape"):
        spectra({"s": stack})
