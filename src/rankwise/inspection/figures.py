"""The figures of one adapter as it is, each with a sentence that is computed from it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rankwise.inspection.answer import QUESTIONS, Answer, map_of_modules, median, plural, rows_of, share
from rankwise.inspection.found import Found
from rankwise.pages.draw import draw_spectra, spectra_of
from rankwise.pages.places import printable
from rankwise.pages.style import DASHES, MARKERS, PALETTE, WIDTH, Plot
from rankwise.spectral import LayerRecord, Record, energy_rank
from rankwise.spectral.record import PretrainedRecord

CHANGED, WHERE, BUDGET, DROPPED, DISTANCE = QUESTIONS[:5]
SHARES = (0.9, 0.99, 0.999)
"""Shares of the energy whose ranks are told."""


def answers_of(found: Found) -> list[Answer]:
    """All figures of an adapter, in the order of their questions."""
    record = found.record
    return [
        _spectra(record),
        _norms(record),
        _ranks(record),
        _use(record),
        _energy(found),
        *_distances(record),
    ]


# --- what changed, and where -----------------------------------------------------------------------------------------


def _spectra(record: Record) -> Answer:
    """The singular values of every module's update."""
    values = {name: layer.singular_values for name, layer in record.modules.items()}
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_spectra(left, spectra_of(values, relative=False), PALETTE[0])
    left.set(title="Singular values of the updates", xlabel="index i", ylabel="σᵢ (log scale)")
    draw_spectra(right, spectra_of(values, relative=True), PALETTE[0])
    right.set(title="Relative to each module's largest", xlabel="index i", ylabel="σᵢ / σ₁ (log scale)")
    rows = [[name, i, value] for name, spectrum in values.items() for i, value in enumerate(spectrum, start=1)]
    plot = Plot("Singular values of the updates", _spectra_sentence(record), figure)
    return Answer(CHANGED, "singular-values", plot, ("module", "index", "singular_value"), rows)


def _spectra_sentence(record: Record) -> str:
    changed = _changed(record)
    if not changed:
        return f"No module has changed: all {len(record.modules)} updates are zero."
    largest = max(changed.values(), key=lambda layer: layer.singular_values[0])
    name = next(name for name, layer in changed.items() if layer is largest)
    falls = median([layer.singular_values[-1] / layer.singular_values[0] for layer in changed.values()])
    return (
        f"{len(changed)} of {plural(len(record.modules), 'module')} changed; the longest direction is in "
        f"{printable(name)} (σ₁ = {largest.singular_values[0]:.3g}), and in the median module the last direction is "
        f"{falls:.2g} times as long as the first. One line is one module, the black line their median."
    )


def _norms(record: Record) -> Answer:
    """‖ΔW‖_F by layer and module."""
    norms = {name: layer.norm for name, layer in record.modules.items()}
    figure = map_of_modules(norms, "‖ΔW‖_F of each module", form=".2g")
    plot = Plot("Size of the update by layer and module", _norms_sentence(norms), figure)
    return Answer(WHERE, "update-norms", plot, ("module", "norm"), rows_of(norms))


def _norms_sentence(norms: dict[str, float]) -> str:
    energy = {name: norm**2 for name, norm in norms.items()}
    total = sum(energy.values())
    if total == 0:
        return "No module has an update."
    by_energy = sorted(energy, key=lambda name: -energy[name])
    top = by_energy[: max(1, len(by_energy) // 10)]
    held = share(sum(energy[name] for name in top), total)
    who = f"{plural(len(top), 'module')} of {len(norms)}"
    return (
        f"{who}, a tenth of them, hold {held} of the energy Σ‖ΔW‖²; the largest update is in "
        f"{printable(by_energy[0])} (‖ΔW‖ = {norms[by_energy[0]]:.3g}), the smallest in {printable(by_energy[-1])} "
        f"({norms[by_energy[-1]]:.3g})."
    )


# --- how much of the budget was used ---------------------------------------------------------------------------------


def _ranks(record: Record) -> Answer:
    """Kept ranks by layer and module."""
    kept = {name: layer.kept for name, layer in record.modules.items()}
    held = {name: layer.rank for name, layer in record.modules.items()}
    figure = map_of_modules(kept, "Kept rank of each module", form=".0f", top=max(held.values()))
    total, most = sum(kept.values()), sum(held.values())
    if len(set(kept.values())) == 1:
        spread = f"every module keeps rank {next(iter(kept.values()))}"
    else:
        least, largest = min(kept, key=lambda name: kept[name]), max(kept, key=lambda name: kept[name])
        spread = f"the ranks run from {kept[least]} ({printable(least)}) to {kept[largest]} ({printable(largest)})"
    sentence = f"{total} of the {most} ranks in the tensors are kept ({share(total, most)}); {spread}."
    plot = Plot("Ranks by layer and module", sentence, figure)
    return Answer(BUDGET, "kept-ranks", plot, ("module", "kept_rank", "tensor_rank"), rows_of(kept, held))


def _use(record: Record) -> Answer:
    """Effective rank by layer and module."""
    modules = record.modules
    effective = {name: layer.effective_rank for name, layer in modules.items()}
    use = {name: layer.subspace_use for name, layer in modules.items()}
    stable = {name: layer.stable_rank for name, layer in modules.items()}
    numerical = {name: layer.numerical_rank for name, layer in modules.items()}
    top = max(layer.kept for layer in modules.values())
    figure = map_of_modules(effective, "Effective rank of each module's update", form=".1f", top=top)
    plot = Plot("Ranks that the updates use", _use_sentence(record), figure)
    columns = ("module", "effective_rank", "stable_rank", "numerical_rank", "subspace_use")
    return Answer(BUDGET, "effective-ranks", plot, columns, rows_of(effective, stable, numerical, use))


def _use_sentence(record: Record) -> str:
    changed = _changed(record)
    kept = sum(layer.kept for layer in record.modules.values())
    used = sum(layer.effective_rank for layer in record.modules.values())
    if not changed:
        return f"None of the {kept} kept ranks is used: there is no update."
    use = median([layer.subspace_use for layer in changed.values()])
    return (
        f"The updates use an effective rank of {used:.0f} out of {kept} kept ({share(used, kept)}); the median "
        f"subspace use ‖ΔW‖_*/(√r·‖ΔW‖_F) is {use:.2f}, where 1 would be all directions alike."
    )


# --- what could be dropped -------------------------------------------------------------------------------------------


def _energy(found: Found) -> Answer:
    """The share of the energy that a number of ranks keeps, the longest directions of all modules first."""
    record = found.record
    lengths = np.sort(np.concatenate([layer.singular_values for layer in record.modules.values()]))[::-1]
    energy = lengths**2
    total = energy.sum()
    curve = energy.cumsum() / total if total else np.zeros(len(energy))
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    kept = np.arange(1, len(curve) + 1)
    axes.plot(kept, curve, color=PALETTE[0], linewidth=1.8)
    for mark, dashes, marker in zip(SHARES, DASHES, MARKERS, strict=False):
        if total:
            at = int(np.searchsorted(curve, mark)) + 1
            axes.plot(at, mark, marker, color=PALETTE[1], label=f"{100 * mark:g} %: {at} ranks")
            axes.axvline(at, color=PALETTE[1], linestyle=dashes, linewidth=0.8)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(title="Energy kept by the longest directions", xlabel="ranks kept over all modules", ylabel="Σσ² kept")
    if total:
        axes.legend(loc="lower right")
    plot = Plot("Energy against ranks", _energy_sentence(found), figure if total else None)
    rows = [[int(ranks), float(part)] for ranks, part in zip(kept, curve, strict=True)]
    return Answer(DROPPED, "energy", plot, ("ranks", "energy_share"), rows)


def _energy_sentence(found: Found) -> str:
    record = found.record
    held = sum(layer.kept for layer in record.modules.values())
    if not _changed(record):
        return "The whole adapter could be dropped: there is no update."
    told = {part: _ranks_for(record, part) for part in SHARES}
    unused = sum(not layer.singular_values or layer.singular_values[0] == 0 for layer in record.modules.values())
    first = "" if found.is_plain else "Once it is exported, "
    how = f"{first}`rankwise shrink --energy 0.99` drops them"
    idle = f"; {plural(unused, 'module')} could go altogether" if unused else ""
    return (
        f"{told[0.9]} of {held} ranks keep 90 % of each module's energy, {told[0.99]} keep 99 % and {told[0.999]} "
        f"keep 99.9 %, so that {share(held - told[0.99], held)} of the ranks carry 1 %{idle}. {how}. The curve takes "
        "all modules together."
    )


def _ranks_for(record: Record, part: float) -> int:
    """The ranks over all modules that keep a share of each one's energy."""
    spectra = (torch.tensor(layer.singular_values, dtype=torch.float64) for layer in record.modules.values())
    return sum(int(energy_rank(spectrum, part)) for spectrum in spectra)


# --- how far from the pretrained weights ------------------------------------------------------------------------------


def _distances(record: Record) -> list[Answer]:
    weights = {name: layer.pretrained for name, layer in record.modules.items() if layer.pretrained is not None}
    if not weights:
        sentence = "Not measured: give the base model (`--base`), whose weights the updates are compared with."
        return [Answer(DISTANCE, "distance", Plot("Distance from the pretrained weights", sentence, None))]
    layers = {name: record.modules[name] for name in weights}
    return [_relative_norms(layers, weights), _lengths(layers, weights), _drift(weights)]


def _relative_norms(layers: Mapping[str, LayerRecord], weights: Mapping[str, PretrainedRecord]) -> Answer:
    """‖ΔW‖_F / ‖W0‖_F by layer and module."""
    relative = {name: layer.norm / weights[name].norm for name, layer in layers.items()}
    figure = map_of_modules(relative, "‖ΔW‖_F / ‖W₀‖_F of each module", form=".2g")
    farthest = max(relative, key=lambda name: relative[name])
    sentence = (
        f"In the median module the update is {median(list(relative.values())):.2g} times as long as the pretrained "
        f"weight in norm; the most is {relative[farthest]:.2g}, in {printable(farthest)}."
    )
    plot = Plot("Size relative to the pretrained weights", sentence, figure)
    return Answer(DISTANCE, "relative-norms", plot, ("module", "relative_norm"), rows_of(relative))


def _lengths(layers: Mapping[str, LayerRecord], weights: Mapping[str, PretrainedRecord]) -> Answer:
    """The length of singular directions, of the update and of the pretrained weight along them."""
    name = max(layers, key=lambda name: layers[name].norm)
    update, before = layers[name].singular_values, weights[name].lengths
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    places = np.arange(1, len(update) + 1)
    # Hatches repeat what the colours say, as in the paper's figure.
    axes.bar(places - 0.2, before, 0.4, color=PALETTE[4], hatch="--", edgecolor="white", label="pretrained |uᵢᵀW₀vᵢ|")
    axes.bar(places + 0.2, update, 0.4, color=PALETTE[0], hatch="//", edgecolor="white", label="update σᵢ")
    axes.set(title=f"Length of the update's directions: {printable(name)}", xlabel="index i", ylabel="length")
    axes.legend()
    directions = sum(len(layer.singular_values) for layer in layers.values())
    amplified = {module: _amplified(layer, weights[module]) for module, layer in layers.items()}
    of_all = sum(amplified.values())
    sentence = (
        f"In {printable(name)}, whose update is the largest, {amplified[name]} of {len(update)} directions are longer "
        f"in the update than in the pretrained weight; over all modules {of_all} of {directions} "
        f"({share(of_all, directions)})."
    )
    rows = [
        [module, i, own, pretrained]
        for module, layer in layers.items()
        for i, (own, pretrained) in enumerate(zip(layer.singular_values, weights[module].lengths, strict=True), start=1)
    ]
    plot = Plot("Length of singular directions", sentence, figure)
    return Answer(DISTANCE, "lengths", plot, ("module", "index", "update", "pretrained"), rows)


def _drift(weights: Mapping[str, PretrainedRecord]) -> Answer:
    """ΔΣ and ΔD of each module."""
    values = {name: weight.drift_values for name, weight in weights.items()}
    vectors = {name: weight.drift_vectors for name, weight in weights.items()}
    top_k = max(weight.top_k for weight in weights.values())
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(vectors.values()), list(values.values()), "o", color=PALETTE[0], markeredgecolor="white")
    axes.set(title="Drift of singular values and vectors", xlabel="ΔD (vectors)", ylabel="ΔΣ (values)")
    turned = max(vectors, key=lambda name: vectors[name])
    sentence = (
        f"Over the {top_k} leading triplets of each pretrained weight, singular values moved by "
        f"{median(list(values.values())):.2g} (ΔΣ) and vectors turned by {median(list(vectors.values())):.2g} (ΔD) in "
        f"the median module; the vectors of {printable(turned)} turned most ({vectors[turned]:.2g})."
    )
    plot = Plot("Drift from the pretrained weights", sentence, figure)
    columns = ("module", "drift_values", "drift_vectors")
    return Answer(DISTANCE, "drift", plot, columns, rows_of(values, vectors))


def _amplified(layer: LayerRecord, weight: PretrainedRecord) -> int:
    """How many directions are longer in the update than in the pretrained weight."""
    return sum(own > before for own, before in zip(layer.singular_values, weight.lengths, strict=True))


def _changed(record: Record) -> dict[str, LayerRecord]:
    """The modules whose update is not zero."""
    return {
        name: layer for name, layer in record.modules.items() if layer.singular_values and layer.singular_values[0] > 0
    }
